"""Timing two ways to do the same work in turn, the check that it is the same work, and the table of results."""

import dataclasses
import gc
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

PATIENCE = 120.0
"""Seconds after which a comparison is not repeated more than twice."""


class Disagreement(RuntimeError):
    """Raised where the two sides do not compute the same: their times may not be compared then."""


@dataclasses.dataclass
class Comparison:
    """One line of the table: the same work done by us and by a named alternative."""

    row: str
    dtype: str
    shape: str
    against: str
    unit: str
    """Unit of the rates: of `amount` a second."""
    amount: float
    """Work in one of our runs."""
    ours: list[float]
    """Seconds of each of our runs."""
    theirs: list[float]
    """Seconds of each of the alternative's runs."""
    their_amount: float | None = None
    """Work in one of the alternative's runs; None means as much as in ours."""
    agreement: dict[str, float] = dataclasses.field(default_factory=dict)
    """Errors of the quantities that were compared beforehand, relative unless named otherwise."""
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rates(self) -> tuple[float, float]:
        """Work a second at the median time: ours, theirs."""
        their_amount = self.amount if self.their_amount is None else self.their_amount
        return self.amount / statistics.median(self.ours), their_amount / statistics.median(self.theirs)

    @property
    def ratio(self) -> float:
        """Our rate over theirs: above 1 we are faster."""
        ours, theirs = self.rates
        return ours / theirs

    def record(self) -> dict[str, Any]:
        """The comparison as plain values for JSON, raw times included."""
        return {"ratio": self.ratio, "rates": self.rates, **dataclasses.asdict(self)}


def alternate(*runs: Callable[[], Any], repeats: int) -> list[list[float]]:
    """Seconds of `repeats` runs of each callable, taken in turn; the callables return when their work is done.

    Every timed run follows an untimed one of the same callable. It takes back the memory that this side gave up while
    the other ran, which a training loop does once and a benchmark in turns would do every time. Long runs are repeated
    at least twice, and no longer than PATIENCE.
    """
    times: list[list[float]] = [[] for _ in runs]
    gc.collect()
    started = time.perf_counter()
    for index in range(repeats):
        if index >= 2 and time.perf_counter() - started > PATIENCE:
            break
        for run, seconds in zip(runs, times, strict=True):
            run()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return times


def finished(run: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Bind arguments to a JAX function and wait for its results."""
    return lambda: jax.block_until_ready(run(*args))


def agree(row: str, found: dict[str, tuple[Any, Any, float]]) -> dict[str, float]:
    """Compare (ours, theirs, tolerance) by name and return the relative errors ‖ours − theirs‖ / ‖theirs‖.

    Raises:
      Disagreement: an error above its tolerance, or not a number.
    """
    errors = {}
    for name, (ours, theirs, tolerance) in found.items():
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        if ours.shape != theirs.shape:
            raise Disagreement(f"{row}: {name} has shape {ours.shape} here and {theirs.shape} in torch")
        if not np.linalg.norm(theirs) > 0:
            raise Disagreement(f"{row}: {name} is zero or not a number in torch, which compares nothing")
        error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        if not error <= tolerance:
            raise Disagreement(
                f"{row}: {name} differs from torch's by {error:.2g} relative, more than {tolerance:g} (ours "
                f"{_shown(ours)}, theirs {_shown(theirs)}); the two do not do the same work, nothing was timed"
            )
        errors[name] = error
    progress(f"{row}: agrees with torch, " + ", ".join(f"{n} to {e:.1g}" for n, e in errors.items()))
    return errors


def _shown(values: np.ndarray) -> str:
    return f"{values:.6g}" if values.ndim == 0 else f"norm {np.linalg.norm(values):.6g}"


def device_name() -> str:
    """The accelerator, or the processor where there is none."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()


def progress(message: str) -> None:
    """Print a message with the time on standard error."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def table(comparisons: Sequence[Comparison]) -> str:
    """Markdown, the ratio first."""
    columns = ("ratio", "row", "dtype", "ours", "theirs", "unit", "shape", "against", "agreement")
    return markdown(
        columns,
        [
            (
                f"{c.ratio:.2f}",
                c.row,
                c.dtype,
                *(f"{rate:.4g}" for rate in c.rates),
                c.unit,
                c.shape,
                c.against,
                ", ".join(f"{name} {error:.0e}" for name, error in c.agreement.items()) or "-",
            )
            for c in comparisons
        ],
    )


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The p of the best fit values ∝ sizes^p; NaN where a value is not positive."""
    if min(values) <= 0:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
