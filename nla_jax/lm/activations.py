"""Residual streams of token sequences at chosen positions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nla_jax.lm.config import LMConfig
from nla_jax.lm.logits import logits
from nla_jax.lm.transformer import Params, Transformer


def residual_at(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BP: Int[Array, "B P"],
    *,
    config: LMConfig,
    layer: int,
    top: int,
) -> tuple[Array, Array | None]:
    """Residual stream after block `layer` at the positions, and the ids of the `top` likeliest next tokens.

    Returns:
      (B, P, D) float32, and (B, P, top) ids, likeliest first, or None for `top` 0.
    """
    stop_after = None if top else layer
    out = Transformer(config).apply({"params": params}, tokens_BT, capture=(layer,), stop_after=stop_after)

    def at_positions(x_BTD: Array) -> Array:
        return jnp.take_along_axis(x_BTD, positions_BP[:, :, None], axis=1)

    activations_BPD = at_positions(out.resid[layer])
    if not top:
        return activations_BPD, None
    return activations_BPD, jax.lax.top_k(logits(params, config, at_positions(out.final_BTD)), top)[1]
