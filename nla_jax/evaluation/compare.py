"""Two or more evaluated runs side by side, with paired intervals on the rows that they share."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from nla_jax.evaluation.estimates import SAMPLES, Estimate
from nla_jax.evaluation.report import read_evaluation
from nla_jax.evaluation.tables import paired, read_ratios


@dataclasses.dataclass(frozen=True)
class Difference:
    """One figure of two runs."""

    suite: str
    table: str
    row: str
    figure: str
    first: Estimate
    """Of the first run, on the rows that both have."""
    other: Estimate
    difference: Estimate
    """Other minus first, documents resampled for both at once."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the difference leaves zero out."""
        return not self.difference.low <= 0 <= self.difference.high


def compare(first: Path, other: Path, *, samples: int = SAMPLES) -> Iterator[Difference]:
    """All figures that two evaluated run directories have in common, on the held-out rows that they share.

    Raises:
      FileNotFoundError: a run that was not evaluated.
      ValueError: runs without a common figure or row.
    """
    evaluations = [read_evaluation(directory) for directory in (first, other)]
    suites = [suite for suite in evaluations[0]["suites"] if suite in evaluations[1]["suites"]]
    found = False
    for suite in suites:
        ours, theirs = (
            read_ratios(directory / "evaluation" / f"{suite}.parquet") for directory in (first, other)
        )
        for key in ours:
            both = paired(ours[key], theirs[key]) if key in theirs else None
            if both is None or min(ratio.denominator_N.sum() for ratio in both) <= 0:
                continue
            a, b = both
            if len(set(a.doc_ids)) < 2:
                continue
            found = True
            estimates = a.estimate(samples=samples), b.estimate(samples=samples), b.over(a, samples=samples)
            yield Difference(suite, *key, *estimates)
    if not found:
        rows = [evaluation["run"].get("held-out rows") for evaluation in evaluations]
        raise ValueError(
            f"{first} and {other} share no figure of the same held-out rows (suites in both: "
            f"{', '.join(suites) or 'none'}; data {rows[0]} and {rows[1]}); evaluate both on the same data with the "
            "same suites"
        )


def rendered(differences: Sequence[Difference], names: tuple[str, str]) -> str:
    """A table for a terminal; a star marks differences whose interval leaves zero out."""
    lines, heading = [], None
    for d in differences:
        if heading != (heading := (d.suite, d.table)):
            lines += ["", f"{d.suite}: {d.table}", f"{'':56} {names[0]:>10.10} {names[1]:>10.10}  difference"]
        name = f"{d.row}: {d.figure}"
        change = d.difference
        lines.append(
            f"{name:56.56} {d.first.value:10.3f} {d.other.value:10.3f}  {change.value:+.3f} "
            f"[{change.low:+.3f}, {change.high:+.3f}]{' *' if d.is_clear else ''}"
        )
    return "\n".join(lines).lstrip("\n")
