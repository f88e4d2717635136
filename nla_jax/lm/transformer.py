"""The decoder-only transformer, as pure functions of its parameters.

One forward with everything explicit: what is injected, which residual streams come back, where it stops, which
keys and values it continues. Nothing is stored, sowed or hooked, so extraction, training and sampling share it.
Shape letters: B batch, T time, D model, H heads, K kv heads, Dh head dim, F hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nla_jax.lm.attention import KVSegment, attend, matmul
from nla_jax.lm.config import LMConfig

Params = dict[str, Any]
Past = Sequence[tuple[KVSegment, ...]]
"""For each block, the segments that come before the tokens of this call."""
Buffer = tuple[KVSegment, Int[Array, ""]]
"""A segment with unused slots, and the slot where this call's tokens go."""

EMBEDDING_LAYER = -1
"""The injection layer that means: the embedding, before block 0."""


@flax.struct.dataclass
class Injection:
    """A change of one position of the residual stream.

    Attributes:
      vectors_BD: what goes in, already scaled; its row count divides the batch as a segment's does.
      slot: index into the T tokens of the call.
      layer: EMBEDDING_LAYER, or the block whose output is changed.
      mode: "replace" puts the vector in; "add" adds it at the norm of what is there.
    """

    vectors_BD: Float[Array, "B D"]
    slot: int = flax.struct.field(pytree_node=False, default=0)
    layer: int = flax.struct.field(pytree_node=False, default=EMBEDDING_LAYER)
    mode: Literal["replace", "add"] = flax.struct.field(pytree_node=False, default="replace")

    def __call__(self, resid_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the residual stream with the injection made."""
        vectors = self.vectors_BD.astype(resid_BTD.dtype)
        if self.mode == "add":
            present = resid_BTD[:, self.slot]
            vectors = present + unit(vectors) * jnp.linalg.norm(present, axis=-1, keepdims=True)
        return resid_BTD.at[:, self.slot].set(vectors)


@flax.struct.dataclass
class Output:
    """What a forward returns.

    Attributes:
      resid: residual stream after each captured block, (B, T, D).
      final_BTD: input of the LM head (after the final norm); None where the forward stopped early.
      segments: for each block that ran, the keys and values of this call's tokens.
    """

    resid: dict[int, Array]
    final_BTD: Array | None
    segments: tuple[KVSegment, ...]


def unit(vectors: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Scale vectors to length one, with the epsilon inside the square root (finite gradient at zero)."""
    return vectors * jax.lax.rsqrt(jnp.sum(vectors**2, axis=-1, keepdims=True) + 1e-12)


def rotary(
    x_BTHD: Float[Array, "B T H Dh"], positions_BT: Int[Array, "B T"], theta: float
) -> Float[Array, "B T H Dh"]:
    """Rotate the two halves of each head by position (Su et al. 2021, in the half-split layout)."""
    half = x_BTHD.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1F = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle_BT1F), jnp.sin(angle_BT1F)
    first, second = jnp.split(x_BTHD, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Linear(nn.Module):
    """A bias-free linear map, kernel (in, out), result in float32."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Apply the map."""
        shape = (x.shape[-1], self.features)
        return matmul(x, self.param("kernel", nn.initializers.lecun_normal(), shape), self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalize the last axis and apply the learned scale."""
        x = x.astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.eps) * scale


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding."""

    config: LMConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        past: tuple[KVSegment, ...],
        buffer: Buffer | None = None,
    ) -> tuple[Float[Array, "B T D"], KVSegment]:
        """Attend to `past` and to these tokens; return the output and these tokens' segment or filled buffer."""
        config, (B, T, D) = self.config, x_BTD.shape

        def heads(name: str, count: int) -> Array:
            projected = Linear(count * config.head_dim, config.compute_dtype, name=name)(x_BTD)
            return projected.reshape(B, T, count, config.head_dim)

        query_BTHD = rotary(heads("query", config.num_heads), positions_BT, config.rope_theta)
        keys_BTKD = rotary(heads("key", config.num_kv_heads), positions_BT, config.rope_theta)
        values_BTKD = heads("value", config.num_kv_heads)
        keys_BKTD, values_BKTD = (
            x.astype(config.cache_dtype).swapaxes(1, 2) for x in (keys_BTKD, values_BTKD)
        )
        fresh = KVSegment(keys_BKTD, values_BKTD, positions_BT)
        if buffer is not None:
            # Written before it is read: a loop that reads a buffer and then writes it copies it in every step.
            fresh = buffer[0].write(fresh, buffer[1])
        mixed = attend(query_BTHD, positions_BT, (*past, fresh), config.cache_dtype)
        return Linear(D, config.compute_dtype, name="out")(mixed.reshape(B, T, -1)), fresh


class GatedMLP(nn.Module):
    """SiLU-gated feed-forward layer."""

    config: LMConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the layer."""
        dtype = self.config.compute_dtype
        gate_BTF = nn.silu(Linear(self.config.d_ff, dtype, name="gate")(x_BTD))
        up_BTF = Linear(self.config.d_ff, dtype, name="up")(x_BTD)
        return Linear(x_BTD.shape[-1], dtype, name="down")(gate_BTF * up_BTF)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    config: LMConfig

    @nn.compact
    def __call__(
        self,
        resid_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        past: tuple[KVSegment, ...],
        buffer: Buffer | None = None,
    ) -> tuple[Float[Array, "B T D"], KVSegment]:
        """Return the residual stream after the block and the block's segment."""
        eps = self.config.rms_norm_eps
        normed = RMSNorm(eps, name="attention_norm")(resid_BTD)
        mixed, segment = Attention(self.config, name="attention")(normed, positions_BT, past, buffer)
        resid_BTD = resid_BTD + mixed
        return resid_BTD + GatedMLP(self.config, name="mlp")(
            RMSNorm(eps, name="mlp_norm")(resid_BTD)
        ), segment


class Transformer(nn.Module):
    """A decoder-only transformer; `apply({"params": params}, tokens, ...)`."""

    config: LMConfig
    remat: bool = False
    """Recompute each block in the backward pass: less memory, about a third more work."""

    def setup(self):
        """Name the parameters: embed, blocks_0.., final_norm. The LM head is applied by `lm/logits.py`."""
        config = self.config
        self.embed = nn.Embed(config.vocab_size, config.d_model)
        block = nn.remat(Block) if self.remat else Block
        self.blocks = [block(config) for _ in range(config.num_layers)]
        if config.has_lm_head:
            self.final_norm = RMSNorm(config.rms_norm_eps)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None = None,
        *,
        past: Past | None = None,
        buffers: Sequence[Buffer] | None = None,
        inject: Injection | None = None,
        capture: tuple[int, ...] = (),
        stop_after: int | None = None,
    ) -> Output:
        """Run the blocks.

        Args:
          tokens_BT: token ids.
          positions_BT: rotary positions, default 0..T-1; PAD_POSITION hides a padding token from all others.
          past: per block, segments of earlier tokens; their row counts divide B.
          buffers: per block, where to write these tokens; `segments` of the output are then the filled buffers.
          inject: a change of the residual stream at one slot.
          capture: blocks whose residual stream is returned.
          stop_after: last block to run; later blocks, the final norm and the head are skipped.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        resid_BTD = self.embed(tokens_BT).astype(jnp.float32)
        if inject is not None and inject.layer == EMBEDDING_LAYER:
            resid_BTD = inject(resid_BTD)
        last = self.config.num_layers - 1 if stop_after is None else stop_after
        resid, segments = {}, []
        for index, block in enumerate(self.blocks[: last + 1]):
            before = past[index] if past is not None else ()
            buffer = buffers[index] if buffers is not None else None
            resid_BTD, segment = block(resid_BTD, positions_BT, before, buffer)
            if inject is not None and inject.layer == index:
                resid_BTD = inject(resid_BTD)
            segments.append(segment)
            if index in capture:
                resid[index] = resid_BTD
        whole = stop_after is None and self.config.has_lm_head
        return Output(resid, self.final_norm(resid_BTD) if whole else None, tuple(segments))


def init_params(config: LMConfig, key: Array) -> Params:
    """Random parameters, for tests and for shapes without weights."""
    params = Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    if config.has_lm_head and not config.tie_embeddings:
        kernel = nn.initializers.lecun_normal()(
            jax.random.fold_in(key, 1), (config.d_model, config.vocab_size)
        )
        params["lm_head"] = {"kernel": kernel}
    return params


def extend(past: Past | None, segments: Sequence[KVSegment]) -> Past:
    """Append one call's segments to the segments before it, block by block."""
    before = past if past is not None else ((),) * len(segments)
    return tuple((*earlier, segment) for earlier, segment in zip(before, segments, strict=True))
