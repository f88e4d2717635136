"""The layers that blocks are made of, apart from attention and routed experts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nla_jax.lm.attention import matmul
from nla_jax.lm.config import LMConfig

ACTIVATIONS = {
    "silu": nn.silu,
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    # Two names of one function; an exported config keeps the name that it was read with.
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
}


class Linear(nn.Module):
    """A linear map, kernel (in, out), result in float32; with an adapter if the parameters hold one (`lm/lora.py`)."""

    features: int
    dtype: jnp.dtype
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Apply the map."""
        shape = (x.shape[-1], self.features)
        out = matmul(x, self.param("kernel", nn.initializers.lecun_normal(), shape), self.dtype)
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            out = out + matmul(matmul(x, a, self.dtype), b, self.dtype)
        return out + self.param("bias", nn.initializers.zeros, (self.features,)) if self.bias else out


class Norm(nn.Module):
    """The config's norm, in float32: root-mean-square, or LayerNorm with bias."""

    config: LMConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalize the last axis and apply the learned scale."""
        config, shape, size = self.config, x.shape, x.shape[-1]
        # Rows flattened: XLA:CPU sums slowly where a dimension has length one.
        x = x.astype(jnp.float32).reshape(-1, size)
        scale = self.param("scale", nn.initializers.constant(1 - config.norm_offset), (size,))
        if config.norm_offset:
            scale = scale + config.norm_offset
        if config.norm == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        normed = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * scale
        if config.norm == "layer":
            normed = normed + self.param("bias", nn.initializers.zeros, (size,))
        return normed.reshape(shape)


class MLP(nn.Module):
    """Feed-forward layer, gated or plain."""

    config: LMConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the layer."""
        config = self.config
        linear = functools.partial(Linear, dtype=config.compute_dtype, bias=config.mlp_bias)
        activate = ACTIVATIONS[config.activation]
        if config.gated_mlp:
            gate_BTF = activate(linear(config.d_ff, name="gate")(x_BTD))
            hidden_BTF = gate_BTF * linear(config.d_ff, name="up")(x_BTD)
        else:
            hidden_BTF = activate(linear(config.d_ff, name="up")(x_BTD))
        return linear(x_BTD.shape[-1], name="down")(hidden_BTF)
