"""Trackers show the metrics of a run and its watched texts as it trains: TensorBoard, Weights & Biases or trackio.

Each is a package of its own, imported when a run that asks for it begins to train. Settings of the services, such as
keys, spaces and offline modes, are those of the packages: their environment variables hold.
"""

import importlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax

from nla_jax.files import AnyPath, in_bucket, write_json

TrackerName = Literal["", "tensorboard", "wandb", "trackio"]
TRACKERS: tuple[str, ...] = get_args(TrackerName)
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
"""Tracker -> the package that it needs."""
PROJECT = "nla_jax"
"""The project that runs belong to in Weights & Biases, unless WANDB_PROJECT names another, and in trackio."""


@runtime_checkable
class Tracker(Protocol):
    """Where metrics and texts are shown while a run trains."""

    def metrics(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Show one row of metrics."""

    def texts(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show texts about fixed activations, a table line each."""

    def close(self) -> None:
        """Write what is still in memory; nothing is shown after that."""


def check_tracker(name: str, directory: AnyPath) -> None:
    """Check that a run in this directory can be shown by a tracker.

    Raises:
      ValueError: there is no such tracker, or its files would be in a bucket.
      ModuleNotFoundError: its package is not installed.
    """
    if name not in TRACKERS:
        known = ", ".join(TRACKERS[1:])
        raise ValueError(f"tracker is {name!r}; expected one of {known}, or an empty text for none")
    if not name:
        return
    if name == "tensorboard" and in_bucket(directory):
        raise ValueError(
            f"tracker=tensorboard writes files that grow, which {directory} in a bucket cannot hold; choose another "
            "tracker (wandb, trackio), or none and read metrics.jsonl, which has the same numbers"
        )
    package = PACKAGES[name]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"tracker={name} needs the package {package}: pip install {package}", name=package
        ) from error


def open_tracker(name: str, directory: AnyPath, run_name: str, settings: Mapping[str, Any]) -> Tracker | None:
    """Begin to show a run, or go on with it where the directory was shown before.

    Args:
      name: one of `TRACKERS`.
      directory: the run's. Its identity is kept there, in tracker.json.
      run_name: what the run is called.
      settings: the config of the run, as nested dictionaries.

    Returns:
      The tracker; None where none is asked for, and in all processes of a run but the first.

    Raises:
      ValueError, ModuleNotFoundError: as `check_tracker`.
      RuntimeError: the service refuses, for instance because nobody is logged in.
    """
    check_tracker(name, directory)
    if not name or jax.process_index() > 0:
        return None
    if name == "tensorboard":
        return _TensorBoard(directory / "tensorboard")
    opened = {"wandb": _WeightsAndBiases, "trackio": _Trackio}[name]
    return opened(directory, run_name, _identity(directory), dict(settings))


def _identity(directory: AnyPath) -> str:
    """What tells this run from others of its name; a run that goes on has the one that it began with."""
    path = directory / "tracker.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:8]})
    return json.loads(path.read_text())["id"]


class _TensorBoard:
    """Event files in the run's directory."""

    def __init__(self, directory: AnyPath):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(directory))

    def metrics(self, stage, step, metrics):
        for name, value in metrics.items():
            self.writer.add_scalar(f"{stage}/{name}", value, step)

    def texts(self, stage, step, rows):
        self.writer.add_text(f"{stage}/texts", markdown_table(rows), step)

    def close(self):
        self.writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases. Each stage counts its own steps, so that a run that goes on may repeat some."""

    def __init__(self, directory: AnyPath, name: str, identity: str, settings: dict[str, Any]):
        import wandb

        self.wandb, self.stages = wandb, set()
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=name,
                id=identity,
                resume="allow",
                config=settings,
                dir=None if in_bucket(directory) else str(directory),
            )
        except wandb.Error as error:
            raise RuntimeError(
                f"Weights & Biases refuses: {error} Log in with `wandb login`, set WANDB_MODE=offline, or choose "
                "another tracker"
            ) from error

    def _log(self, stage, step, values):
        if stage not in self.stages:
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self.stages.add(stage)
        self.run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def metrics(self, stage, step, metrics):
        self._log(stage, step, metrics)

    def texts(self, stage, step, rows):
        columns, lines = _cells(rows)
        self._log(stage, step, {"texts": self.wandb.Table(columns=columns, data=lines)})

    def close(self):
        self.run.finish()


class _Trackio:
    """A run of trackio, kept on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another place."""

    def __init__(self, directory: AnyPath, name: str, identity: str, settings: dict[str, Any]):
        import trackio

        self.trackio = trackio
        self.run = trackio.init(
            project=PROJECT, name=f"{name}-{identity}", resume="allow", config=settings, embed=False
        )

    def metrics(self, stage, step, metrics):
        self.run.log({f"{stage}/{name}": value for name, value in metrics.items()}, step)

    def texts(self, stage, step, rows):
        self.run.log({f"{stage}/texts": self.trackio.Markdown(markdown_table(rows))}, step)

    def close(self):
        self.run.finish()


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """The names of the columns of a table, and its lines."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return columns, [[row.get(name) for name in columns] for row in rows]


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table in Markdown; line breaks and bars in cells are written so that they stay in their cell."""
    columns, lines = _cells(rows)
    written = [
        [
            "–" if value is None else f"{value:.3f}" if isinstance(value, float) else _cell(value)
            for value in line
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *written])


def _cell(value: Any) -> str:
    escaped = str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return escaped.replace("\n", "<br>")
