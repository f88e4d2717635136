"""The decoder-only transformer, as pure functions of its parameters.

One forward with everything explicit: what is injected, which residual streams come back, where it stops, which
keys and values it continues. Nothing is stored, sowed or hooked, so extraction, training and sampling share it.
Shape letters: B batch, T time, D model, H heads, K kv heads, Dh head dim, F hidden, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int

from nla_jax.lm.attention import PAD_POSITION, KVSegment, attend
from nla_jax.lm.config import LMConfig
from nla_jax.lm.layers import MLP, Linear, Norm
from nla_jax.lm.moe import RoutedMLP
from nla_jax.lm.rotary import frequencies, rotary

Params = dict[str, Any]
Past = Sequence[tuple[KVSegment, ...]]
"""For each block, the segments that come before the tokens of this call."""
Buffer = tuple[KVSegment, Int[Array, ""]]
"""A segment with unused slots, and the slot where this call's tokens go."""

EMBEDDING_LAYER = -1
"""The injection layer that means: the residual stream that enters block 0.

What is injected there is not changed on its way: Gemma's embedding scale and GPT-2's learned position are in the
stream before, and are replaced with the rest of it.
"""


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
        rows = resid_BTD.shape[0] // self.vectors_BD.shape[0]
        vectors = jnp.repeat(self.vectors_BD.astype(resid_BTD.dtype), rows, axis=0)
        if self.mode == "add":
            present = resid_BTD[:, self.slot]
            vectors = present + unit(vectors) * jnp.linalg.norm(present, axis=-1, keepdims=True)
        return resid_BTD.at[:, self.slot].set(vectors)


@flax.struct.dataclass
class Output:
    """What a forward returns.

    Attributes:
      resid: residual stream after each captured block, injections included, (B, T, D).
      final_BTD: input of the LM head (after the final norm); None where the forward stopped early.
      segments: for each block that ran, the keys and values of this call's tokens.
    """

    resid: dict[int, Array]
    final_BTD: Array | None
    segments: tuple[KVSegment, ...]


def unit(vectors: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Scale vectors to length one, with the epsilon inside the square root (finite gradient at zero)."""
    return vectors * jax.lax.rsqrt(jnp.sum(vectors**2, axis=-1, keepdims=True) + 1e-12)


class Attention(nn.Module):
    """Grouped-query attention of one block."""

    config: LMConfig
    layer: int

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
            projected_BTI = Linear(count * config.head_dim, config.compute_dtype, config.qkv_bias, name=name)(
                x_BTD
            )
            if config.qk_norm == "whole" and name != "value":
                projected_BTI = Norm(config, name=f"{name}_norm")(projected_BTI)
            split_BTHD = projected_BTI.reshape(B, T, count, config.head_dim)
            if config.qk_norm == "head" and name != "value":
                split_BTHD = Norm(config, name=f"{name}_norm")(split_BTHD)
            if config.positions == "rotary" and name != "value":
                split_BTHD = rotary(split_BTHD, positions_BT, frequencies(config, self.layer))
            return split_BTHD

        query_BTHD = heads("query", config.num_heads)
        keys_BKTD, values_BKTD = (
            heads(name, config.num_kv_heads).astype(config.cache_dtype).swapaxes(1, 2)
            for name in ("key", "value")
        )
        fresh = KVSegment(keys_BKTD, values_BKTD, positions_BT)
        if buffer is not None:
            # Written before it is read: a loop that reads a buffer and then writes it copies it in every step.
            fresh = buffer[0].write(fresh, buffer[1])
        mixed = attend(
            query_BTHD,
            positions_BT,
            (*past, fresh),
            config.cache_dtype,
            scale=config.attention_scale,
            window=config.window(self.layer),
            softcap=config.attention_softcap,
        )
        out = Linear(D, config.compute_dtype, config.out_bias, name="out")
        return out(mixed.reshape(B, T, -1)), fresh


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream."""

    config: LMConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        resid_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        past: tuple[KVSegment, ...],
        buffer: Buffer | None = None,
    ) -> tuple[Float[Array, "B T D"], KVSegment]:
        """Return the residual stream after the block and the block's segment."""
        config = self.config

        def norm(name: str, x_BTD: Array, absent: str) -> Array:
            return x_BTD if config.norm_placement == absent else Norm(config, name=name)(x_BTD)

        normed = norm("attention_norm", resid_BTD, absent="post")
        attention = Attention(config, self.layer, name="attention")
        mixed, segment = attention(normed, positions_BT, past, buffer)
        after_BTD = resid_BTD + norm("attention_post_norm", mixed, absent="pre")
        feed_forward = (RoutedMLP if config.routes(self.layer) else MLP)(config, name="mlp")
        read_BTD = resid_BTD if config.parallel_residual else after_BTD
        written = feed_forward(norm("mlp_norm", read_BTD, absent="post"))
        return after_BTD + norm("mlp_post_norm", written, absent="pre"), segment


class Transformer(nn.Module):
    """A decoder-only transformer; `apply({"params": params}, tokens, ...)`."""

    config: LMConfig
    remat: bool = False
    """Recompute each block in the backward pass: less memory, about a third more work."""

    def setup(self):
        """Name the parameters: embed, position_embed, blocks_0.., final_norm; `lm/logits.py` applies the LM head."""
        config = self.config
        self.embed = nn.Embed(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.position_embed = nn.Embed(config.max_positions, config.d_model)
        block = nn.remat(Block) if self.remat else Block
        self.blocks = [block(config, layer) for layer in range(config.num_layers)]
        if config.has_lm_head:
            self.final_norm = Norm(config)

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
          positions_BT: positions, default 0..T-1; PAD_POSITION hides a padding token from all others.
          past: per block, segments of earlier tokens; their row counts divide B.
          buffers: per block, where to write these tokens; `segments` of the output are then the filled buffers.
          inject: a change of the residual stream at one slot.
          capture: blocks whose residual stream is returned; EMBEDDING_LAYER is the stream that enters block 0.
          stop_after: last block to run; later blocks, the final norm and the head are skipped.

        Raises:
          ValueError: a layer to capture, to inject at or to stop after that is not among the blocks that run.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        resid_BTD = self.embed(tokens_BT).astype(jnp.float32)
        if self.config.scale_embeddings:
            resid_BTD = resid_BTD * self.config.d_model**0.5
        if self.config.positions == "learned":
            # Padding stays finite; a real position past the table gives NaN rather than a wrong one.
            slots_BT = jnp.where(positions_BT == PAD_POSITION, 0, positions_BT)
            resid_BTD = resid_BTD + self.position_embed(slots_BT).astype(jnp.float32)
        if inject is not None and inject.layer == EMBEDDING_LAYER:
            resid_BTD = inject(resid_BTD)
        last = self.config.num_layers - 1 if stop_after is None else self.config.check_layer(stop_after)
        wanted = {*capture, inject.layer if inject is not None else EMBEDDING_LAYER}
        if outside := sorted(layer for layer in wanted if not EMBEDDING_LAYER <= layer <= last):
            raise ValueError(
                f"cannot capture or inject at layers {outside}: blocks 0 to {last} run (and "
                f"{EMBEDDING_LAYER} is what enters them); raise stop_after or choose other layers"
            )
        resid, segments = {EMBEDDING_LAYER: resid_BTD} if EMBEDDING_LAYER in capture else {}, []
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


@functools.lru_cache(maxsize=16)
def parameter_shapes(config: LMConfig) -> dict[str, tuple[int, ...]]:
    """Path ("blocks_0/attention/query/kernel") to shape of every parameter, without making any."""
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def extend(past: Past | None, segments: Sequence[KVSegment]) -> Past:
    """Append one call's segments to the segments before it, block by block."""
    before = past if past is not None else ((),) * len(segments)
    return tuple((*earlier, segment) for earlier, segment in zip(before, segments, strict=True))
