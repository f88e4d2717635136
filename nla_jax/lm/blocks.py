"""One block of the transformer: attention over the pieces of a call, then feed-forward, on one residual stream.

Shape letters: B batch, T time, D model, K kv heads, Dh head dim, I projection, F frequencies, L blocks.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nla_jax.lm.attention import PAD_POSITION, KVSegment, attend
from nla_jax.lm.config import LMConfig
from nla_jax.lm.layers import MLP, Linear, Norm
from nla_jax.lm.moe import RoutedMLP
from nla_jax.lm.packing import Packing, Pieces
from nla_jax.lm.rotary import frequencies, rotary

Buffer = tuple[KVSegment, Int[Array, ""]]
"""A segment with unused slots, and the slot where this call's tokens go."""


@flax.struct.dataclass
class LayerPattern:
    """Settings of one block that depend on its depth and are not weights; with a leading block axis under scan.

    Attributes:
      frequencies: radians per position of rotary embeddings; None where positions are learned.
      window: width of sliding attention; None where the block sees all keys before it.
    """

    frequencies: Float[Array, "*L F"] | None
    window: Int[Array, "*L"] | int | None

    @classmethod
    def of(cls, config: LMConfig, layer: int) -> "LayerPattern":
        """The pattern of one block."""
        rotates = config.positions == "rotary"
        return cls(frequencies(config, layer) if rotates else None, config.window(layer))

    @classmethod
    def stacked(cls, config: LMConfig, blocks: int) -> "LayerPattern":
        """The patterns of the first `blocks` blocks, along a leading axis."""
        patterns = [cls.of(config, layer) for layer in range(blocks)]
        if any(pattern.window is not None for pattern in patterns):
            # A window as wide as all positions hides nothing.
            patterns = [p.replace(window=jnp.int32(p.window or PAD_POSITION)) for p in patterns]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *patterns)


class Attention(nn.Module):
    """Grouped-query attention of one block."""

    config: LMConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        packing: Packing,
        pattern: LayerPattern,
        past: tuple[KVSegment, ...],
        buffer: Buffer | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[KVSegment, ...]]:
        """Attend to `past` and to these tokens; return the output, and one segment for each piece.

        Args:
          x_BTD: one piece, or several that were joined.
          packing: how the pieces were joined; a piece also sees the pieces before it.
          pattern: the block's pattern.
          past: segments that all pieces see.
          buffer: the segment that a lone piece is written into; its segment is then the filled buffer.
        """
        config, (B, T, D) = self.config, x_BTD.shape
        positions_BT = packing.join(packing.positions)

        def heads(name: str, count: int) -> Pieces:
            projected_BTI = Linear(count * config.head_dim, config.compute_dtype, config.qkv_bias, name=name)(
                x_BTD
            )
            if config.qk_norm == "whole" and name != "value":
                projected_BTI = Norm(config, name=f"{name}_norm")(projected_BTI)
            split_BTHD = projected_BTI.reshape(B, T, count, config.head_dim)
            if config.qk_norm == "head" and name != "value":
                split_BTHD = Norm(config, name=f"{name}_norm")(split_BTHD)
            if config.positions == "rotary" and name != "value":
                split_BTHD = rotary(split_BTHD, positions_BT, pattern.frequencies)
            return packing.split(split_BTHD)

        mixed, segments = [], []
        parts = zip(
            heads("query", config.num_heads),
            heads("key", config.num_kv_heads),
            heads("value", config.num_kv_heads),
            packing.positions,
            strict=True,
        )
        for query_BTHD, keys_BTKD, values_BTKD, piece_positions_BT in parts:
            keys_KBDT = keys_BTKD.astype(config.cache_dtype).transpose(2, 0, 3, 1)
            values_KBTD = values_BTKD.astype(config.cache_dtype).transpose(2, 0, 1, 3)
            fresh = KVSegment(keys_KBDT, values_KBTD, piece_positions_BT)
            if buffer is not None:
                # Written before it is read: a loop that reads a buffer and then writes it copies it in every step.
                fresh = buffer[0].write(fresh, buffer[1])
            segments.append(fresh)
            out_BTHD = attend(
                query_BTHD,
                piece_positions_BT,
                (*past, *segments),
                config.cache_dtype,
                scale=config.attention_scale,
                window=pattern.window,
                softcap=config.attention_softcap,
                implementation=config.attention,
            )
            mixed.append(out_BTHD.reshape(*piece_positions_BT.shape, -1))
        out = Linear(D, config.compute_dtype, config.out_bias, name="out")
        return out(packing.join(tuple(mixed))), tuple(segments)


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream."""

    config: LMConfig
    routed: bool = False
    """Whether the feed-forward layer consists of experts."""

    @nn.compact
    def __call__(
        self,
        resid_BTD: Float[Array, "B T D"],
        packing: Packing,
        pattern: LayerPattern,
        past: tuple[KVSegment, ...],
        buffer: Buffer | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[KVSegment, ...]]:
        """Return the residual stream after the block and the block's segments; see `Attention`."""
        config = self.config

        def norm(name: str, x_BTD: Array, absent: str) -> Array:
            return x_BTD if config.norm_placement == absent else Norm(config, name=name)(x_BTD)

        normed = norm("attention_norm", resid_BTD, absent="post")
        attention = Attention(config, name="attention")
        mixed, segments = attention(normed, packing, pattern, past, buffer)
        after_BTD = resid_BTD + norm("attention_post_norm", mixed, absent="pre")
        feed_forward = (RoutedMLP if self.routed else MLP)(config, name="mlp")
        read_BTD = resid_BTD if config.parallel_residual else after_BTD
        written = feed_forward(norm("mlp_norm", read_BTD, absent="post"))
        return after_BTD + norm("mlp_post_norm", written, absent="pre"), segments
