"""The round trip activation -> explanation -> activation, compiled once for batches of a few sizes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.data.batches import evaluation_batches
from nla_jax.lm.packing import budget_for_lengths
from nla_jax.process import progress_bar
from nla_jax.sharding.placement import shard_batch, to_host


class RoundTrip:
    """Compiled verbalizing and reconstructing in batches of one size."""

    def __init__(self, codec: Autoencoder, mesh: Mesh, batch_size: int):
        self.codec, self.mesh, self.batch_size = codec, mesh, batch_size
        verbalizer, T = codec.verbalizer, codec.max_explanation_tokens
        self._sample = jax.jit(
            lambda params, activations_ND, key, temperature: verbalizer.sample(
                params, activations_ND, key, group=1, max_tokens=T, temperature=temperature
            )
        )
        self._reconstruct = jax.jit(codec.reconstructor.__call__, static_argnames="token_budget")

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
        with progress_bar(desc, len(activations_ND), "text") as bar:
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
            lengths_B, token_budget = batch["lengths_B"], None
            if self.mesh.size == 1:
                # Few programs, and little padding.
                token_budget = budget_for_lengths(lengths_B, codec.max_reconstructor_tokens, buckets=4)
            placed = shard_batch((batch["prompts_BT"], lengths_B), self.mesh)
            rebuilt_BD = self._reconstruct(ar_params, *placed, token_budget=token_budget)
            found.append(to_host(rebuilt_BD)[:real])
        return np.concatenate(found)
