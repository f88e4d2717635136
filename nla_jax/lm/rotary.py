"""Rotary position embedding (Su et al. 2021), in the half-split layout, and its scalings for long contexts."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nla_jax.lm.config import LMConfig, RopeScaling


def frequencies(config: LMConfig, layer: int) -> Float[Array, "F"]:
    """Radians per position of a block's F rotated pairs, which take the first 2F entries of each head."""
    theta, scaling = config.rope(layer)
    half = int(config.head_dim * config.rotary_fraction) // 2
    frequency_F = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return frequency_F if scaling is None else scaled(frequency_F, scaling)


def scaled(frequency_F: Float[Array, "F"], scaling: RopeScaling) -> Float[Array, "F"]:
    """Stretch frequencies: all of them (linear), or as Llama 3.1 does, by wavelength.

    llama3, for a frequency with n turns within the original context: n < low leaves 1 / factor of it, n > high all of
    it, and between the two the share grows linearly in n.
    """
    if scaling.kind == "linear":
        return frequency_F / scaling.factor
    turns_F = scaling.original_positions * frequency_F / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_F = jnp.clip((turns_F - low) / (high - low), 0, 1)
    return frequency_F * (kept_F + (1 - kept_F) / scaling.factor)


def rotary(
    x_BTHD: Float[Array, "B T H Dh"], positions_BT: Int[Array, "B T"], frequency_F: Float[Array, "F"]
) -> Float[Array, "B T H Dh"]:
    """Rotate the pairs (j, j + F) of each head by position; the entries after the first R = 2F stay unchanged."""
    F = len(frequency_F)
    angle_BTF = positions_BT[:, :, None].astype(jnp.float32) * frequency_F
    eye = jnp.eye(F)
    # A product, which is exact here, makes both halves at once; XLA:CPU would else compute sines anew for every head.
    spread = functools.partial(jnp.einsum, "btf,fg->btg", precision=jax.lax.Precision.HIGHEST)
    cos_BT1R = spread(jnp.cos(angle_BTF), jnp.concatenate([eye, eye], axis=1))[:, :, None]
    sin_BT1R = spread(jnp.sin(angle_BTF), jnp.concatenate([-eye, eye], axis=1))[:, :, None]
    rotated, unrotated = jnp.split(x_BTHD, [2 * F], axis=-1)
    rotated = rotated * cos_BT1R + jnp.roll(rotated, F, axis=-1) * sin_BT1R
    return jnp.concatenate([rotated, unrotated], axis=-1) if unrotated.shape[-1] else rotated
