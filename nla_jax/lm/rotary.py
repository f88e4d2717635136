"""Rotary position embedding (Su et al. 2021), in the half-split layout, and its scalings for long contexts."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nla_jax.lm.config import LMConfig, RopeScaling


def frequencies(config: LMConfig, layer: int) -> Float[Array, "F"]:
    """Radians per position of a block's rotated pairs; twice as many entries of each head are rotated."""
    theta, scaling = config.rope(layer)
    half = int(config.head_dim * config.rotary_fraction) // 2
    frequency_F = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return frequency_F if scaling is None else scaled(frequency_F, scaling)


def scaled(frequency_F: Float[Array, "F"], scaling: RopeScaling) -> Float[Array, "F"]:
    """Stretch frequencies: all of them (linear), or as Llama 3.1 does, by wavelength.

    llama3, with n turns within the original context: n < low keeps 1 / factor of the frequency, n > high keeps
    all of it, and between them the share grows linearly in n.
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
    """Rotate the pairs (j, j + F) of each head by position; entries from 2F on stay as they are."""
    rotated = 2 * frequency_F.shape[0]
    angle_BT1F = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_F
    cos, sin = jnp.cos(angle_BT1F), jnp.sin(angle_BT1F)
    first, second = jnp.split(x_BTHD[..., :rotated], 2, axis=-1)
    halves = [first * cos - second * sin, second * cos + first * sin]
    if rotated < x_BTHD.shape[-1]:
        halves.append(x_BTHD[..., rotated:])
    return jnp.concatenate(halves, axis=-1)
