"""The tokens of several pieces in one stream, so that a product with a weight takes them all, and padding left out.

Attention alone sees rows and times; everything else sees tokens. Shape letters: M tokens kept.
"""

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nla_jax.lm.attention import PAD_POSITION

Pieces = tuple[Array, ...]
"""Arrays (rows, time, ...), one a piece: consecutive parts of a text, the earlier ones shared by rows of the later."""


@flax.struct.dataclass
class Packing:
    """How pieces lie in one stream.

    Attributes:
      positions: of each piece, (rows, time); PAD_POSITION marks padding.
      kept_M: which of the pieces' tokens, counted through, are in the stream; None keeps all.
    """

    positions: Pieces
    kept_M: Int[Array, "M"] | None = None

    @classmethod
    def of(cls, positions: Pieces, token_budget: int | None = None) -> "Packing":
        """Pack pieces; the stream holds `token_budget` tokens if given, at least as many as are not padding."""
        if token_budget is None or token_budget >= sum(x.size for x in positions):
            return cls(positions)
        return cls(positions, first_kept(_flat(positions) != PAD_POSITION, token_budget))

    @property
    def is_complete(self) -> Bool[Array, ""]:
        """Whether every token that is not padding is in the stream."""
        real = _flat(self.positions) != PAD_POSITION
        return jnp.array(True) if self.kept_M is None else real.sum() <= len(self.kept_M)

    def join(self, pieces: Pieces) -> Array:
        """Make each token of all pieces a row of its own; a lone piece whose tokens are all kept stays as it is.

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
    """Indices of what is real, in order, filled up to `count` with indices of what is not."""
    return jnp.argsort(~real, stable=True)[:count]


def take(x: Float[Array, "all *F"] | Int[Array, "all *F"], kept_M: Int[Array, "M"]) -> Array:
    """The rows `kept_M`, which differ from each other."""
    return x.at[kept_M].get(unique_indices=True, mode="promise_in_bounds")


def put(x: Float[Array, "M *F"], kept_M: Int[Array, "M"], count: int) -> Float[Array, "all *F"]:
    """Undo `take`: `count` rows, zero where nothing was kept."""
    zeros = jnp.zeros((count, *x.shape[1:]), x.dtype)
    return zeros.at[kept_M].set(x, unique_indices=True, mode="promise_in_bounds")


def budget_for_lengths(
    lengths_B: Int[np.ndarray, "B"], max_length: int, *, micro_batches: int = 1, buckets: int = 8
) -> int | None:
    """Tokens for which the training pass over padded texts is compiled: those of its fullest micro-batch, rounded up.

    Args:
      lengths_B: tokens of each text.
      max_length: what the texts are padded to.
      micro_batches: pieces that the batch is cut into.
      buckets: budgets that there are, evenly spaced; as many programs are compiled at most. 1 keeps the padding.

    Returns:
      The budget of one micro-batch, None if it is all of it.
    """
    rows = len(lengths_B) // micro_batches
    needed = int(np.maximum(lengths_B, 1).reshape(micro_batches, rows).sum(axis=1).max())
    budget = -(-needed * buckets // (rows * max_length)) * rows * max_length // buckets
    # Rounded down by less than a token each; never below what is needed.
    budget = max(budget, needed)
    return budget if budget < rows * max_length else None
