"""A run's NLA, or one in directories of its own, as the subject of an evaluation."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.splits import SPLITS, check_unseen
from nla_jax.evaluation.subject import RebuildFn, Subject, check_judges
from nla_jax.evaluation.target_lm import TargetLM
from nla_jax.pipeline.run import Run
from nla_jax.process import return_freed_memory
from nla_jax.randomness import key_for


class _RunVerbalizer:
    """An AV of a run, its weights read when they are first needed."""

    def __init__(self, run: Run, stage: str, step: int | None, held: dict[str, Any]):
        """Take where the weights are, and what the run's AVs hold their weights in: one at a time."""
        self.run, self.stage, self.step, self.held = run, stage, step, held

    def __call__(self, activations_ND, *, temperature=0.0, seed=0, desc=None):
        params, key = self.params(), jax.random.fold_in(key_for(self.run.config.seed, "evaluate"), seed)
        return self.run.models.round_trip.verbalize(params, activations_ND, key, temperature, desc)

    def tokens(self, activations_ND: np.ndarray) -> list[list[int]]:
        key = key_for(self.run.config.seed, "evaluate")
        return self.run.models.round_trip.answers(self.params(), activations_ND, key, 0.0)

    def params(self) -> Any:
        if self.stage not in self.held:
            # An AV is as large as the target.
            self.held.clear()
            return_freed_memory()
            self.held[self.stage] = self.run.models.model_params(self.stage, "av", self.step)
        return self.held[self.stage]


def subject_of(run: Run) -> Subject:
    """A run's NLA before and after joint training, on its held-out rows.

    Raises:
      FileNotFoundError: no AV was trained yet.
      ValueError: documents that were trained on.
    """
    best = run.best_step()
    stages = {"warm start": ("av_sft", None)}
    ars = {"judge": ("ar_sft", None)}
    if best is not None:
        stages["after RL"] = ("rl", best)
        ars = {"own": ("rl", best), **ars}
    if run.checkpoints("second_judge").latest() is not None:
        ars["second judge"] = ("second_judge", None)
    data, config = run.held_out(run.config.evaluation.rows), run.config
    check_unseen(data, {split: run.data(split) for split in SPLITS if split != "held_out"})
    held: dict[str, Any] = {}
    verbalizers = {name: _RunVerbalizer(run, *where, held) for name, where in stages.items()}
    return Subject(
        data,
        run.data("ar_sft"),
        run.yardstick,
        verbalizers,
        {name: reconstructor_of(run, *where) for name, where in ars.items()},
        functools.cache(lambda: target_of(run)),
        config.evaluation,
        config.seed,
        list(verbalizers.values())[-1].tokens,
        run.models.prompt_ids.injection_char,
    )


def subject_of_checkpoint(
    run: Run, data: ActivationDataset, *, judge: RebuildFn | None = None, rows: int = 256
) -> Subject:
    """An AV and an AR that come without their run, on data that they were not trained on (which is not checked).

    Args:
      run: reads the checkpoint (`interop.runs.CheckpointRun`).
      data: held-out rows; its first `rows` are taken.
      judge: an AR that never saw the AV's texts.
      rows: at most.

    Raises:
      ValueError: a judge that is the AV's own AR.
    """
    own = _RunVerbalizer(run, "rl", 1, {})
    reconstructors = {"own": reconstructor_of(run, "rl", 1)} | ({"judge": judge} if judge else {})
    subject = Subject(
        data.take(slice(0, rows)),
        None,
        run.yardstick,
        {"checkpoint": own},
        reconstructors,
        functools.cache(lambda: target_of(run)),
        run.config.evaluation,
        run.config.seed,
        own.tokens,
        run.models.prompt_ids.injection_char,
    )
    check_judges(subject)
    return subject


def target_of(run: Run) -> TargetLM:
    """The target LM of a run, for reading and judging texts."""
    try:
        params = run.models.in_configured_form(run.models.target.params, stacked=True)
    except ValueError:  # blocks that differ in more than their numbers cannot be stacked
        params = run.models.target.params
    lm = dataclasses.replace(run.models.target, params=params)
    run.models.release_target()
    return TargetLM(lm, run.models.lm_config, run.config.model.layer)


def reconstructor_of(run: Run, stage: str = "rl", step: int | None = None) -> RebuildFn:
    """The AR of a run, its weights read when they are first needed."""
    params = functools.cache(lambda: run.models.model_params(stage, "ar", step))
    return lambda texts: run.models.round_trip.reconstruct(params(), texts)
