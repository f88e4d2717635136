"""Texts of many lengths, batched in few shapes, so that few programs are compiled."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from nla_jax.lm.attention import PAD_POSITION

PROMPT_LENGTHS = (32, 128, 512, 2048, 8192)
OPTION_LENGTHS = (16, 64, 256)
"""Lengths in tokens that are compiled for; a longer prompt loses its beginning, a longer option its end."""


def rounded_up(length: int, lengths: Sequence[int]) -> int:
    """The first of ascending `lengths` that holds `length`, or the last."""
    return next((candidate for candidate in lengths if candidate >= length), lengths[-1])


def batches_by_length(
    lengths: Sequence[int],
    most_tokens: int,
    *,
    others: int = 0,
    most_rows: int = 1 << 16,
    same_rows: bool = False,
) -> Iterator[tuple[list[int], int, int]]:
    """Cut prompts into batches of similar lengths: their indices, how many rows to compile for, and the padded length.

    Args:
      lengths: number of tokens of each prompt.
      most_tokens: most tokens of a batch, padding included.
      others: further tokens that every row takes.
      most_rows: most rows of a batch, a power of two.
      same_rows: compile every length for the rows that all prompts would need at that length, so that fewer shapes
        occur; use it where padding rows cost nothing.
    """
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(rounded_up(length, PROMPT_LENGTHS), []).append(row)
    for length, rows in by_length.items():
        count = len(lengths) if same_rows else len(rows)
        fitting = max(most_tokens // (length + others), 1)
        # Powers of two.
        size = min(1 << (count - 1).bit_length(), 1 << (fitting.bit_length() - 1), most_rows)
        for start in range(0, len(rows), size):
            yield rows[start : start + size], size, length


def filled(rows: Sequence[int], size: int) -> list[int]:
    """`rows`, filled up to `size` by repeating the last one."""
    return [*rows, *rows[-1:] * (size - len(rows))]


def positions(
    tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, "B"], starts_B: Int[Array, "B"] | int = 0
) -> Int[Array, "B T"]:
    """Positions of tokens in rows that begin at `starts_B`; padding gets PAD_POSITION."""
    steps_T = jnp.arange(tokens_BT.shape[1])
    starts_B1 = jnp.broadcast_to(jnp.asarray(starts_B), lengths_B.shape)[:, None]
    return jnp.where(steps_T < lengths_B[:, None], starts_B1 + steps_T, PAD_POSITION)


def pad(rows: Sequence[Sequence[int]], length: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Right-pad rows with 0 to `length`; masks come from the lengths, since 0 may be a real id."""
    padded = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded, np.array([len(ids) for ids in rows], np.int32)


ROW_COUNTS = (1, 4, 16)
"""Numbers of rows that small batches are compiled for; a larger remainder is filled up to a whole batch."""


def row_batches(count: int, batch_size: int, multiple: int = 1) -> Iterator[tuple[Int[np.ndarray, "B"], int]]:
    """Cut `count` rows into batches of few sizes: the row in each place of a batch, and how many places are real.

    A batch is filled up by repeating its last row. Rows that do not fill a whole batch get the smallest of
    `ROW_COUNTS` that holds them.

    Args:
      count: number of rows in all.
      batch_size: number of rows of a whole batch.
      multiple: every size is rounded up to a multiple of this, such as the devices that rows are split over.
    """
    for start in range(0, count, batch_size):
        real = min(batch_size, count - start)
        size = next((size for size in ROW_COUNTS if real <= size < batch_size), batch_size)
        size = -(-size // multiple) * multiple
        yield np.minimum(np.arange(start, start + size), start + real - 1), real
