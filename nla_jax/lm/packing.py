"""The tokens of several pieces joined in one stream without padding, so that one product with a weight takes them all.

Only attention sees rows and times; everything else sees tokens. Shape letters: M tokens kept.
"""

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nla_jax.lm.attention import PAD_POSITION

Pieces = tuple[Array, ...]
"""One array (rows, time, ...) for each piece. Pieces are consecutive parts of texts; a row of an earlier piece may be
shared by several rows of the later ones."""


@flax.struct.dataclass
class Packing:
    """How pieces lie in one stream.

    Attributes:
      positions: positions (rows, time) of each piece's tokens; PAD_POSITION marks padding.
      kept_M: indices of the tokens in the stream, counted through all pieces; None keeps all.
    """

    positions: Pieces
    kept_M: Int[Array, "M"] | None = None

    @classmethod
    def of(cls, positions: Pieces, token_budget: int | None = None) -> "Packing":
        """Pack pieces into a stream of `token_budget` tokens, or of all if None; padding is left out first."""
        if token_budget is None or token_budget >= sum(x.size for x in positions):
            return cls(positions)
        return cls(positions, first_kept(_flat(positions) != PAD_POSITION, token_budget))

    @property
    def is_complete(self) -> Bool[Array, ""]:
        """Whether every token that is not padding is in the stream."""
        real = _flat(self.positions) != PAD_POSITION
        return jnp.array(True) if self.kept_M is None else real.sum() <= len(self.kept_M)

    def join(self, pieces: Pieces) -> Array:
        """Make each token of all pieces a row of its own; a lone piece whose tokens are all kept is returned unchanged.

        One row of all tokens would serve as well, but XLA:CPU shares work between cores by the leading axis.
        """
        if self.kept_M is None and len(pieces) == 1:
            return pieces[0]
        joined = jnp.concatenate([x.reshape(-1, 1, *x.shape[2:]) for x in pieces])
        return joined if self.kept_M is None else take(joined, self.kept_M)

    def split(self, joined: Array) -> Pieces:
        """Undo `join`; tokens that were not kept are zero."""
        if self.kept_M is None and len(self.positions) == 1:
            return (joined,)
        sizes = [x.size for x in self.positions]
        if self.kept_M is not None:
            joined = put(joined, self.kept_M, sum(sizes))
        parts = jnp.split(joined, np.cumsum(sizes)[:-1])
        return tuple(
            part.reshape(*x.shape, *joined.shape[2:]) for part, x in zip(parts, self.positions, strict=True)
        )


def _flat(positions: Pieces) -> Int[Array, "all"]:
    return jnp.concatenate([x.reshape(-1) for x in positions])


def first_kept(real: Bool[Array, "all"], count: int) -> Int[Array, "M"]:
    """Indices of the real tokens in order, then those of the others, cut to `count`."""
    return jnp.argsort(~real, stable=True)[:count]


def take(x: Float[Array, "all *F"] | Int[Array, "all *F"], kept_M: Int[Array, "M"]) -> Array:
    """The rows of `x` at the indices `kept_M`, which must all differ."""
    return x.at[kept_M].get(unique_indices=True, mode="promise_in_bounds")


def put(x: Float[Array, "M *F"], kept_M: Int[Array, "M"], count: int) -> Float[Array, "all *F"]:
    """Undo `take`: `count` rows, which are zero where they were not kept."""
    zeros = jnp.zeros((count, *x.shape[1:]), x.dtype)
    return zeros.at[kept_M].set(x, unique_indices=True, mode="promise_in_bounds")


def budget_for_lengths(
    lengths_B: Int[np.ndarray, "B"], max_length: int, *, micro_batches: int = 1, buckets: int = 8
) -> int | None:
    """The token budget that a training pass over padded texts is compiled for: its fullest micro-batch, rounded up.

    Args:
      lengths_B: number of tokens of each text.
      max_length: length that the texts are padded to.
      micro_batches: number of parts that the batch is cut into.
      buckets: number of different budgets, evenly spaced; at most as many programs are compiled. 1 keeps all padding.

    Returns:
      The budget of one micro-batch in tokens, or None if no padding is left out.
    """
    rows = len(lengths_B) // micro_batches
    needed = int(np.maximum(lengths_B, 1).reshape(micro_batches, rows).sum(axis=1).max())
    budget = -(-needed * buckets // (rows * max_length)) * rows * max_length // buckets
    # The division above rounds down; the budget must hold the tokens all the same.
    budget = max(budget, needed)
    return budget if budget < rows * max_length else None
