"""Texts of many lengths in batches of few shapes, so that few programs are compiled."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int

from nla_jax.lm.attention import PAD_POSITION

PROMPT_LENGTHS = (32, 64, 96, 128, 256, 512, 1024, 2048, 4096, 8192)
OPTION_LENGTHS = (8, 16, 32, 64, 128, 256)
"""Lengths that are compiled for; what is longer loses its beginning (prompts) or its end (options)."""


def by_lengths(prompts: Sequence[int], options: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Rows by the lengths that their prompts and options are padded to."""

    def up(length: int, lengths: Sequence[int]) -> int:
        return next((one for one in lengths if one >= length), lengths[-1])

    found: dict[tuple[int, int], list[int]] = {}
    for row, (prompt, option) in enumerate(zip(prompts, options, strict=True)):
        found.setdefault((up(prompt, PROMPT_LENGTHS), up(option, OPTION_LENGTHS)), []).append(row)
    return found


def positions(
    tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, "B"], starts_B: Int[Array, "B"] | int = 0
) -> Int[Array, "B T"]:
    """Positions of rows that begin at `starts_B`; padding has none."""
    steps_T = jnp.arange(tokens_BT.shape[1])
    starts_B1 = jnp.broadcast_to(jnp.asarray(starts_B), lengths_B.shape)[:, None]
    return jnp.where(steps_T < lengths_B[:, None], starts_B1 + steps_T, PAD_POSITION)
