"""Residual streams of texts, at every token or at chosen ones.

Shape letters: B texts, T tokens, P positions a text, N chosen rows, D model.
"""

import dataclasses
import functools
import operator
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nla_jax.html import marked_text
from nla_jax.lm.config import LMConfig
from nla_jax.lm.logits import logits
from nla_jax.lm.prompt_batches import PROMPT_LENGTHS, rounded_up
from nla_jax.lm.tokenized import TokenizedText
from nla_jax.lm.transformer import Params, Transformer

TOKENS_SHOWN = 1000
"""Tokens of a text that a notebook shows, at most."""


def residual_at(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BP: Int[Array, "B P"],
    spans_BS2: Int[Array, "B S 2"] | None = None,
    *,
    config: LMConfig,
    layers: tuple[int, ...],
    top: int,
) -> tuple[tuple[Array, ...], tuple[Array, Array] | None]:
    """Residual streams after blocks `layers` at positions and as means over spans, and the likeliest next tokens.

    Args:
      params: of the model.
      tokens_BT: texts, with whatever padding after them: no earlier token sees it.
      positions_BP: tokens whose streams are read.
      spans_BS2: start and end of spans, whose rows R follow those of the P positions; None for no spans. The mean of
        an empty span, as padding may be, is zero.
      config: of the model.
      layers: blocks, counted from 0.
      top: number of next tokens; 0 runs no block above the layers.

    Returns:
      (B, R, D) float32 for each layer, and for `top` above 0 the likeliest tokens after each position and after the
      last token of each span, likeliest first: their ids (B, R, top), and their probabilities (B, R, top) in float32
      under the softmax over the whole vocabulary. None in their place for `top` 0.
    """
    stop_after = None if top else max(layers)
    out = Transformer(config).apply({"params": params}, tokens_BT, capture=layers, stop_after=stop_after)
    last_BR, weights_BST = positions_BP, None
    if spans_BS2 is not None:
        start_BS1, end_BS1 = spans_BS2[..., :1], spans_BS2[..., 1:]
        last_BR = jnp.concatenate([positions_BP, jnp.maximum(end_BS1[..., 0] - 1, 0)], axis=1)
        steps_T = jnp.arange(tokens_BT.shape[1])
        weights_BST = (start_BS1 <= steps_T) & (steps_T < end_BS1)
        weights_BST = weights_BST / jnp.maximum(end_BS1 - start_BS1, 1)

    def at(x_BTD: Array, positions: Array) -> Array:
        return jnp.take_along_axis(x_BTD, positions[:, :, None], axis=1)

    def read(x_BTD: Array) -> Array:
        singles_BPD = at(x_BTD, positions_BP)
        if weights_BST is None:
            return singles_BPD
        means_BSD = jnp.einsum("bst,btd->bsd", weights_BST, x_BTD, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([singles_BPD, means_BSD], axis=1)

    streams = tuple(read(out.resid[layer]) for layer in layers)
    if not top:
        return streams, None
    logits_BRV = logits(params, config, at(out.final_BTD, last_BR))
    top_BRK, ids_BRK = jax.lax.top_k(logits_BRV, top)
    # Only a sum over the vocabulary is needed, so that no second array of the logits' size is made.
    log_total_BR1 = jax.nn.logsumexp(logits_BRV, axis=-1, keepdims=True)
    return streams, (ids_BRK, jnp.exp(top_BRK - log_total_BR1))


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def _residual(params: Params, tokens_1T: Array, *, config: LMConfig, layer: int) -> Array:
    """The residual stream (T, D) of one text. Programs are shared by everything that has the same config."""
    out = Transformer(config).apply({"params": params}, tokens_1T, capture=(layer,), stop_after=layer)
    return out.resid[layer][0].astype(jnp.float32)


def residual_of(params: Params, config: LMConfig, ids: Sequence[int], layer: int) -> Float[np.ndarray, "T D"]:
    """The residual stream after block `layer` at every token of one text.

    The text is padded to one of a few lengths, so that few programs are compiled; padding follows the text, where
    nothing sees it.

    Raises:
      ValueError: a layer that the model does not have, or a text longer than its context.
    """
    config.check_layer(layer)
    limit = config.max_positions
    if len(ids) > limit:
        raise ValueError(
            f"the text has {len(ids)} tokens, more than the {limit} that the model was made for; cut it, or explain "
            "it in parts"
        )
    # Beyond the longest of the lengths that are compiled for, a text has a program of its own.
    length = max(min(rounded_up(len(ids), PROMPT_LENGTHS), limit), len(ids))
    tokens_1T = np.zeros((1, length), np.int32)
    tokens_1T[0, : len(ids)] = ids
    return np.asarray(_residual(params, tokens_1T, config=config, layer=layer))[: len(ids)]


@dataclasses.dataclass(frozen=True, eq=False)
class Activations:
    """Activations of one text at some of its tokens, which know their tokens.

    Indexing, slicing and the methods choose rows and give `Activations` again; `np.asarray` gives the vectors.
    """

    vectors_ND: Float[np.ndarray, "N D"]
    """Raw residual streams."""
    layer: int
    """The block that they follow, counted from 0."""
    source: TokenizedText
    """The whole text."""
    positions: tuple[int, ...]
    """The token of `source` that each row belongs to."""

    @property
    def tokens(self) -> list[str]:
        """What the token of each row spells."""
        return [self.source.tokens[p] for p in self.positions]

    @property
    def roles(self) -> list[str | None]:
        """The role in whose turn each row lies; None in plain text."""
        return [self.source.roles[p] for p in self.positions]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Start and end of each row's token in `text`."""
        return [self.source.spans[p] for p in self.positions]

    @property
    def text(self) -> str:
        """The whole text, as it was read."""
        return self.source.text

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator["Activations"]:
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.vectors_ND, dtype=dtype, copy=copy)

    def __getitem__(self, rows: int | np.integer | slice | Sequence[int] | np.ndarray) -> "Activations":
        """Choose rows of this object; for positions in the text, see `at`.

        Raises:
          IndexError: a row that there is not.
          ValueError: a choice of no rows.
        """
        if isinstance(rows, int | np.integer):
            if not -len(self) <= rows < len(self):
                raise IndexError(
                    f"row {rows} is outside these activations: they have rows 0 to {len(self) - 1}"
                )
            rows = [operator.index(rows)]
        elif isinstance(rows, Sequence) and not len(rows):  # NumPy takes an empty list for one of floats
            rows = np.zeros(0, int)
        chosen = np.arange(len(self))[rows]
        if not len(chosen):
            raise ValueError(f"{rows} chooses none of the {len(self)} rows; choose at least one")
        return dataclasses.replace(
            self, vectors_ND=self.vectors_ND[chosen], positions=tuple(self.positions[row] for row in chosen)
        )

    def at(self, positions: Sequence[int]) -> "Activations":
        """The rows of some tokens, by their positions in the text; negative ones count from its end.

        Raises:
          ValueError: a position outside the text, or one whose row is not here.
        """
        wanted = [self.source.resolved(position) for position in positions]
        row_of = {position: row for row, position in enumerate(self.positions)}
        if missing := [position for position in wanted if position not in row_of]:
            raise ValueError(
                f"positions {missing} are not among these activations, which have {list(self.positions)[:10]}...; "
                "choose from the activations of the whole text"
            )
        return self[[row_of[position] for position in wanted]]

    def _among(self, positions: Sequence[int], what: str) -> "Activations":
        rows = [row for row, position in enumerate(self.positions) if position in set(positions)]
        if not rows:
            raise ValueError(
                f"none of these {len(self)} activations lies at {what}; choose from the whole text"
            )
        return self[rows]

    def role(self, role: str) -> "Activations":
        """The rows in the content of a role's messages; ValueError where there are none."""
        return self._among(self.source.with_role(role), f"a token of role {role!r}")

    def last_of_turn(self) -> "Activations":
        """The rows at the last content token of every message; ValueError for plain text."""
        return self._among(self.source.last_of_turns(), "the end of a turn")

    def match(self, pattern: str) -> "Activations":
        """The rows whose tokens overlap a match of a regular expression; ValueError where nothing matches."""
        return self._among(self.source.matching(pattern), f"a match of {pattern!r}")

    def phrase(self, phrase: str) -> "Activations":
        """The rows whose tokens overlap a phrase, taken literally; ValueError where the text does not hold it."""
        return self.match(re.escape(phrase))

    def __repr__(self) -> str:
        shown = "".join(self.tokens)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return (
            f"Activations({len(self)} tokens of layer {self.layer}, d {self.vectors_ND.shape[1]}: {shown!r})"
        )

    def _repr_html_(self) -> str:
        """For notebooks: the text around the first of the chosen tokens, the chosen ones marked."""
        source, size = self.source, len(self.source)
        first = max(0, min(self.positions[0] - TOKENS_SHOWN // 4, size - TOKENS_SHOWN))
        last = min(first + TOKENS_SHOWN, size)
        start = source.spans[first][0] if first else 0
        end = source.spans[last - 1][1] if last < size else len(source.text)
        spans = [(a - start, b - start) for a, b in source.spans[first:last]]
        shown = marked_text(source.text[start:end], spans, {position - first for position in self.positions})
        head = f"{len(self)} of {size} tokens, layer {self.layer}, d {self.vectors_ND.shape[1]}"
        if last - first < size:
            head += f"; tokens {first} to {last - 1} are shown"
        return f"<p>{head}</p>{shown}"
