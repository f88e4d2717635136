"""Explain the activations of any text with a trained NLA, token by token."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from nla_jax.autoencoder import metrics
from nla_jax.autoencoder.round_trip import RoundTrip
from nla_jax.data.extraction import starts_with_bos
from nla_jax.lm.activations import residual_at
from nla_jax.pipeline.run import Run
from nla_jax.randomness import key_for


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One explanation of one activation."""

    position: int
    """Index of the token in the text."""
    token: str
    explanation: str | None
    """None if the AV never closed its answer."""
    cosine: float
    """Between the activation and what the AR rebuilds from the explanation."""
    fve_nrm: float
    """1 − ‖ĥ_n − h_n‖² / E‖h_n − μ_n‖²: this row's error against the training data's average spread."""


class Explainer:
    """A trained NLA, ready to explain texts: restored from a run's best RL step."""

    def __init__(self, run: Run):
        """Restore AV and AR.

        Raises:
          FileNotFoundError: the run has no RL checkpoint yet.
        """
        checkpoints = run.checkpoints("rl")
        step = checkpoints.pinned() or checkpoints.latest()
        if step is None:
            raise FileNotFoundError(
                f"{run.directory} holds no checkpoint of joint training; run `nla train` first"
            )
        self.run = run
        self.av_params = run.trained_params("rl", "av", step)
        self.ar_params = run.trained_params("rl", "ar", step)
        self.spread = float(
            np.mean(
                metrics.fve_nrm_terms(
                    run.training_activations, run.training_activations, run.moments.normalized_mean_D
                )[1]
            )
        )

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, special tokens added where the model has them.

        Raises:
          ValueError: an empty text.
        """
        tokenizer = self.run.lm.tokenizer
        ids = tokenizer(text)["input_ids"]
        if len(ids) == starts_with_bos(ids, tokenizer):
            raise ValueError("the text is empty; give at least one token to explain")
        return ids

    def explain(
        self,
        text: str,
        positions: Sequence[int] | None = None,
        *,
        samples: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Explanation]:
        """Explain the activations at some positions.

        Args:
          text: any text.
          positions: as in `explained_positions`.
          samples: explanations a position; more than one needs a temperature above 0 to differ.
          temperature: of the AV.
          seed: of its samples.

        Raises:
          ValueError: a position outside the text.
        """
        run, ids = self.run, self.tokens(text)
        positions = explained_positions(ids, run.lm.tokenizer, positions)
        activations_ND = self.activations(ids)[positions].repeat(samples, axis=0)
        # A batch near the number of rows: a single token does not pay for a full evaluation batch.
        ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
        batch = -(-min(len(activations_ND), run.config.evaluation.batch_size) // ways) * ways
        round_trip = RoundTrip(run.codec, run.mesh, batch)
        texts = round_trip.verbalize(self.av_params, activations_ND, key_for(seed, "explain"), temperature)
        rebuilt_ND = round_trip.reconstruct(self.ar_params, texts)
        failed_N = np.array([t is None for t in texts])
        rebuilt_ND = metrics.substitute_failed(rebuilt_ND, failed_N, run.moments.mean_D)
        mse_N = np.asarray(metrics.direction_mse(rebuilt_ND, activations_ND))
        where = np.repeat(positions, samples)
        return [
            Explanation(
                int(p), run.lm.tokenizer.decode([ids[p]]), t, float(1 - e / 2), float(1 - e / self.spread)
            )
            for p, t, e in zip(where, texts, mse_N, strict=True)
        ]

    def activations(self, ids: Sequence[int]) -> np.ndarray:
        """The target's activations (T, D) at every token."""
        run, T = self.run, len(ids)
        compute = jax.jit(
            lambda params, tokens, at: residual_at(
                params, tokens, at, config=run.lm_config, layer=run.config.model.layer, top=0
            )[0]
        )
        return np.asarray(compute(run.target.params, np.array([ids]), np.arange(T)[None]))[0]


def explained_positions(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, asked: Sequence[int] | None = None
) -> list[int]:
    """The token indices to explain, counted from 0 for the first token of `ids`, a BOS included.

    Args:
      ids: of a text, as the tokenizer gives them.
      tokenizer: tells whether the first is a BOS, whose activation says nothing about the text.
      asked: indices; negative ones count from the end. By default all but a BOS.

    Raises:
      ValueError: a position outside the text.
    """
    if asked is None:
        return list(range(starts_with_bos(ids, tokenizer), len(ids)))
    if outside := [p for p in asked if not -len(ids) <= p < len(ids)]:
        raise ValueError(f"positions {outside} are outside the text: it has tokens 0 to {len(ids) - 1}")
    return [p % len(ids) for p in asked]


def as_records(explanations: Sequence[Explanation]) -> list[dict[str, Any]]:
    """Plain dictionaries, for JSON."""
    return [dataclasses.asdict(explanation) for explanation in explanations]
