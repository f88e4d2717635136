"""A run's stages in order: extract, explain, av_sft, ar_sft, distill, rl, evaluate, report.

Each stage reads what the ones before it left in the run directory, goes on where it was killed, and does nothing
when it is done. `nla train` and the scripts in experiments/ are thin covers of `run_stages`.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax

from nla_jax.config import save_config
from nla_jax.pipeline.distill import distill
from nla_jax.pipeline.documents import check_corpus, check_sources_of
from nla_jax.pipeline.evaluate import evaluate, is_evaluated, report
from nla_jax.pipeline.explain import data_is_written, explain
from nla_jax.pipeline.extract import extract
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.train import is_trained, rl
from nla_jax.pipeline.warm_starts import ar_sft, av_sft
from nla_jax.pipeline.watched_tasks import chosen_tasks
from nla_jax.sharding.placement import wait_for_all
from nla_jax.training.trackers import check_tracker


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run. The config fields that its result depends on are in `digests.STAGE_FIELDS`."""

    name: str
    run: Callable[[Run], None]
    """Computes what is missing of its result."""
    is_done: Callable[[Run], bool]
    """Whether its result is there; ValueError where it is there, but of another config."""


STAGES = (
    Stage("extract", extract, data_is_written),
    Stage("explain", explain, data_is_written),
    Stage("av_sft", av_sft, functools.partial(is_trained, stage="av_sft")),
    Stage("ar_sft", ar_sft, functools.partial(is_trained, stage="ar_sft")),
    Stage("distill", distill, lambda run: not run.config.distill.loop.steps or is_trained(run, "distill")),
    Stage("rl", rl, functools.partial(is_trained, stage="rl")),
    Stage("evaluate", evaluate, is_evaluated),
    # The report is made again each time: it is fast, and shows what a run has so far.
    Stage("report", report, lambda run: False),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def run_stages(run: Run, names: Sequence[str] = STAGE_NAMES) -> None:
    """Run stages in order, skipping what is done and noting how long each took.

    Raises:
      ValueError: the directory holds results of another config, or of a corpus that has changed since; nothing in it is
        touched then. Or a tracker that cannot write there, or tasks to watch that there are not.
      ModuleNotFoundError: the package of the tracker, or of a source of the corpus, is not installed.
    """
    check_tracker(run.config.tracker, run.directory)
    check_sources_of(run)
    chosen_tasks(run)
    for stage in STAGES:
        stage.is_done(run)
    if data_is_written(run):
        check_corpus(run)
    run.directory.mkdir(parents=True, exist_ok=True)
    wait_for_all("checked")
    if jax.process_index() == 0:
        save_config(run.config, run.directory / "config.json")
    chosen = [stage for stage in STAGES if stage.name in names]
    # A tracker shows what has steps.
    trained = [stage for stage in chosen if hasattr(getattr(run.config, stage.name, None), "loop")]
    if not all(stage.is_done(run) for stage in trained):
        run.log.open()
    with contextlib.closing(run.log):
        for stage in chosen:
            if not stage.is_done(run):
                _run_timed(run, stage)


def _run_timed(run: Run, stage: Stage) -> None:
    started = time.perf_counter()
    # Attention kernels are split over the devices of the mesh that is set.
    with jax.set_mesh(run.mesh) if run.mesh.size > 1 else contextlib.nullcontext():
        stage.run(run)
    timings = run.timings()
    timings[stage.name] = timings.get(stage.name, 0.0) + time.perf_counter() - started
    run.write_json("timings.json", timings)
    wait_for_all(stage.name)
