"""Best-of-n distillation: before joint training the AV is fine-tuned on the best of its own explanations.

The AR chooses them, so this is one large and cheap step of the policy that joint training takes in small ones.
"""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Float

from nla_jax.autoencoder.metrics import direction_mse
from nla_jax.config import DistillConfig
from nla_jax.data.manifest import Manifest
from nla_jax.data.splits import some_rows
from nla_jax.data.stage_texts import holds_a_tag
from nla_jax.data.store import StoredDataset, open_dataset
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.explain import write_rows
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.warm_start_rows import closed_answers
from nla_jax.pipeline.warm_starts import WarmStart, continued
from nla_jax.process import tell
from nla_jax.randomness import key_for
from nla_jax.sharding.placement import wait_for_all
from nla_jax.training.loop import Best
from nla_jax.training.supervised import VerbalizerBatch, av_sft_step, jit_step

ROWS_AT_A_TIME = 1024
"""Activations that are explained before the best of their texts are written to disk."""


def distill(run: Run) -> None:
    """Fine-tune the warm-start AV on the best of its explanations; its best step by the judge is RL's start."""
    config, codec = run.config.distill, run.models.autoencoder
    optimizer, monitor = config.optimizer.build(), run.monitored(run.config.evaluation.monitor_rows)
    run.models.release_target()
    first = [continued(run, "av", "av_sft", optimizer)]
    rows = closed_answers(codec, best_explanations(run), config.batch_size, "distill")

    def evaluate(states, highest, steps_made):
        models, key = run.models, key_for(run.config.seed, "monitor")
        params = models.with_base("av", states["av"].params)
        texts = models.round_trip.verbalize(
            params, monitor.activations, key, run.config.evaluation.temperature
        )
        rebuilt_ND = models.round_trip.reconstruct(models.warm_start_params("ar"), texts)
        return {"judge_fve_nrm": run.yardstick.fve_nrm(rebuilt_ND, texts, monitor.activations)}

    WarmStart(
        run=run,
        stage="distill",
        model="av",
        config=config,
        optimizer=optimizer,
        initial=first.pop,
        step=jit_step(
            av_sft_step,
            verbalizer=codec.verbalizer,
            optimizer=optimizer,
            micro_batches=config.micro_batches,
        ),
        batch_type=VerbalizerBatch,
        rows=rows,
        max_length=codec.max_explanation_tokens,
        forward_flops=functools.partial(
            codec.verbalizer.forward_flops, activations=config.batch_size, answers=config.batch_size
        ),
        evaluate=evaluate,
        best=Best("judge_fve_nrm"),
        shown=("loss", "judge_fve_nrm"),
        seed=run.config.seed,
    ).train()


def best_explanations(run: Run) -> StoredDataset:
    """Activations with the best of the warm-start AV's explanations of each, which are kept in data/distilled.

    Activations of which no explanation came to its end are left out.

    Raises:
      ValueError: none did, of all activations.
    """
    config, folder = run.config.distill, run.directory / "data" / "distilled"
    if not run.is_complete(folder, stage_digest(run.config, "distill")):
        data = some_rows(run.open(config.split), config.rows, run.config.seed)
        for number, start in enumerate(range(0, len(data), ROWS_AT_A_TIME)):
            _write_best(run, config, data.take(slice(start, start + ROWS_AT_A_TIME)), number)
        if jax.process_index() == 0:
            Manifest.of(folder).save(folder)
        wait_for_all("distilled")
    distilled = open_dataset(folder)
    if not len(distilled):
        raise ValueError(
            f"distill: none of the AV's explanations came to its end within max_explanation_tokens="
            f"{run.config.max_explanation_tokens}; train the AV's warm start for longer (av_sft.loop.steps), raise the "
            "limit, or set --distill.loop.steps 0 to do without"
        )
    return distilled


def _write_best(run: Run, config: DistillConfig, data: StoredDataset, number: int) -> None:
    """Write a shard of the best explanations, if it is not there."""
    path = run.directory / "data" / "distilled" / f"distilled-{number:05d}.parquet"
    if run.is_written(path, stage_digest(run.config, "distill")):
        return
    part, models = data.read(), run.models
    activations_BD = np.repeat(part.activations, config.samples, axis=0)
    key = key_for(run.config.seed, f"distill {number}")
    texts = models.round_trip.verbalize(
        models.model_params("av_sft", "av"), activations_BD, key, 1.0, desc="sample"
    )
    rebuilt_BD = models.round_trip.reconstruct(models.warm_start_params("ar"), texts, desc="score")
    # A text with a tag in it cannot be stored, and is no better than one that did not end.
    failed_B = np.array([text is None or holds_a_tag(text) for text in texts])
    mse_B = np.where(failed_B, np.inf, np.asarray(direction_mse(rebuilt_BD, activations_BD)))
    best_N, kept_N = best_of(mse_B.reshape(-1, config.samples))
    if kept_N.any():
        tell(
            f"distill: the best of {config.samples} explanations have a mean error of "
            f"{mse_B[best_N[kept_N]].mean():.3f}, all that ended {mse_B[~failed_B].mean():.3f}"
        )
    chosen = dataclasses.replace(part, explanations=[texts[i] or "" for i in best_N]).take(kept_N)
    write_rows(run, path, chosen, stage="av_sft", digest_of="distill")


def best_of(mse_NS: Float[np.ndarray, "N S"]) -> tuple[np.ndarray, np.ndarray]:
    """The number of each row's least error among all N * S, and whether there is one that is finite."""
    best_N = mse_NS.argmin(axis=1)
    rows = np.arange(len(mse_NS))
    return rows * mse_NS.shape[1] + best_N, np.isfinite(mse_NS[rows, best_N])
