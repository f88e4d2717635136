"""A run's NLA, or one in directories of its own, as the subject of an evaluation."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from nla_jax.autoencoder.nla import NLA
from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.splits import SPLITS, check_unseen, hash_fraction, some_rows
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.evaluation.subject import RebuildFn, Subject, check_judges
from nla_jax.evaluation.target_lm import TargetLM
from nla_jax.interop.model_directories import live_tokens
from nla_jax.pipeline.oracle import RunOracle
from nla_jax.pipeline.planted_texts import writer_of_documents
from nla_jax.pipeline.run import Run
from nla_jax.process import return_freed_memory
from nla_jax.randomness import key_for

TRAINING_ROWS = 131_072
"""Training rows that baselines are fitted on; all rows of the AR's warm start where there are no more than that."""


class _RunVerbalizer:
    """An AV of a run as an `ExplainFn`, its weights read when they are first needed."""

    def __init__(self, run: Run, stage: str, step: int | None, held: dict[str, Any]):
        """Remember where the weights are.

        Args:
          run: the AV's.
          stage: the training stage that it is taken from.
          step: of that stage; the best if None.
          held: a cache of one entry that all AVs of the run share, because each is as large as the target.
        """
        self.run, self.stage, self.step, self.held = run, stage, step, held

    def __call__(self, activations_ND, *, temperature=0.0, seed=0, desc=None):
        params, key = self.params(), self._key(seed)
        return self.run.models.round_trip.verbalize(params, activations_ND, key, temperature, desc)

    def tokens(
        self, activations_ND: np.ndarray, *, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        params, key = self.params(), self._key(seed)
        return self.run.models.round_trip.answers(params, activations_ND, key, temperature)

    def _key(self, seed: int) -> jax.Array:
        return jax.random.fold_in(key_for(self.run.config.seed, "evaluate"), seed)

    def params(self) -> Any:
        if self.stage not in self.held:
            self.held.clear()
            return_freed_memory()
            self.held[self.stage] = self.run.models.model_params(self.stage, "av", self.step)
        return self.held[self.stage]


def subject_of(run: Run) -> Subject:
    """A run's NLA before and after joint training, on held-out rows of documents that chose none of its steps.

    Raises:
      FileNotFoundError: no AV was trained yet.
      ValueError: documents that were trained on.
    """
    best = run.best_step()
    stages = {"warm start": ("av_sft", None)}
    if run.config.distill.loop.steps:
        stages["distilled"] = ("distill", None)
    ars = {"judge": ("ar_sft", None)}
    if best is not None:
        stages["after RL"] = ("rl", best)
        ars = {"own": ("rl", best), **ars}
    if run.config.evaluation.second_judge_steps:
        ars["second judge"] = ("second_judge", None)
    data, config = run.held_out(run.config.evaluation.rows), run.config
    trained_on = (
        (split, doc_ids, contexts)
        for split in SPLITS
        if split != "held_out"
        for doc_ids, contexts in run.open(split).scan("doc_id", "detokenized_text_truncated")
    )
    check_unseen(data, trained_on)
    held: dict[str, Any] = {}
    load_target = functools.cache(lambda: target_of(run))
    verbalizers = {name: _RunVerbalizer(run, stage, step, held) for name, (stage, step) in stages.items()}
    return Subject(
        data=data,
        training=some_rows(run.open("ar_sft"), TRAINING_ROWS, config.seed).read(),
        yardstick=run.yardstick,
        verbalizers=verbalizers,
        reconstructors={name: reconstructor_of(run, stage, step) for name, (stage, step) in ars.items()},
        load_target=load_target,
        config=config.evaluation,
        seed=config.seed,
        tokens_of=list(verbalizers.values())[-1].tokens,
        marker=run.models.prompt_ids.injection_char,
        write=writer_of_documents(run, load_target, data.sidecar),
        oracle=RunOracle(run) if config.evaluation.oracle_steps else None,
    )


def subject_of_nla(nla: NLA, data: ActivationDataset, config: EvaluationConfig) -> Subject:
    """An NLA that comes without its run, on data that it was not trained on (which is not checked).

    Args:
      nla: with an AR. Without a training mean it is measured against the mean of half of the documents, and on the
        other half.
      data: held-out rows; `config.rows` of them are taken, in an order that mixes documents.
      config: what is measured.

    Raises:
      ValueError: data of another model, layer or tokenizer, or of too few documents, an NLA without an AR, or a judge
        that is the NLA's own AR.
    """
    if nla.ar_params is None:
        raise ValueError(f"{nla.name} lacks an AR, which an evaluation needs; load it with its AR")
    verbalizer, reconstructor = nla.autoencoder.verbalizer, nla.autoencoder.reconstructor
    data.sidecar.check(
        base_model=nla.target.name,
        layer_index=nla.layer,
        d_model=nla.d_model,
        tokens=live_tokens(verbalizer.prompt, reconstructor.prompt.suffix),
    )
    key = key_for(0, "evaluate")

    def explain(
        activations_ND: np.ndarray, *, temperature: float = 0.0, seed: int = 0, desc: str | None = None
    ) -> list[str | None]:
        sampled = jax.random.fold_in(key, seed)
        return nla.round_trip.verbalize(nla.av_params, activations_ND, sampled, temperature, desc)

    def tokens(activations_ND: np.ndarray, *, temperature: float = 0.0, seed: int = 0) -> list[list[int]]:
        sampled = jax.random.fold_in(key, seed)
        return nla.round_trip.answers(nla.av_params, activations_ND, sampled, temperature)

    def load_target() -> TargetLM:
        lm = nla.load_target(True)
        return TargetLM(lm, lm.config, nla.layer)

    yardstick = nla.yardstick
    if yardstick is None:
        yardstick, data = _measured_on_half(nla, data)
    subject = Subject(
        data=some_rows(data, config.rows, seed=0),
        training=None,
        yardstick=yardstick,
        verbalizers={"checkpoint": explain},
        reconstructors={"own": nla.reconstruct, **nla.judges},
        load_target=functools.cache(load_target),
        config=config,
        tokens_of=tokens,
        marker=verbalizer.prompt.marker_text,
    )
    check_judges(subject)
    return subject


def _measured_on_half(nla: NLA, data: ActivationDataset) -> tuple[Yardstick, ActivationDataset]:
    """The yardstick of one half of the documents, by their hashes, and the rows of the other half."""
    documents = sorted(
        set(data.doc_ids), key=lambda doc: hash_fraction(doc, seed=0, purpose="mean documents")
    )
    if len(documents) < 2:
        raise ValueError(
            f"{nla.name} came without a training mean, and the data is of {len(documents)} document(s): half of the "
            "documents give the mean that the others are measured against; give data of more documents, or measure a "
            "mean with nla.with_yardstick(texts)"
        )
    half = set(documents[: len(documents) // 2])
    in_half_N = np.array([doc in half for doc in data.doc_ids])
    source = f"activations of {len(half)} other documents of the data"
    half_data = data.take(in_half_N)
    yardstick = Yardstick.of(
        half_data.activations, source, places=half_data.extra.get("place"), doc_ids=half_data.doc_ids
    )
    return yardstick, data.take(~in_half_N)


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
