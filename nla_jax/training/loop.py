"""The loop around every pure step: it resumes, draws batches, evaluates, saves, and reports metrics and progress."""

import contextlib
import dataclasses
import json
import math
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from nla_jax.process import return_freed_memory, tell, warn
from nla_jax.sharding.mesh import tree_shardings
from nla_jax.sharding.placement import block_on_simulated_devices, place
from nla_jax.training.checkpoint import Checkpoints
from nla_jax.training.guards import GuardConfig, GuardError, Watch
from nla_jax.training.metrics_log import MetricsLog
from nla_jax.training.state import TooManyBadSteps, TrainState, check_bad_steps

States = dict[str, TrainState]
"""The models that a stage trains, by name."""


Metrics = Callable[[], dict[str, float]]
"""A function that waits for the metrics of a dispatched step and returns them."""


Step = Callable[[States, dict[str, np.ndarray], int], tuple[States, Metrics]]
"""(states, batch, index of the step from 0) -> (states, metrics to wait for); the step donates the states.

A batch holds the rows that lie on this process's devices."""


Evaluate = Callable[[States, Mapping[str, float], int], dict[str, float]]
"""(states, highest value of each metric so far, steps made) -> metrics on held-out documents."""


@runtime_checkable
class Memory(Protocol):
    """What a step holds from one call to the next beside the states; it is kept in checkpoints."""

    def saved(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `saved` gave."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Length of a stage, and how often it evaluates and saves."""

    steps: int
    evaluate_every: int
    """Steps between evaluations on held-out documents; the last step is always evaluated."""
    checkpoint_every: int
    """Steps between checkpoints; the last step is always saved."""
    max_bad_steps: int = 5
    """The run stops after this many updates in a row with gradients that are not finite."""
    keep_checkpoints: int = 1
    """Number of newest checkpoints that are kept, beside the best."""


@dataclasses.dataclass(frozen=True)
class Best:
    """The evaluated metric that decides which step of a stage is kept beside the newest ones."""

    metric: str
    lowest: bool = False
    """Whether low values are good, as of a loss."""

    def improves(self, value: float, before: float | None) -> bool:
        """Whether a value is better than the best before it, if there was one; NaN never is."""
        if before is None:
            return not math.isnan(value)
        return value < before if self.lowest else value > before


class _Records:
    """What the evaluations of a stage have reached so far; kept in its checkpoints."""

    def __init__(self, best: Best | None):
        self.best, self.best_value = best, None
        self.highest: dict[str, float] = {}

    def add(self, evaluated: Mapping[str, float]) -> bool:
        """Note an evaluation; whether it is the best so far. Values that are NaN count for nothing."""
        for name, value in evaluated.items():
            if value > self.highest.get(name, -math.inf):
                self.highest[name] = value
        if self.best is None or not self.best.improves(evaluated[self.best.metric], self.best_value):
            return False
        self.best_value = evaluated[self.best.metric]
        return True

    def saved(self) -> dict[str, Any]:
        return {"highest": json.dumps(self.highest), "best": self.best_value}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.highest = json.loads(saved["highest"])
        if self.best is not None:
            # Checkpoints from before the best value was kept apart have it among the highest.
            self.best_value = saved.get("best", self.highest.get(self.best.metric))


class Preempted(RuntimeError):
    """The run was told to stop by SIGTERM; its state is saved."""


class _Preemption(contextlib.AbstractContextManager):
    """Notices SIGTERM, by which machines are taken back, instead of letting it end the process."""

    def __enter__(self):
        self.noticed = False
        # Only the main thread may ask for signals.
        self.listens = threading.current_thread() is threading.main_thread() and jax.process_count() == 1
        if self.listens:
            self.before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_):
        if self.listens:
            signal.signal(signal.SIGTERM, self.before)

    def _notice(self, *_):
        self.noticed = True

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; all processes of a run get the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.noticed


def run_stage(
    stage: str,
    config: LoopConfig,
    *,
    initial: Callable[[], States],
    step: Step,
    batches: grain.DatasetIterator,
    evaluate: Evaluate,
    checkpoints: Checkpoints,
    log: MetricsLog,
    mesh: Mesh,
    shown: tuple[str, ...],
    best: Best | None = None,
    guards: GuardConfig | None = None,
    memory: Memory | None = None,
) -> None:
    """Train until `config.steps`, going on from the last checkpoint if there is one.

    A step is dispatched before the metrics of the one before are read, so that the device never waits for the host.
    A killed run goes on as if it had not been killed: states, batch order, random keys (functions of the step) and
    metrics rows come back exactly.

    Args:
      stage: name in metrics.jsonl and on the progress bar.
      config: length of the stage, and how often it evaluates and saves.
      initial: makes the states; called only if there is no checkpoint.
      step: the training step, see `Step`.
      batches: endless batches; the iterator's state is part of the checkpoint.
      evaluate: computes metrics on held-out documents, see `Evaluate`.
      checkpoints: the stage's checkpoints.
      log: the run's metrics.
      mesh: mesh that states are placed on.
      shown: metrics on the progress bar.
      best: by which evaluation a checkpoint is kept beside the last ones. The states before the first step count: they
        are saved as step 0.
      guards: thresholds of watched metrics, of steps and of evaluations.
      memory: what the step holds beside the states.

    Raises:
      TooManyBadSteps: too many updates in a row had to be refused; the state is saved.
      GuardError: a metric was beyond its last threshold for too long; the state is saved.
      Preempted: SIGTERM came; the state is saved.
    """
    done, records = checkpoints.latest(), _Records(best)

    def save(now: int, pin: bool = False) -> None:
        extra = {"batches": json.dumps(batches.get_state()), **records.saved()}
        if memory is not None:
            extra["memory"] = memory.saved()
        log.flush()
        checkpoints.save(now, states, extra, pin=pin)

    def evaluated(now: int) -> tuple[dict[str, float], bool]:
        """Metrics on held-out documents, and whether they are the best so far."""
        row = evaluate(states, records.highest, now)
        if undefined := sorted(name for name, value in row.items() if math.isnan(value)):
            warn(f"{stage}, step {now}: {', '.join(undefined)} of held-out documents came out as NaN")
        return row, records.add(row)

    if done is None:
        states, done = initial(), 0
        states = place(states, mesh)
        log.cut(stage, -1)
        row, is_best = evaluated(0)
        log.write(stage, 0, row)
        if is_best:
            save(0, pin=True)
        return_freed_memory()
    else:
        states, extra = checkpoints.restore(abstract(initial, mesh), done)
        batches.set_state(json.loads(extra["batches"]))
        records.restore(extra)
        if memory is not None:
            memory.restore(extra["memory"])
        log.cut(stage, done)
    watch, quiet = Watch(guards), jax.process_index() > 0
    with (
        tqdm(
            total=config.steps, initial=done, desc=stage, unit="step", dynamic_ncols=True, disable=quiet
        ) as bar,
        _Preemption() as preemption,
    ):

        def report(now: int, row: dict[str, float]) -> Exception | None:
            """Write a step's metrics and check them; the error to end the stage with, if there is one."""
            log.write(stage, now, row)
            bar.set_postfix({name: f"{row[name]:.3f}" for name in shown if name in row}, refresh=False)
            bar.update()
            try:
                if "bad_steps" in row:
                    check_bad_steps(row, stage, config.max_bad_steps)
                warnings = watch.warnings(row)
            except (TooManyBadSteps, GuardError) as error:
                return type(error)(f"{stage}, step {now}: {error}")
            for warning in warnings:
                warn(f"{stage}, step {now}: {warning}")
            return None

        unread, stop = None, None
        for now in range(done + 1, config.steps + 1):
            states, metrics = step(states, next(batches), now - 1)
            block_on_simulated_devices(states)
            if unread is not None:
                stop = report(now - 1, unread())
            unread = metrics
            last, preempted = now == config.steps, preemption.reached(now)
            is_due, saved = (
                last or now % every == 0 for every in (config.evaluate_every, config.checkpoint_every)
            )
            # A step that was under way when the one before ended the stage is finished like any other.
            if not (is_due or saved or preempted or stop or now == done + 1):
                continue
            row, unread, is_best = metrics(), None, False
            if now == done + 1:
                return_freed_memory()
            if is_due:
                held_out, is_best = evaluated(now)
                row |= held_out
            ended = report(now, row)
            stop = stop or ended
            if saved or is_best or preempted or stop:
                save(now, pin=is_best)
            if stop:
                checkpoints.wait()
                raise type(stop)(f"{stop}. Step {now} is saved.")
            if preempted:
                checkpoints.wait()
                raise Preempted(f"{stage} was told to stop after step {now}, which is saved")
        checkpoints.wait()
        # The signal may have come while the last step was evaluated and saved.
        if preemption.reached(config.steps + 1):
            raise Preempted(f"{stage} was told to stop after its last step, which is saved")


MOST_EPOCHS = 2
"""Epochs from which on a stage is told to have few rows: a verbalizer overfits after about one over 50,000 rows."""


def tell_epochs(stage: str, steps: int, rows: int, batch_size: int) -> None:
    """Print how often a stage passes over its rows, with a warning where that is more than `MOST_EPOCHS`.

    Args:
      stage: the stage's name.
      steps: all its steps, those made already among them.
      rows: rows of its split.
      batch_size: rows of one step.
    """
    epochs = steps * batch_size / rows
    tell(f"{stage}: {steps:,} steps of {batch_size:,} rows are {epochs:.3g} epochs over {rows:,} rows")
    if epochs > MOST_EPOCHS:
        warn(
            f"{stage}: {epochs:.3g} epochs are more than {MOST_EPOCHS}, and models overfit where rows come back often; "
            "give more rows (corpus.max_documents, extraction.positions_per_document), or fewer steps"
        )


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are single numbers, as floats on the host."""
    return {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}


def abstract(initial: Callable[[], Any], mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the tree that `initial` would make, without making it."""
    shapes = jax.eval_shape(initial)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )
