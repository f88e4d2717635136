"""The rows that the warm starts train on: which texts, and what is said of those that are too long.

Texts are tokenized batch by batch, so that a process holds no split. Before a stage begins they are gone through once
for what is said of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Int

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.prompts import encode_reconstructor, encode_responses
from nla_jax.data.batches import Rows, reconstructor_rows
from nla_jax.data.manifest import Manifest
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


def closed_answers(codec: Autoencoder, data: StoredDataset, batch_size: int) -> Answers:
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
            f"av_sft: {share} max_explanation_tokens={limit}, and the others do not fill a batch of {batch_size}; "
            "raise max_explanation_tokens, or have shorter texts written (writer)"
        )
    warn(
        f"av_sft: {share} max_explanation_tokens={limit}. The AV is not trained on them: cut, they would teach it not "
        "to close its answers. Raise max_explanation_tokens to keep them"
    )
    return Answers(codec, data.take(~cut_N))


@dataclasses.dataclass(frozen=True)
class MixedTexts:
    """The texts of rows, of which some are the writer's and others are the AV's."""

    data: StoredDataset
    """The rows with the writer's texts."""
    verbalized: StoredDataset | None
    """Some of the rows with the AV's texts; None where there are none."""
    place_N: Int[np.ndarray, "N"]
    """For each row its place in `verbalized`, -1 where it has the writer's text."""

    def texts(self, index_B: Int[np.ndarray, "B"]) -> list[str]:
        """The texts of some rows."""
        texts, place_B = self.data.explanations(index_B), self.place_N[index_B]
        rows = np.flatnonzero(place_B >= 0)
        if len(rows):
            for row, text in zip(rows, self.verbalized.explanations(place_B[rows]), strict=True):
                texts[row] = text
        return texts


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A `RowSource` of the AR's training rows."""

    codec: Autoencoder
    mixed: MixedTexts

    def __len__(self) -> int:
        return len(self.mixed.data)

    def chunk_sizes(self) -> Int[np.ndarray, "G"]:
        """See `RowSource`."""
        return self.mixed.data.chunk_sizes()

    def batch(self, index_B: Int[np.ndarray, "B"]) -> Rows:
        """Columns of a `ReconstructorBatch`."""
        activations_BD = self.mixed.data.activations(index_B)
        return reconstructor_rows(self.codec, activations_BD, self.mixed.texts(index_B))


def reconstructor_prompts(codec: Autoencoder, mixed: MixedTexts, stage: str) -> Prompts:
    """The AR's training rows, with a warning where texts lose their ends; of many, the first are looked at."""
    limit, count = codec.max_reconstructor_tokens, min(len(mixed.data), LOOKED_AT)
    encode = functools.partial(encode_reconstructor, codec.tokenizer, codec.reconstructor.prompt)
    cut_N = _are_cut(mixed.texts(np.arange(count)), limit, encode)
    if cut_N.any():
        warn(
            f"{stage}: {cut_N.sum()} of {len(cut_N)} texts ({cut_N.mean():.1%}) have more tokens than "
            f"max_reconstructor_tokens={limit}. The AR does not read their ends; raise max_reconstructor_tokens"
        )
    return Prompts(codec, mixed)


def _are_cut(texts: Sequence[str], limit: int, encode: Callable) -> np.ndarray:
    """Which texts are cut to `limit` tokens. Those that fill it are encoded again, with room for one token more."""
    are_cut_N = encode(texts, limit)[1] == limit
    if are_cut_N.any():
        _, longer = encode([texts[i] for i in np.flatnonzero(are_cut_N)], limit + 1)
        are_cut_N[are_cut_N] = longer > limit
    return are_cut_N


def partly_verbalized(run: Run, data: StoredDataset, share: float) -> MixedTexts:
    """The rows' writer's texts, a share of them replaced by what the warm-start AV writes at temperature 1.

    The AV's texts are kept in data/verbalized. Where it failed, or wrote a tag into its text, the writer's text stays.
    """
    folder, seed = run.directory / "data" / "verbalized", run.config.seed
    place_N = np.full(len(data), -1)
    chosen = np.random.default_rng(seed).permutation(len(data))[: round(share * len(data))]
    if not len(chosen):
        return MixedTexts(data, None, place_N)
    if len(chosen) > WINDOW_ROWS:
        chosen.sort()  # Rows that are drawn together then lie together.
    if not run.is_complete(folder, stage_digest(run.config, "ar_sft")):
        run.models.release_target()
        for number, start in enumerate(range(0, len(chosen), VERBALIZED_ROWS)):
            _verbalize(run, data.take(chosen[start : start + VERBALIZED_ROWS]), number)
        if jax.process_index() == 0:
            Manifest.of(folder).save(folder)
        wait_for_all("verbalized")
    place_N[chosen] = np.arange(len(chosen))
    return MixedTexts(data, open_dataset(folder), place_N)


def _verbalize(run: Run, data: StoredDataset, number: int) -> None:
    """Write a shard of texts of the AV, if it is not there."""
    path = run.directory / "data" / "verbalized" / f"verbalized-{number:05d}.parquet"
    if run.is_written(path, stage_digest(run.config, "ar_sft")):
        return
    part, key = data.read(), key_for(run.config.seed, f"verbalize {number}" if number else "verbalize")
    written = run.models.round_trip.verbalize(
        run.models.warm_start_params("av"), part.activations, key, 1.0, desc="verbalize"
    )
    kept = [
        own if own and not holds_a_tag(own) else explained
        for own, explained in zip(written, part.explanations, strict=True)
    ]
    write_rows(run, path, dataclasses.replace(part, explanations=kept), stage="ar_sft", digest_of="ar_sft")
