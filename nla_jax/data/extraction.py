"""Activations of a target LM at chosen positions of documents, with the words that it expects next.

Documents are read in batches of similar lengths, so that little padding is read. What is read of a document does not
depend on the others in its batch, but for rounding.
Shape letters: B documents, T tokens, P single tokens of a document, S spans of it, N rows, D model.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from nla_jax.data.positions import CONTINUATION_TOKENS, Context, PositionConfig
from nla_jax.lm.activations import residual_at
from nla_jax.lm.config import LMConfig
from nla_jax.lm.prompt_batches import rounded_up
from nla_jax.lm.tokenized import adds_bos, decode_all, special_ids
from nla_jax.lm.transformer import Params
from nla_jax.sharding.placement import block_on_simulated_devices, shard_batch, to_host


@dataclasses.dataclass(frozen=True)
class ExtractionConfig(PositionConfig):
    """The positions at which activations are read, and the sizes of batches and shards."""

    next_words: int = 6
    """How many of the target's most likely next words are stored; 0 skips the blocks above the layer."""
    layers: tuple[int, ...] = ()
    """Further layers that are read in the same pass, each into a data set base_LAYER beside `base`."""
    storage: Literal["float32", "bfloat16"] = "float32"
    """The dtype of activations on disk."""
    copy_from: str | None = None
    """A folder of activations that another run extracted from the same documents, such as its data/base_20: what is
    there is copied and not computed again."""
    batch_size: int = 16
    """Documents in one forward."""
    length_buckets: int = 8
    """Number of lengths that documents are padded to, evenly spaced up to max_tokens; as many programs are compiled."""
    shard_documents: int = 256
    """Documents in one parquet shard; a killed extraction loses at most two shards."""

    def __post_init__(self):
        super().__post_init__()
        least = {"batch_size": 1, "shard_documents": 1, "next_words": 0, "length_buckets": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"extraction.{name} is {getattr(self, name)}, expected at least {value}")
        if repeated := sorted({layer for layer in self.layers if self.layers.count(layer) > 1}):
            raise ValueError(f"extraction.layers names {repeated} more than once; name each layer once")

    def all_layers(self, layer: int) -> tuple[int, ...]:
        """The layers that are read in a run on `layer`, that one first."""
        return (layer, *(other for other in self.layers if other != layer))

    def identity(self) -> dict[str, Any]:
        """The fields that decide what the rows of a layer are.

        Fields that are younger than others are left out where they change nothing, so that runs keep their digests.
        """
        fields = dataclasses.asdict(self)
        for name in ("layers", "copy_from", "length_buckets"):
            del fields[name]
        unchanged = {"roles": (), "spans": 0, "storage": "float32"}
        if not self.spans:
            del fields["span_tokens"]
        if not self.by_place:
            del fields["by_place"], fields["place_weights"]
        return {name: value for name, value in fields.items() if unchanged.get(name) != value}


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the target gave for the readings of some contexts, in their order."""

    activations: dict[int, Float[np.ndarray, "N D"]]
    """Layer -> residual streams after it, or their means over spans."""
    top_ids: Int[np.ndarray, "N K"] | None
    """The likeliest next tokens after each reading, likeliest first."""
    top_probabilities: Float[np.ndarray, "N K"] | None
    """Their probabilities."""

    @classmethod
    def empty(cls, layers: Sequence[int], width: int) -> "Rows":
        """No rows, of vectors of this width."""
        return cls({layer: np.zeros((0, width), np.float32) for layer in layers}, None, None)


_residual_at = jax.jit(residual_at, static_argnames=("config", "layers", "top"))
"""Compiled once a length for all shards: every call of `read_rows` has the same sizes."""


def read_rows(
    contexts: Sequence[Context],
    params: Params,
    lm_config: LMConfig,
    layers: Sequence[int],
    config: ExtractionConfig,
    mesh: Mesh,
    on_batch: Callable[[int], Any] = lambda documents: None,
) -> Rows:
    """Run the target over contexts and read its residual stream at their readings.

    Of several processes each has to call this with the same contexts, and all get all rows.

    Args:
      contexts: at least one.
      params: of the target.
      lm_config: the target's.
      layers: blocks whose streams are read.
      config: sizes of batches.
      mesh: where batches go.
      on_batch: called with the number of documents of each batch that is done.
    """
    parts: list[list[np.ndarray]] = [[] for _ in contexts]
    pending = None
    for chosen, arrays in batches(contexts, config):
        out = forward(arrays, params, lm_config, layers, config, mesh)
        if pending is not None:  # The device computes this batch while the host takes the one before.
            _take(*pending, contexts, config, parts)
            on_batch(len(pending[0]))
        pending = chosen, out
    _take(*pending, contexts, config, parts)
    on_batch(len(pending[0]))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    streams, expected = columns[: len(layers)], columns[len(layers) :] or [None, None]
    return Rows(dict(zip(layers, streams, strict=True)), *expected)


def forward(
    arrays: tuple[np.ndarray, ...],
    params: Params,
    lm_config: LMConfig,
    layers: Sequence[int],
    config: ExtractionConfig,
    mesh: Mesh,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, jax.Array] | None]:
    """Run the target over a batch of `batches`; returns what `residual_at` does, which devices may still compute."""
    return block_on_simulated_devices(
        _residual_at(
            params,
            *shard_batch(arrays, mesh),
            config=lm_config,
            layers=tuple(layers),
            # Some of the likeliest tokens are not words, so more of them are read than words are stored.
            top=4 * config.next_words,
        )
    )


def batches(
    contexts: Sequence[Context], config: ExtractionConfig
) -> Iterator[tuple[list[int], tuple[np.ndarray, ...]]]:
    """Indices of contexts of similar lengths, the longest first, with the arguments of `residual_at` for them."""
    buckets, B = config.length_buckets, config.batch_size
    lengths = [-(-config.max_tokens * k // buckets) for k in range(1, buckets + 1)]
    order = sorted(range(len(contexts)), key=lambda i: -contexts[i].length)
    for start in range(0, len(order), B):
        chosen = order[start : start + B]
        tokens_BT = np.zeros((B, rounded_up(contexts[chosen[0]].length, lengths)), np.int32)
        positions_BP = np.zeros((B, config.positions_per_document), np.int32)
        spans_BS2 = np.zeros((B, config.spans, 2), np.int32)
        for row, context in enumerate(contexts[i] for i in chosen):
            tokens_BT[row, : context.length] = context.tokens[: context.length]
            positions_BP[row, : len(context.positions)] = context.positions
            if context.spans:
                spans_BS2[row, : len(context.spans)] = context.spans
        yield chosen, (tokens_BT, positions_BP, *([spans_BS2] if config.spans else []))


def _take(
    chosen: Sequence[int],
    out: tuple[Any, Any],
    contexts: Sequence[Context],
    config: ExtractionConfig,
    parts: list[list[np.ndarray]],
) -> None:
    """Fetch a batch, and put what belongs to each context to its index in `parts`.

    That is one array a layer, and the ids and probabilities of the likeliest next tokens where they are known.
    """
    streams, expected = to_host(out)
    for row, index in enumerate(chosen):
        singles, spans = len(contexts[index].positions), len(contexts[index].spans)
        used = [*range(singles), *range(config.positions_per_document, config.positions_per_document + spans)]
        parts[index] = [array[row, used] for array in (*streams, *(expected or ()))]


def columns_of(
    contexts: Sequence[Context],
    rows: Rows,
    layer: int,
    tokenizer: PreTrainedTokenizerBase,
    config: ExtractionConfig,
) -> dict[str, Any]:
    """The `base` columns of the data contract for one of the layers that were read.

    Extra columns: `genre`, `next_words` (the target's expectation, likeliest first) with `next_probabilities`,
    `true_continuation`, the `place`, `role` and `turn` of each reading, `last_token_ids` (the token before the last one
    that was read, and the last one; -1 where there is none), and where there are spans `span_start`: the vector is then
    the mean over the tokens from there to `n_raw_tokens`.
    """
    readings = [(context, reading) for context in contexts for reading in context.readings]
    texts, continuations = _texts_around(readings, tokenizer)
    words = probabilities = [[]] * len(readings)
    if rows.top_ids is not None:
        pairs = zip(rows.top_ids.tolist(), rows.top_probabilities.tolist(), strict=True)
        found = [expected_words(*pair, tokenizer, config.next_words) for pair in pairs]
        words, probabilities = [[*of] for of in found], [[*of.values()] for of in found]
    columns = {
        "activation_vector": rows.activations[layer],
        "n_raw_tokens": [reading.end for _, reading in readings],
        "activation_layer": [layer] * len(readings),
        "doc_id": [context.document.id for context, _ in readings],
        "detokenized_text_truncated": texts,
        "genre": [context.document.genre for context, _ in readings],
        "next_words": words,
        "next_probabilities": probabilities,
        "true_continuation": continuations,
        "place": [reading.place for _, reading in readings],
        "role": [reading.role for _, reading in readings],
        "turn": [reading.turn for _, reading in readings],
        "last_token_ids": [_last_two(context.tokens, reading.end) for context, reading in readings],
    }
    if config.spans:
        columns["span_start"] = [reading.start for _, reading in readings]
    return columns


def _last_two(tokens: Sequence[int], end: int) -> list[int]:
    """The tokens before `end`, -1 for those before the first."""
    return [tokens[i] if i >= 0 else -1 for i in (end - 2, end - 1)]


def _texts_around(
    readings: Sequence[tuple[Context, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[str]]:
    """The text up to each reading's end, and what the document goes on with.

    A continuation begins with the space that may stand between the two: SentencePiece tokenizers drop that space where
    the tokens are decoded alone.
    """
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else None
    before, whole, after = [], [], []
    for context, reading in readings:
        tokens, end = [*context.tokens, *context.continuation], reading.end
        first = 1 if tokens[:1] == bos else 0
        before.append(tokens[first:end])
        whole.append(tokens[first : end + CONTINUATION_TOKENS])
        after.append(tokens[end : end + CONTINUATION_TOKENS])
    texts, wholes = decode_all(tokenizer, before), decode_all(tokenizer, whole)
    continuations = [
        # Where a character is cut in two, its first half is decoded to another character than the whole.
        joined.removeprefix(text) if joined.startswith(text) else tokenizer.decode(tokens)
        for text, joined, tokens in zip(texts, wholes, after, strict=True)
    ]
    return texts, continuations


_WORDS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, str]] = weakref.WeakKeyDictionary()
"""For each tokenizer: token id -> the word that it stands for, empty where it stands for none."""


def next_words(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """The first `count` different readable tokens of a likeliest-first list, as stripped text."""
    return [*dict.fromkeys(word for word in _words(token_ids, tokenizer) if word)][:count]


def expected_words(
    token_ids: Sequence[int], probabilities: Sequence[float], tokenizer: PreTrainedTokenizerBase, count: int
) -> dict[str, float]:
    """The `count` likeliest words among some tokens, as stripped text, each with its probability.

    Tokens that are not readable are left out. The probabilities of tokens that stand for the same word are summed up;
    words are in the order of these sums, and those of equal ones in the order given.
    """
    sums: dict[str, float] = {}
    for word, probability in zip(_words(token_ids, tokenizer), probabilities, strict=True):
        if word:
            sums[word] = sums.get(word, 0.0) + probability
    return dict(sorted(sums.items(), key=lambda pair: -pair[1])[:count])


def _words(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The word that each token stands for; empty where it stands for none."""
    known = _WORDS.setdefault(tokenizer, {})
    if missing := [int(token) for token in token_ids if int(token) not in known]:
        special = special_ids(tokenizer)
        known |= {token: "" if token in special else _word(tokenizer.decode([token])) for token in missing}
    return [known[int(token)] for token in token_ids]


def _word(text: str) -> str:
    """The word that a decoded token stands for; empty where it is not readable."""
    word = "newline" if text and not text.strip() and "\n" in text else text.strip()
    return word if word.isprintable() and "\ufffd" not in word else ""
