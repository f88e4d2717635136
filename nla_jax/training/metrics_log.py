"""metrics.jsonl: one JSON object a step, cut back to the checkpoint when a killed run goes on."""

import json
from collections.abc import Mapping
from typing import Any

import jax

from nla_jax.files import AnyPath, GrowingFile, in_bucket


class MetricsLog:
    """Appends the metrics of every stage to one file, and to TensorBoard event files where asked.

    Every row is a pure function of config and step, except for the keys that start with `speed/`. Only the first of
    several processes writes. In a bucket the file is written anew once a minute and on `flush`.

    Raises:
      ValueError: TensorBoard's files would be in a bucket.
      ModuleNotFoundError: TensorBoard files need a package that is not installed.
    """

    def __init__(self, path: AnyPath, *, tensorboard: AnyPath | None = None):
        self.path, self._file = path, GrowingFile(path)
        self.writer = None
        if tensorboard is not None and in_bucket(tensorboard):
            raise ValueError(
                f"tensorboard=True writes files that grow, which {tensorboard} in a bucket cannot hold; leave it out, "
                "and read metrics.jsonl, which has the same numbers"
            )
        if tensorboard is not None and jax.process_index() == 0:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ModuleNotFoundError(
                    "tensorboard=True needs the package tensorboardX: pip install tensorboardX"
                ) from error
            self.writer = SummaryWriter(str(tensorboard))

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows; a last line cut by a kill is left out."""
        self.flush()
        rows = []
        for line in self._file.read().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def cut(self, stage: str, last_step: int) -> None:
        """Drop the rows of `stage` after `last_step`: they will be computed again."""
        if jax.process_index() > 0:
            return
        kept = [row for row in self.rows() if row["stage"] != stage or row["step"] <= last_step]
        self._file.write("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row."""
        if jax.process_index() > 0:
            return
        self._file.append(json.dumps({"stage": stage, "step": step, **metrics}))
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(f"{stage}/{name}", value, step)

    def flush(self) -> None:
        """Make sure that the file holds every row; a run that goes on from a checkpoint writes no earlier row again."""
        self._file.flush()
