"""The round trip activation -> explanation -> activation, compiled for batches of one size."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from nla_jax.autoencoder import metrics
from nla_jax.data.batches import evaluation_batches
from nla_jax.data.explainers.chat import split_name
from nla_jax.lm.packing import token_budget
from nla_jax.mesh import shard_batch, to_host
from nla_jax.training.rl import TextCodec


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated at the end, and how often on the way."""

    suites: tuple[str, ...] = ("reconstruction", "controls")
    """What a run measures at its end; experiments/evaluate.py takes others."""
    rows: int = 256
    """Held-out activations of the final evaluation."""
    monitor_rows: int = 128
    """Held-out activations looked at during training."""
    batch_size: int = 64
    temperature: float = 0.0
    """Temperature of the evaluated explanations; 0 takes the likeliest token."""
    samples: int = 4
    """Explanations an activation where the best of several is looked for."""
    prediction_rows: int = 64
    """Held-out activations of suffix prediction, and those whose claims the target LM checks."""
    task_examples: int = 48
    """Texts of each planted task; as many more teach its linear probe."""
    recurrence_rows: int = 24
    """Contexts whose last ten tokens are explained."""
    rewrite_rows: int = 128
    """Explanations that are rewritten by rules."""
    generated_rows: int = 32
    """Explanations that the target LM rewrites; 0 leaves that out."""
    chat_model: str = ""
    """Answers the prediction tasks and checks claims as well: anthropic:MODEL, openai:MODEL or local:SOURCE; empty does
    without. See data/explainers/chat.py."""
    dictionary: str | None = None
    """A sparse dictionary in safetensors, whose strongest features make a baseline's texts."""
    second_judge_steps: int = 0
    """Steps of another AR's warm start with another seed, which judges beside the first; 0 does without."""
    bootstrap_samples: int = 2000
    examples: int = 20
    """Examples in the report."""

    def __post_init__(self):
        if self.chat_model:
            split_name(self.chat_model)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Means of the training activations: the yardstick of every FVE."""

    mean_D: np.ndarray
    normalized_mean_D: np.ndarray

    @classmethod
    def of(cls, activations_ND: np.ndarray) -> "Moments":
        """Compute both means; the second is not normalized again."""
        return cls(activations_ND.mean(axis=0), np.asarray(metrics.mean_of_normalized(activations_ND)))

    def fve_nrm(
        self, prediction_ND: np.ndarray, texts: Sequence[str | None], activations_ND: np.ndarray
    ) -> float:
        """The figure that training watches; where there is no text, the mean is the prediction."""
        failed_N = np.array([text is None for text in texts])
        filled_ND = metrics.substitute_failed(prediction_ND, failed_N, self.mean_D)
        return float(metrics.fve_nrm(filled_ND, activations_ND, self.normalized_mean_D))


def progress(desc: str | None, total: int, unit: str) -> tqdm:
    """A progress bar that goes when it is full; none without a name, nor in processes but the first."""
    quiet = desc is None or jax.process_index() > 0
    return tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True, leave=False, disable=quiet)


class RoundTrip:
    """Compiled verbalizing and reconstructing in batches of one size."""

    def __init__(self, codec: TextCodec, mesh: Mesh, batch_size: int):
        self.codec, self.mesh, self.batch_size = codec, mesh, batch_size
        verbalizer, T = codec.verbalizer, codec.max_explanation_tokens
        self._sample = jax.jit(
            lambda params, activations_ND, key, temperature: verbalizer.sample(
                params, activations_ND, key, group=1, max_tokens=T, temperature=temperature
            )
        )
        self._reconstruct = jax.jit(codec.reconstructor.__call__, static_argnames="tokens")

    def verbalize(
        self,
        av_params: Any,
        activations_ND: np.ndarray,
        key: jax.Array,
        temperature: float,
        desc: str | None = None,
    ) -> list[str | None]:
        """One explanation for each activation, None where extraction failed; `desc` shows a progress bar."""
        answers = self._answers(av_params, activations_ND, key, temperature, desc)
        return [text for batch in answers for text in self.codec.decode(*batch)]

    def answers(
        self, av_params: Any, activations_ND: np.ndarray, key: jax.Array, temperature: float
    ) -> list[list[int]]:
        """The sampled tokens of what `verbalize` returns as texts, without what closes them."""
        closing = len(self.codec.verbalizer.prompt.closing)
        return [
            tokens[: max(length - closing, 0)].tolist()
            for batch in self._answers(av_params, activations_ND, key, temperature, None)
            for tokens, length in zip(*batch[:2], strict=True)
        ]

    def _answers(self, av_params, activations_ND, key, temperature, desc):
        """Tokens, lengths and whether they closed, a batch at a time."""
        batches = evaluation_batches({"activations_BD": activations_ND}, self.batch_size)
        with progress(desc, len(activations_ND), "text") as bar:
            for index, (batch, real) in enumerate(batches):
                placed = shard_batch(batch["activations_BD"], self.mesh)
                samples = self._sample(
                    av_params, placed, jax.random.fold_in(key, index), np.float32(temperature)
                )
                yield tuple(column[:real] for column in to_host(samples.answers))
                bar.update(real)

    def reconstruct(self, ar_params: Any, texts: Sequence[str | None]) -> np.ndarray:
        """Predicted activations (N, D), of meaningless norm; a failed text is read as empty."""
        codec = self.codec
        rows = codec.encode(np.zeros((len(texts), codec.reconstructor.config.d_model), np.float32), texts)
        found = []
        for batch, real in evaluation_batches(rows, self.batch_size):
            lengths_B, tokens = batch["lengths_B"], None
            if self.mesh.size == 1:
                # Few programs, and little padding.
                tokens = token_budget(lengths_B, codec.max_reconstructor_tokens, buckets=4)
            placed = shard_batch((batch["prompts_BT"], lengths_B), self.mesh)
            found.append(to_host(self._reconstruct(ar_params, *placed, tokens=tokens))[:real])
        return np.concatenate(found)
