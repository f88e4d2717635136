"""The round trip activation -> explanation -> activation, in batches of a few sizes.

The compiled programs belong to the module: whoever asks for the same models at the same sizes shares them, and a
second call compiles nothing. Shape letters: N rows in all, B rows of a batch, T time, D model.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import Verbalizer
from nla_jax.lm.packing import budget_for_lengths
from nla_jax.lm.prompt_batches import PROMPT_LENGTHS, rounded_up, row_batches
from nla_jax.lm.sampling import Samples
from nla_jax.process import progress_bar
from nla_jax.sharding.placement import shard_batch, to_host

Answers = tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"], np.ndarray]
"""Sampled tokens of a batch, their lengths, and whether they closed."""


@functools.partial(jax.jit, static_argnames=("verbalizer", "max_tokens", "scan"))
def _sample(
    params: Any,
    activations_BD: Array,
    key: Array,
    temperature: Array,
    *,
    verbalizer: Verbalizer,
    max_tokens: int,
    scan: bool,
) -> Samples:
    return verbalizer.sample(
        params, activations_BD, key, group=1, max_tokens=max_tokens, temperature=temperature, scan=scan
    )


@functools.partial(jax.jit, static_argnames=("reconstructor", "token_budget"))
def _reconstruct(
    params: Any,
    prompts_BT: Array,
    lengths_B: Array,
    *,
    reconstructor: Reconstructor,
    token_budget: int | None,
) -> Float[Array, "B D"]:
    return reconstructor(params, prompts_BT, lengths_B, token_budget=token_budget)


class RoundTrip:
    """Explaining and reconstructing with an autoencoder whose parameters come with each call."""

    def __init__(self, autoencoder: Autoencoder, mesh: Mesh, batch_size: int, *, scan: bool = False):
        """Describe batches; nothing is compiled yet.

        Args:
          autoencoder: both models.
          mesh: rows of a batch are split over its data and fsdp axes.
          batch_size: rows of a whole batch.
          scan: sample from stacked blocks without unstacking them, see `Verbalizer.sample`.
        """
        self.autoencoder, self.mesh, self.batch_size, self.scan = autoencoder, mesh, batch_size, scan

    def verbalize(
        self,
        av_params: Any,
        activations_ND: Float[np.ndarray, "N D"],
        key: jax.Array,
        temperature: float,
        desc: str | None = None,
    ) -> list[str | None]:
        """One explanation for each activation, None where extraction failed; `desc` shows a progress bar."""
        batches = self.stream(av_params, activations_ND, key, temperature, desc)
        return [text for batch in batches for text in batch]

    def stream(
        self,
        av_params: Any,
        activations_ND: Float[np.ndarray, "N D"],
        key: jax.Array,
        temperature: float,
        desc: str | None = None,
    ) -> Iterator[list[str | None]]:
        """What `verbalize` returns, a batch at a time, as soon as it is written."""
        for tokens_BT, lengths_B, closed_B in self._answers(
            av_params, activations_ND, key, temperature, desc
        ):
            yield self.autoencoder.decode(tokens_BT, lengths_B, closed_B)

    def answers(
        self, av_params: Any, activations_ND: Float[np.ndarray, "N D"], key: jax.Array, temperature: float
    ) -> list[list[int]]:
        """The sampled tokens of what `verbalize` returns as texts, without what closes them."""
        closing = len(self.autoencoder.verbalizer.prompt.closing)
        return [
            tokens[: max(length - closing, 0)].tolist()
            for tokens_BT, lengths_B, _ in self._answers(av_params, activations_ND, key, temperature, None)
            for tokens, length in zip(tokens_BT, lengths_B, strict=True)
        ]

    def reconstruct(
        self, ar_params: Any, texts: Sequence[str | None], desc: str | None = None
    ) -> Float[np.ndarray, "N D"]:
        """Predicted activations, of meaningless norm; a failed text (None) is read as empty."""
        prompts_NT, lengths_N = self.autoencoder.encode(texts)
        rebuilt = []
        with progress_bar(desc, len(texts), "text") as bar:
            for rows_B, real in self._batches(len(texts)):
                prompts, lengths, token_budget = prompts_NT[rows_B], lengths_N[rows_B], None
                if real < self.batch_size:
                    # A few rows have few programs, by the length of the longest.
                    prompts = prompts[:, : rounded_up(int(lengths.max()), PROMPT_LENGTHS)]
                elif self.mesh.size == 1:
                    # Whole batches are many: padding is left out of them.
                    token_budget = budget_for_lengths(lengths, prompts.shape[1], buckets=4)
                prompts_BT, lengths_B = shard_batch((prompts, lengths), self.mesh)
                rebuilt_BD = _reconstruct(
                    ar_params,
                    prompts_BT,
                    lengths_B,
                    reconstructor=self.autoencoder.reconstructor,
                    token_budget=token_budget,
                )
                rebuilt.append(to_host(rebuilt_BD)[:real])
                bar.update(real)
        return np.concatenate(rebuilt)

    def _answers(
        self,
        av_params: Any,
        activations_ND: Float[np.ndarray, "N D"],
        key: jax.Array,
        temperature: float,
        desc: str | None,
    ) -> Iterator[Answers]:
        """The real rows of every batch; batch i is sampled with fold_in(key, i)."""
        with progress_bar(desc, len(activations_ND), "text") as bar:
            for index, (rows_B, real) in enumerate(self._batches(len(activations_ND))):
                samples = _sample(
                    av_params,
                    shard_batch(activations_ND[rows_B], self.mesh),
                    jax.random.fold_in(key, index),
                    np.float32(temperature),
                    verbalizer=self.autoencoder.verbalizer,
                    max_tokens=self.autoencoder.max_explanation_tokens,
                    scan=self.scan,
                )
                tokens_BT, lengths_B, closed_B = to_host(samples.answers)
                yield tokens_BT[:real], lengths_B[:real], closed_B[:real]
                bar.update(real)

    def _batches(self, count: int) -> Iterator[tuple[Int[np.ndarray, "B"], int]]:
        return row_batches(count, self.batch_size, self.mesh.shape["data"] * self.mesh.shape["fsdp"])


def finite(reader: str, rebuilt_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Return the vectors that an AR rebuilt, after a check that all of them are finite.

    Args:
      reader: names the AR in messages, as in "the AR 'judge'".
      rebuilt_ND: one vector for each text.

    Raises:
      ValueError: NaN or infinity, of which no figure could be made.
    """
    if len(bad := np.flatnonzero(~np.isfinite(rebuilt_ND).all(axis=1))):
        raise ValueError(
            f"{reader} rebuilds NaN or infinity from {len(bad)} of {len(rebuilt_ND)} texts (rows {bad[:5].tolist()}): "
            "its weights are damaged, or overflow in their dtype; copy its files again, or load it in float32"
        )
    return rebuilt_ND
