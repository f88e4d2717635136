"""The rows that the warm starts train on: which texts, and what is said of those that are too long.

Texts are tokenized batch by batch, so that a process holds no split. Before a stage begins they are gone through once
for what is said of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.prompts import encode_reconstructor, encode_responses
from nla_jax.data.batches import Rows, cut_texts, place_weights, reconstructor_rows
from nla_jax.data.manifest import Manifest
from nla_jax.data.splits import hash_fraction
from nla_jax.data.stage_texts import holds_a_tag
from nla_jax.data.store import WINDOW_ROWS, StoredDataset, open_dataset
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.explain import write_rows
from nla_jax.pipeline.run import Run
from nla_jax.process import warn
from nla_jax.randomness import key_for
from nla_jax.sharding.placement import wait_for_all

LOOKED_AT = 16_384
"""Texts that are looked at to tell how many the AR does not read to their ends."""
VERBALIZED_ROWS = 4096
"""Rows that the AV verbalizes before their texts are written to disk."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """A `RowSource` of the AV's training rows."""

    codec: Autoencoder
    data: StoredDataset

    def __len__(self) -> int:
        return len(self.data)

    def chunk_sizes(self) -> Int[np.ndarray, "G"]:
        """See `RowSource`."""
        return self.data.chunk_sizes()

    def batch(self, index_B: Int[np.ndarray, "B"]) -> Rows:
        """Columns of a `VerbalizerBatch`."""
        tokenizer, prompt = self.codec.tokenizer, self.codec.verbalizer.prompt
        texts, limit = self.data.explanations(index_B), self.codec.max_explanation_tokens
        responses_BT, lengths_B = encode_responses(tokenizer, prompt, texts, limit)
        activations_BD = self.data.activations(index_B)
        return {"activations_BD": activations_BD, "responses_BT": responses_BT, "lengths_B": lengths_B}


def closed_answers(
    codec: Autoencoder, data: StoredDataset, batch_size: int, stage: str = "av_sft"
) -> Answers:
    """The AV's training rows. A text that would be cut is left out: it would teach the AV not to close.

    Raises:
      ValueError: the texts that fit do not fill a batch.
    """
    limit = codec.max_explanation_tokens
    encode = functools.partial(encode_responses, codec.tokenizer, codec.verbalizer.prompt)
    cut_N = np.concatenate([_are_cut(texts, limit, encode) for (texts,) in data.scan("explanation")])
    if not cut_N.any():
        return Answers(codec, data)
    share = (
        f"{cut_N.sum()} of {len(cut_N)} texts ({cut_N.mean():.1%}) have more tokens, with their closing, than"
    )
    if (~cut_N).sum() < batch_size:
        raise ValueError(
            f"{stage}: {share} max_explanation_tokens={limit}, and the others do not fill a batch of {batch_size}; "
            "raise max_explanation_tokens, or have shorter texts written (writer)"
        )
    warn(
        f"{stage}: {share} max_explanation_tokens={limit}. The AV is not trained on them: cut, they would teach it not "
        "to close its answers. Raise max_explanation_tokens to keep them"
    )
    return Answers(codec, data.take(~cut_N))


@dataclasses.dataclass(frozen=True)
class MixedTexts:
    """Texts of rows, of which some are the writer's and others are the AV's."""

    data: StoredDataset
    """The rows with the writer's texts."""
    verbalized: StoredDataset | None
    """Texts of the AV about some of the rows; None where there are none."""
    row_M: Int[np.ndarray, "M"]
    """For each text the row that it is about, in order."""
    verbalized_M: Int[np.ndarray, "M"]
    """For each text its number in `verbalized`, -1 where it is the writer's."""

    @classmethod
    def written(cls, data: StoredDataset) -> "MixedTexts":
        """The writer's text of each row alone."""
        return cls(data, None, np.arange(len(data)), np.full(len(data), -1))

    def __len__(self) -> int:
        return len(self.row_M)

    def chunk_sizes(self) -> Int[np.ndarray, "G"]:
        """See `RowSource`."""
        ends_G = np.searchsorted(self.row_M, np.cumsum(self.data.chunk_sizes()))
        return np.diff(ends_G, prepend=0)

    def texts(self, index_B: Int[np.ndarray, "B"]) -> list[str]:
        """Some of the texts."""
        texts, verbalized_B = self.data.explanations(self.row_M[index_B]), self.verbalized_M[index_B]
        written = np.flatnonzero(verbalized_B >= 0)
        if len(written):
            own = self.verbalized.explanations(verbalized_B[written])
            for place, text in zip(written, own, strict=True):
                texts[place] = text
        return texts


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A `RowSource` of the AR's training rows."""

    codec: Autoencoder
    mixed: MixedTexts
    weights_N: Float[np.ndarray, "N"] | None = None
    """How much each row of the data counts, see `place_weights`; None for all alike."""
    cut: tuple[int, int] | None = None
    """Fewest and most tokens of a text that are read, see `ReconstructorWarmStartConfig`."""
    seed: int = 0
    """Decides where each text is cut."""

    def __len__(self) -> int:
        return len(self.mixed)

    def chunk_sizes(self) -> Int[np.ndarray, "G"]:
        """See `RowSource`."""
        return self.mixed.chunk_sizes()

    def batch(self, index_B: Int[np.ndarray, "B"]) -> Rows:
        """Columns of a `ReconstructorBatch`."""
        rows_B, texts = self.mixed.row_M[index_B], self.mixed.texts(index_B)
        if self.cut is not None:
            texts = cut_texts(self.codec.tokenizer, texts, self._tokens(index_B))
        weights_B = None if self.weights_N is None else self.weights_N[rows_B]
        return reconstructor_rows(self.codec, self.mixed.data.activations(rows_B), texts, weights_B)

    def _tokens(self, index_B: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
        """How many tokens are left of each text: a hash of its number, so that no order and no epoch changes it."""
        fewest, most = self.cut
        draws = [hash_fraction(str(index), seed=self.seed, purpose="cut") for index in index_B.tolist()]
        return fewest + (np.array(draws) * (most + 1 - fewest)).astype(int)


def reconstructor_prompts(codec: Autoencoder, mixed: MixedTexts, stage: str, **options: Any) -> Prompts:
    """The AR's training rows, with a warning where texts lose their ends; of many, the first are looked at.

    Args:
      codec: what encodes the texts.
      mixed: the texts.
      stage: the name of the stage, for the warning.
      options: further fields of `Prompts`.
    """
    limit, count = codec.max_reconstructor_tokens, min(len(mixed), LOOKED_AT)
    encode = functools.partial(encode_reconstructor, codec.tokenizer, codec.reconstructor.prompt)
    cut_N = _are_cut(mixed.texts(np.arange(count)), limit, encode)
    if cut_N.any():
        warn(
            f"{stage}: {cut_N.sum()} of {len(cut_N)} texts ({cut_N.mean():.1%}) have more tokens than "
            f"max_reconstructor_tokens={limit}. The AR does not read their ends; raise max_reconstructor_tokens"
        )
    return Prompts(codec, mixed, **options)


def balanced(run: Run, data: StoredDataset, stage: str) -> Float[np.ndarray, "N"]:
    """The weights of rows by their places, with a warning where all are alike because no places are known."""
    weights_N = place_weights(data, run.yardstick)
    if not run.yardstick.places:
        warn(
            f"{stage}.balance_places weighs nothing: the yardstick of this run knows no places, because its data were "
            "made by an earlier version or elsewhere, or because no place has enough rows. Extract the data again in "
            "another run directory to have places"
        )
    return weights_N


def _are_cut(texts: Sequence[str], limit: int, encode: Callable) -> np.ndarray:
    """Which texts are cut to `limit` tokens. Those that fill it are encoded again, with room for one token more."""
    are_cut_N = encode(texts, limit)[1] == limit
    if are_cut_N.any():
        _, longer = encode([texts[i] for i in np.flatnonzero(are_cut_N)], limit + 1)
        are_cut_N[are_cut_N] = longer > limit
    return are_cut_N


def partly_verbalized(run: Run, data: StoredDataset, share: float, samples: int = 1) -> MixedTexts:
    """The rows' writer's texts, a share of them replaced by what the warm-start AV writes at temperature 1.

    The AV's texts are kept in data/verbalized. Where it failed, or wrote a tag into its text, the writer's text stays.

    Args:
      run: whose AV writes.
      data: rows with the writer's texts.
      share: of the rows that the AV writes about.
      samples: texts that it writes about each.
    """
    folder, seed = run.directory / "data" / "verbalized", run.config.seed
    chosen = np.random.default_rng(seed).permutation(len(data))[: round(share * len(data))]
    if not len(chosen):
        return MixedTexts.written(data)
    if len(chosen) > WINDOW_ROWS:
        chosen.sort()  # Rows that are drawn together then lie together.
    if not run.is_complete(folder, stage_digest(run.config, "ar_sft")):
        run.models.release_target()
        asked = np.repeat(chosen, samples)
        for number, start in enumerate(range(0, len(asked), VERBALIZED_ROWS)):
            _verbalize(run, data.take(asked[start : start + VERBALIZED_ROWS]), number)
        if jax.process_index() == 0:
            Manifest.of(folder).save(folder)
        wait_for_all("verbalized")
    return _mixed(data, open_dataset(folder), chosen, samples)


def _mixed(
    data: StoredDataset, verbalized: StoredDataset, chosen: Int[np.ndarray, "C"], samples: int
) -> MixedTexts:
    """The texts where `verbalized` holds `samples` texts of each of the chosen rows, in their order."""
    first_N, counts_N = np.full(len(data), -1), np.ones(len(data), int)
    first_N[chosen], counts_N[chosen] = np.arange(len(chosen)) * samples, samples
    row_M = np.repeat(np.arange(len(data)), counts_N)
    sample_M = np.arange(len(row_M)) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
    return MixedTexts(data, verbalized, row_M, np.where(first_N[row_M] < 0, -1, first_N[row_M] + sample_M))


def _verbalize(run: Run, data: StoredDataset, number: int) -> None:
    """Write a shard of texts of the AV, if it is not there."""
    path = run.directory / "data" / "verbalized" / f"verbalized-{number:05d}.parquet"
    if run.is_written(path, stage_digest(run.config, "ar_sft")):
        return
    part, key = data.read(), key_for(run.config.seed, f"verbalize {number}" if number else "verbalize")
    written = run.models.round_trip.verbalize(
        run.models.model_params("av_sft", "av"), part.activations, key, 1.0, desc="verbalize"
    )
    kept = [
        own if own and not holds_a_tag(own) else explained
        for own, explained in zip(written, part.explanations, strict=True)
    ]
    write_rows(run, path, dataclasses.replace(part, explanations=kept), stage="ar_sft", digest_of="ar_sft")
