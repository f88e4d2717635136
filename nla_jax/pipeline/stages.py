"""A run's stages in order: extract, explain, av_sft, ar_sft, rl, evaluate, report.

Each stage reads what the ones before it left in the run directory, goes on where it was killed, and does nothing
when it is done. The scripts in experiments/ are thin covers of `run_stages`.
"""

import contextlib
import json
import time

import jax

from nla_jax.config import STAGES, save_config, stage_digest
from nla_jax.pipeline.evaluate import evaluate, evaluation_digest, report
from nla_jax.pipeline.make_data import explain, extract
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.train import ar_sft, av_sft, rl
from nla_jax.sharding.placement import wait_for_all

_FUNCTIONS = {
    function.__name__: function for function in (extract, explain, av_sft, ar_sft, rl, evaluate, report)
}


def run_stages(run: Run, stages: tuple[str, ...] = tuple(STAGES)) -> None:
    """Run stages in order, skipping what is done and noting how long each took.

    Raises:
      ValueError: the directory holds results of another config; nothing in it is touched then.
    """
    for stage in STAGES:
        is_done(run, stage)
    run.directory.mkdir(parents=True, exist_ok=True)
    wait_for_all("checked")
    if jax.process_index() == 0:
        save_config(run.config, run.directory / "config.json")
    for stage in stages:
        if is_done(run, stage):
            continue
        started = time.perf_counter()
        # Attention kernels are split over the devices of the mesh that is set.
        with jax.set_mesh(run.mesh) if run.mesh.size > 1 else contextlib.nullcontext():
            _FUNCTIONS[stage](run)
        timings = run.timings()
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - started
        run.write_json("timings.json", timings)
        wait_for_all(stage)


def is_done(run: Run, stage: str) -> bool:
    """Whether a stage's result is there.

    Raises:
      ValueError: it is there, but of another config.
    """
    if stage in ("extract", "explain"):
        digest = stage_digest(run.config, "explain")
        return all([run.is_written(path, digest) for path in run.split_paths().values()])
    if stage in ("ar_sft", "av_sft", "rl"):
        return (run.checkpoints(stage).latest() or 0) >= getattr(run.config, stage).loop.steps
    path = run.directory / "evaluation.json"
    if stage == "evaluate" and path.exists():
        return json.loads(path.read_text())["digest"] == evaluation_digest(run)
    return False
