"""How many floating-point operations a forward needs; utilisation is measured against this number."""

import functools
import math
from collections.abc import Sequence

from nla_jax.lm.config import LMConfig
from nla_jax.lm.transformer import parameter_shapes


@functools.lru_cache(maxsize=16)
def active_weights(config: LMConfig) -> int:
    """Number of weights in all blocks that multiply a token: all kernels, and only the experts that it visits."""
    total = 0
    for path, shape in parameter_shapes(config).items():
        if path.startswith("blocks_") and len(shape) > 1:
            shape = (config.experts.per_token, *shape[1:]) if len(shape) == 3 else shape
            total += math.prod(shape)
    return total


def forward_flops(
    config: LMConfig, pieces: Sequence[tuple[int, int | float]], unembedded: int | float = 0, *, seen: int = 0
) -> float:
    """Model FLOPs of one forward over pieces that each see the pieces before; a training pass takes three times those.

    Each token takes 2 FLOPs a weight, and each query 4 a head channel and visible key. Work that an implementation
    repeats or spends on padding is not counted.

    Args:
      config: config of the model; all its blocks run.
      pieces: number of rows and (mean) number of tokens of each piece.
      unembedded: number of tokens whose logits are computed.
      seen: number of keys before the first piece.
    """
    tokens = sum(rows * time for rows, time in pieces)
    keys = 0.0
    for rows, time in pieces:
        keys += rows * time * (seen + (time + 1) / 2)
        seen += time
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * keys
    return (
        2.0 * active_weights(config) * tokens
        + attention
        + 2 * config.d_model * config.vocab_size * unembedded
    )
