"""Activations of a target LM at sampled positions of documents, with the words that it expects next.

Positions are keyed by (seed, document id), so that they do not depend on order, batch or number of processes.
Shape letters: B documents, T tokens, P positions a document, D model.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from nla_jax.data.documents import Document
from nla_jax.data.splits import hash_fraction
from nla_jax.lm.activations import residual_at
from nla_jax.lm.config import LMConfig
from nla_jax.lm.tokenized import starts_with_bos, without_second_bos
from nla_jax.lm.transformer import Params
from nla_jax.process import warn
from nla_jax.sharding.placement import shard_batch, to_host

CONTINUATION_TOKENS = 16
"""Number of tokens of the true continuation that are stored with each activation."""


@dataclasses.dataclass(frozen=True)
class ExtractionConfig:
    """The positions at which activations are read, and the sizes of batches and shards."""

    max_tokens: int = 128
    """Documents are cut after this many tokens."""
    min_position: int = 50
    """First token index that an activation is read at; shorter contexts decode to noise."""
    positions_per_document: int = 6
    next_words: int = 6
    """How many of the target's most likely next words are stored; 0 skips the blocks above the layer."""
    batch_size: int = 16
    """Documents in one forward."""
    shard_documents: int = 256
    """Documents in one parquet shard; a killed extraction loses at most one shard."""

    def __post_init__(self):
        least = {
            "min_position": 0,
            "positions_per_document": 1,
            "batch_size": 1,
            "shard_documents": 1,
            "next_words": 0,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"extraction.{name} is {getattr(self, name)}, expected at least {value}")
        if self.min_position >= self.max_tokens:
            raise ValueError(
                f"extraction.min_position is {self.min_position}, and documents are cut after extraction.max_tokens="
                f"{self.max_tokens} tokens, so that no position is left; raise max_tokens or lower min_position"
            )


@dataclasses.dataclass(frozen=True)
class Context:
    """A tokenized document and the positions chosen in it."""

    document: Document
    tokens: tuple[int, ...]
    """The document's tokens, cut at `max_tokens`."""
    continuation: tuple[int, ...]
    """The tokens after the cut that the last position's continuation may need."""
    positions: tuple[int, ...]


def tokenize(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, config: ExtractionConfig, seed: int
) -> list[Context]:
    """Tokenize documents and choose positions.

    Documents without a token from the minimum position on are left out, and counted in a warning.

    Raises:
      ValueError: no document is long enough.
    """
    encoded = [
        without_second_bos(ids, tokenizer)
        for ids in tokenizer([document.text for document in documents])["input_ids"]
    ]
    special = special_ids(tokenizer)
    contexts = []
    for document, ids in zip(documents, encoded, strict=True):
        tokens, after_cut = ids[: config.max_tokens], ids[config.max_tokens :][:CONTINUATION_TOKENS]
        allowed = [i for i in range(config.min_position, len(tokens)) if tokens[i] not in special]
        if allowed:
            key = int(hash_fraction(document.id, seed=seed, purpose="positions") * 2**53)
            count = min(config.positions_per_document, len(allowed))
            chosen = np.random.default_rng(key).choice(allowed, size=count, replace=False)
            contexts.append(
                Context(
                    document=document,
                    tokens=tuple(tokens),
                    continuation=tuple(after_cut),
                    positions=tuple(sorted(map(int, chosen))),
                )
            )
    if not contexts:
        longest = max((len(ids) for ids in encoded), default=0)
        raise ValueError(
            f"no document is longer than min_position={config.min_position} tokens (the longest of "
            f"{len(documents)} has {longest}); use longer documents or lower extraction.min_position"
        )
    if short := len(documents) - len(contexts):
        warn(
            f"{short} of {len(documents)} documents have no token from position {config.min_position} on, where "
            "activations are read, and are left out (extraction.min_position)"
        )
    return contexts


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of tokens that are no part of a text: those with a role, and those that are only declared special."""
    declared = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *declared}


def text_of(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens from the start of a document, without the BOS before it."""
    return tokenizer.decode(tokens[1:] if starts_with_bos(tokens, tokenizer) else tokens)


def text_after(tokens: Sequence[int], more: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that `more` tokens add to a text, which begins with the space that may stand between the two.

    SentencePiece tokenizers drop that space where the tokens are decoded alone.
    """
    before, whole = text_of(tokens, tokenizer), text_of([*tokens, *more], tokenizer)
    # Where a character is cut in two, its first half is decoded to another character than the whole.
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(more)


_residual_at = jax.jit(residual_at, static_argnames=("config", "layer", "top"))
"""Compiled once for all shards: every call of `extract` has the same sizes."""


def extract(
    contexts: Sequence[Context],
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    lm_config: LMConfig,
    layer: int,
    config: ExtractionConfig,
    mesh: Mesh,
) -> Iterator[dict[str, list[Any]]]:
    """Yield the `base` columns of the data contract, one batch of documents at a time.

    Extra columns: `genre`, `next_words` (the target's expectation, likeliest first) and `true_continuation`.
    """
    # Some of the likeliest tokens are not words, so more of them are read than words are stored.
    top = 4 * config.next_words
    for start in range(0, len(contexts), config.batch_size):
        batch = contexts[start : start + config.batch_size]
        tokens_BT = np.zeros((config.batch_size, config.max_tokens), np.int32)
        positions_BP = np.zeros((config.batch_size, config.positions_per_document), np.int32)
        for row, context in enumerate(batch):
            tokens_BT[row, : len(context.tokens)] = context.tokens
            positions_BP[row, : len(context.positions)] = context.positions
        tokens_BT, positions_BP = shard_batch((tokens_BT, positions_BP), mesh)
        activations_BPD, top_BPK = _residual_at(
            params, tokens_BT, positions_BP, config=lm_config, layer=layer, top=top
        )
        activations_BPD, top_BPK = to_host((activations_BPD, top_BPK))
        columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for row, context in enumerate(batch):
            whole = context.tokens + context.continuation
            for index, position in enumerate(context.positions):
                after = whole[position + 1 : position + 1 + CONTINUATION_TOKENS]
                expected = [] if top_BPK is None else top_BPK[row, index].tolist()
                columns["activation_vector"].append(activations_BPD[row, index])
                columns["n_raw_tokens"].append(position + 1)
                columns["activation_layer"].append(layer)
                columns["doc_id"].append(context.document.id)
                columns["detokenized_text_truncated"].append(
                    text_of(context.tokens[: position + 1], tokenizer)
                )
                columns["genre"].append(context.document.genre)
                columns["next_words"].append(next_words(expected, tokenizer, config.next_words))
                columns["true_continuation"].append(text_after(whole[: position + 1], after, tokenizer))
        yield columns


_COLUMNS = (
    "activation_vector",
    "n_raw_tokens",
    "activation_layer",
    "doc_id",
    "detokenized_text_truncated",
    "genre",
    "next_words",
    "true_continuation",
)


def next_words(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """The first `count` different readable tokens of a likeliest-first list, as stripped text."""
    special = special_ids(tokenizer)
    words: list[str] = []
    for token in token_ids:
        text = "" if int(token) in special else tokenizer.decode([int(token)])
        word = "newline" if text and not text.strip() and "\n" in text else text.strip()
        if word and word.isprintable() and "\ufffd" not in word and word not in words:
            words.append(word)
    return words[:count]
