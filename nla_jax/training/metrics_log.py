"""metrics.jsonl and history.jsonl: what a run measures and writes as it trains, a JSON object a line.

Both are cut back to the checkpoint when a killed run goes on, so that no step is missing or stands there twice.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from nla_jax.files import AnyPath, GrowingFile
from nla_jax.training.trackers import Tracker

HISTORY = "history.jsonl"
"""Beside the metrics: the texts about a few fixed activations, a line for each evaluation of joint training."""


class MetricsLog:
    """Appends the metrics of every stage to one file, watched texts to `HISTORY` beside it, and both to a tracker.

    Every row is a pure function of config and step, except for the keys that start with `speed/`. Only the first of
    several processes writes. In a bucket the files are written anew once a minute and on `flush`.
    """

    def __init__(self, path: AnyPath, *, open_tracker: Callable[[], Tracker | None] = lambda: None):
        """Remember the places; nothing is read, written or opened yet.

        Args:
          path: of the metrics.
          open_tracker: called once, before the first row is written.
        """
        self.path = path
        self._metrics, self._history = GrowingFile(path), GrowingFile(path.parent / HISTORY)
        self._open_tracker = open_tracker

    @functools.cached_property
    def _tracker(self) -> Tracker | None:
        return self._open_tracker()

    def open(self) -> None:
        """Open the tracker now and not at the first row, so that what it refuses is told before anything long."""
        _ = self._tracker

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows of metrics; a last line cut by a kill is left out."""
        return _rows(self._metrics)

    def history(self) -> list[dict[str, Any]]:
        """All complete lines of watched texts: each has `stage`, `step` and `rows`."""
        return _rows(self._history)

    def cut(self, stage: str, last_step: int) -> None:
        """Drop the rows and texts of `stage` after `last_step`: they will be computed again."""
        if jax.process_index() > 0:
            return
        for file in (self._metrics, self._history):
            kept = [row for row in _rows(file) if row["stage"] != stage or row["step"] <= last_step]
            if kept or file.path.exists():
                file.write("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row of metrics."""
        if jax.process_index() > 0:
            return
        self._metrics.append(json.dumps({"stage": stage, "step": step, **metrics}))
        if self._tracker is not None:
            self._tracker.metrics(stage, step, metrics)

    def write_texts(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the texts of one evaluation: for each activation a mapping of what is known about it."""
        if jax.process_index() > 0:
            return
        self._history.append(json.dumps({"stage": stage, "step": step, "rows": list(rows)}))
        if self._tracker is not None:
            self._tracker.texts(stage, step, rows)

    def flush(self) -> None:
        """Make sure that the files hold every row; a run that goes on from a checkpoint writes no earlier row again."""
        self._metrics.flush()
        self._history.flush()

    def close(self) -> None:
        """Let the tracker finish what it writes, if one was opened; the next row opens it again."""
        if (tracker := self.__dict__.pop("_tracker", None)) is not None:
            tracker.close()


def _rows(file: GrowingFile) -> list[dict[str, Any]]:
    file.flush()
    rows = []
    for line in file.read().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
