"""The loop around every pure step: resume, batches, evaluation, checkpoints, metrics, progress."""

import ctypes
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from nla_jax.mesh import tree_shardings
from nla_jax.training.checkpoint import Checkpoints
from nla_jax.training.metrics_log import MetricsLog
from nla_jax.training.state import TrainState, check_bad_steps

States = dict[str, TrainState]
"""The models that a stage trains, by name."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Length and rhythm of a stage."""

    steps: int
    evaluate_every: int
    """Steps between evaluations on held-out documents; the last step is always evaluated."""
    checkpoint_every: int
    """Steps between checkpoints; the last step is always saved."""
    max_bad_steps: int = 5
    """Updates in a row with gradients that are not finite before the run stops."""


def run_stage(
    stage: str,
    config: LoopConfig,
    *,
    initial: Callable[[], States],
    step: Callable[[States, dict[str, np.ndarray], int], tuple[States, dict[str, Any]]],
    batches: grain.DatasetIterator,
    evaluate: Callable[[States], dict[str, float]],
    checkpoints: Checkpoints,
    log: MetricsLog,
    mesh: Mesh,
    shown: tuple[str, ...],
    best: str | None = None,
) -> None:
    """Train until `config.steps`, going on from the last checkpoint if there is one.

    What follows a kill is what would have followed without it: states, batch order, random keys (functions of
    the step) and metrics rows come back exactly.

    Args:
      stage: name in metrics.jsonl and on the progress bar.
      config: length and rhythm.
      initial: makes the states; called only when nothing is there to resume.
      step: (states, batch, index of the step from 0) -> (states, metrics); donates the states.
      batches: endless; its state is part of the checkpoint.
      evaluate: metrics on held-out documents.
      checkpoints: where states go.
      log: where metrics go.
      mesh: where states live.
      shown: metrics on the progress bar.
      best: evaluated metric whose highest checkpoint is kept besides the last ones.
    """
    done = checkpoints.latest()
    top = -np.inf
    if done is None:
        states, done = initial(), 0
        states = jax.device_put(states, tree_shardings(states, mesh))
        log.cut(stage, -1)
        log.write(stage, 0, evaluate(states))
        return_freed_memory()
    else:
        states, extra = checkpoints.restore(abstract(initial, mesh), done)
        batches.set_state(json.loads(extra["batches"]))
        top = extra["best"]
        log.cut(stage, done)
    with tqdm(total=config.steps, initial=done, desc=stage, unit="step", dynamic_ncols=True) as bar:
        for index in range(done, config.steps):
            started = time.perf_counter()
            states, metrics = step(states, next(batches), index)
            row = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
            check_bad_steps(row, stage, config.max_bad_steps)
            row["speed/seconds"] = time.perf_counter() - started
            if index == done:
                return_freed_memory()
            now, last = index + 1, index + 1 == config.steps
            is_best = False
            if last or now % config.evaluate_every == 0:
                row |= evaluate(states)
                is_best = best is not None and row[best] > top
                top = max(top, row[best]) if best is not None else top
            log.write(stage, now, row)
            bar.set_postfix({name: f"{row[name]:.3f}" for name in shown if name in row}, refresh=False)
            bar.update()
            if last or is_best or now % config.checkpoint_every == 0:
                checkpoints.save(
                    now, states, {"batches": json.dumps(batches.get_state()), "best": float(top)}
                )
                if is_best:
                    checkpoints.pin(now)


def return_freed_memory() -> None:
    """Hand freed memory back to the system: glibc keeps the gigabytes that compiling a step takes and frees."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def abstract(initial: Callable[[], Any], mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of what `initial` would make, without making it."""
    shapes = jax.eval_shape(initial)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )
