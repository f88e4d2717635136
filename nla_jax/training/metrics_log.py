"""metrics.jsonl: one JSON object a step, cut back to the checkpoint when a killed run goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from nla_jax.files import write_atomically


class MetricsLog:
    """Appends the metrics of every stage to one file, and to TensorBoard event files where asked.

    Every row is a pure function of config and step, except for the keys that start with `speed/`. Only the first of
    several processes writes.
    """

    def __init__(self, path: Path, *, tensorboard: Path | None = None):
        self.path = path
        self.writer = None
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
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
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
        with write_atomically(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row."""
        if jax.process_index() > 0:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(f"{stage}/{name}", value, step)
