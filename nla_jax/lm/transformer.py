"""The decoder-only transformer, as pure functions of its parameters.

One forward with everything explicit: what is injected, which residual streams come back, where it stops, which
keys and values it continues. Nothing is stored, sowed or hooked, so extraction, training and sampling share it.
Shape letters: B batch, T time, D model, H heads, K kv heads, Dh head dim, F hidden, V vocabulary.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int

from nla_jax.lm.attention import PAD_POSITION, KVSegment
from nla_jax.lm.blocks import Block, Buffer, LayerPattern
from nla_jax.lm.config import LMConfig
from nla_jax.lm.layers import Norm
from nla_jax.lm.packing import Packing, Pieces
from nla_jax.sharding.constraints import constrain_batch

Params = dict[str, Any]
Past = Sequence[tuple[KVSegment, ...]] | tuple[KVSegment, ...]
"""For each block, the segments that come before the tokens of a call; where blocks are stacked, stacked segments."""
Streams = tuple[Array, ...]
"""The arrays of tokens that blocks process together: one for all pieces where they are packed, else one a piece."""

EMBEDDING_LAYER = -1
"""The layer number of the residual stream that enters block 0.

A vector that is injected there enters block 0 unchanged: Gemma's embedding scale and GPT-2's learned position have
been applied before, and are replaced with the rest of the stream.
"""


@flax.struct.dataclass
class Injection:
    """A change of one position of the residual stream.

    Attributes:
      vectors_BD: vectors to inject, already scaled; their number divides the batch, and each serves a group of rows.
      slot: index into the piece's T tokens.
      layer: EMBEDDING_LAYER, or the block whose output is changed.
      mode: "replace" puts the vector in; "add" adds it, scaled to the norm of the stream at that slot.
      piece: index of the piece that is changed.
    """

    vectors_BD: Float[Array | np.ndarray, "B D"]
    slot: int = flax.struct.field(pytree_node=False, default=0)
    layer: int = flax.struct.field(pytree_node=False, default=EMBEDDING_LAYER)
    mode: Literal["replace", "add"] = flax.struct.field(pytree_node=False, default="replace")
    piece: int = flax.struct.field(pytree_node=False, default=0)

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
    """What a forward returns; in a call with several pieces, `resid` and `final_BTD` hold one array a piece.

    Attributes:
      resid: residual stream after each captured block, injections included, (B, T, D).
      final_BTD: input of the LM head (after the final norm); None where the forward stopped early.
      segments: for each block that ran, the keys and values of this call's tokens, one segment a piece.
    """

    resid: dict[int, Array | Pieces]
    final_BTD: Array | Pieces | None
    segments: Past


def unit(vectors: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Scale vectors to length one, with the epsilon inside the square root (finite gradient at zero)."""
    return vectors * jax.lax.rsqrt(jnp.sum(vectors**2, axis=-1, keepdims=True) + 1e-12)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a call's pieces form streams; a stream is an array of tokens that blocks process together."""

    positions: Pieces
    packed: bool
    token_budget: int | None

    @functools.cached_property
    def packings(self) -> tuple[Packing, ...]:
        """One packing for each stream."""
        if self.packed:
            return (Packing.of(self.positions, self.token_budget),)
        return tuple(Packing((positions_BT,)) for positions_BT in self.positions)

    def streams(self, pieces: Pieces) -> Streams:
        return (self.packings[0].join(pieces),) if self.packed else pieces

    def pieces(self, streams: Streams) -> Pieces:
        return self.packings[0].split(streams[0]) if self.packed else streams

    def inject(self, inject: Injection, streams: Streams) -> Streams:
        pieces = list(self.pieces(streams))
        pieces[inject.piece] = inject(pieces[inject.piece])
        return self.streams(tuple(pieces))

    def run(
        self,
        block: Callable,
        streams: Streams,
        pattern: LayerPattern,
        past: tuple[KVSegment, ...],
        buffer: Buffer | None = None,
    ) -> tuple[Streams, tuple[KVSegment, ...]]:
        """One block over all streams; later streams see the segments of the earlier ones."""
        after, segments = [], ()
        for stream_BTD, packing in zip(streams, self.packings, strict=True):
            stream_BTD, fresh = block(stream_BTD, packing, pattern, (*past, *segments), buffer)
            after.append(constrain_batch(stream_BTD))
            segments += fresh
        return tuple(after), segments


def _choose(condition: Array, chosen: Any, otherwise: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, otherwise)


class Transformer(nn.Module):
    """A decoder-only transformer; `apply({"params": params}, tokens, ...)`."""

    config: LMConfig
    remat: bool = False
    """Recompute each block in the backward pass: less memory, about a third more work."""
    pack: bool = True
    """Multiply a weight with the tokens of all pieces in one product, and likewise in its gradient. Turn it off where
    rows are split over devices and pieces differ in their numbers of rows: packing would move rows between devices."""

    def setup(self):
        """Name the parameters: embed, position_embed, blocks_0.., final_norm; `lm/logits.py` applies the LM head."""
        config = self.config
        self.embed = nn.Embed(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.position_embed = nn.Embed(config.max_positions, config.d_model)
        block = nn.remat(Block) if self.remat else Block
        self.blocks = [block(config, config.routes(layer)) for layer in range(config.num_layers)]
        if config.has_lm_head:
            self.final_norm = Norm(config)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"] | Pieces,
        positions_BT: Int[Array, "B T"] | Pieces | None = None,
        *,
        past: Past | None = None,
        buffers: Sequence[Buffer] | Buffer | None = None,
        inject: Injection | None = None,
        capture: tuple[int, ...] = (),
        stop_after: int | None = None,
        token_budget: int | None = None,
    ) -> Output:
        """Run the blocks.

        Args:
          tokens_BT: token ids; or several pieces, such as a shared prompt and its continuations. Each piece sees the
            pieces before it, and its number of rows divides that of the next.
          positions_BT: positions, default 0..T-1 of a lone piece; PAD_POSITION hides a padding token from all others.
          past: per block, segments of earlier tokens; their row counts divide B.
          buffers: segments that a lone piece is written into, one a block (one stacked buffer where blocks are
            stacked); `segments` of the output are then the filled buffers.
          inject: a change of the residual stream at one slot.
          capture: blocks whose residual stream is returned; EMBEDDING_LAYER is the stream that enters block 0.
          stop_after: last block to run; later blocks, the final norm and the head are skipped.
          token_budget: most tokens of all pieces together that are not padding; where pieces are packed, products
            with weights take this many. If more tokens are not padding, every result is NaN.

        Raises:
          ValueError: a layer to capture, to inject at or to stop after that is not among the blocks that run.
        """
        several = isinstance(tokens_BT, tuple)
        pieces = tokens_BT if several else (tokens_BT,)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(pieces[0].shape[1]), pieces[0].shape)
        positions = positions_BT if isinstance(positions_BT, tuple) else (positions_BT,)
        last = self.config.num_layers - 1 if stop_after is None else self.config.check_layer(stop_after)
        wanted = {*capture, inject.layer if inject is not None else EMBEDDING_LAYER}
        if outside := sorted(layer for layer in wanted if not EMBEDDING_LAYER <= layer <= last):
            raise ValueError(
                f"cannot capture or inject at layers {outside}: blocks 0 to {last} run (and "
                f"{EMBEDDING_LAYER} is what enters them); raise stop_after or choose other layers"
            )
        layout = _Layout(positions, self.pack, token_budget)
        streams = tuple(map(self._embed, layout.streams(pieces), layout.streams(positions)))
        if layout.packings[0].kept_M is not None:
            # NaN is noticed; results from part of the tokens would not be.
            streams = tuple(jnp.where(layout.packings[0].is_complete, x, jnp.nan) for x in streams)
        if inject is not None and inject.layer == EMBEDDING_LAYER:
            streams = layout.inject(inject, streams)
        resid = {EMBEDDING_LAYER: streams} if EMBEDDING_LAYER in capture else {}
        run = self._scan if self.has_variable("params", "blocks") else self._unroll
        streams, captured, segments = run(streams, layout, last, past, buffers, inject, capture)

        def result(streams: Streams) -> Array | Pieces:
            parts = layout.pieces(streams)
            return parts if several else parts[0]

        whole = stop_after is None and self.config.has_lm_head
        final = result(tuple(map(self.final_norm, streams))) if whole else None
        resid = {layer: result(at) for layer, at in (resid | captured).items()}
        return Output(resid, final, segments)

    def _unroll(self, streams, layout, last, past, buffers, inject, capture):
        """Run blocks with weights of their own, `blocks_0` and so on."""
        resid, segments = {}, []
        for layer, block in enumerate(self.blocks[: last + 1]):
            seen = past[layer] if past is not None else ()
            buffer = buffers[layer] if buffers is not None else None
            pattern = LayerPattern.of(self.config, layer)
            streams, fresh = layout.run(block, streams, pattern, seen, buffer)
            segments.append(fresh)
            if inject is not None and inject.layer == layer:
                streams = layout.inject(inject, streams)
            if layer in capture:
                resid[layer] = streams
        return streams, resid, tuple(segments)

    def _scan(self, streams, layout, last, past, buffers, inject, capture):
        """Run one block after the other in a compiled loop over stacked weights, `blocks`.

        `buffers` is one `Buffer` here; its segment has a leading axis of blocks.
        """
        config = self.config
        buffer, slot = (None, None) if buffers is None else buffers
        block = Block(config, config.routes(0), parent=None)
        kept = set(capture) - {EMBEDDING_LAYER, last}

        def one(carry, of_layer):
            streams, resid = carry
            layer, weights, pattern, seen, own_buffer = of_layer
            run = functools.partial(block.apply, {"params": weights})
            writable = None if own_buffer is None else (own_buffer, slot)
            streams, fresh = layout.run(run, streams, pattern, seen, writable)
            if inject is not None and inject.layer != EMBEDDING_LAYER:
                streams = _choose(layer == inject.layer, layout.inject(inject, streams), streams)
            resid = {k: _choose(layer == k, streams, before) for k, before in resid.items()}
            return (streams, resid), fresh

        stacked = self.get_variable("params", "blocks"), past if past is not None else ()
        blocks, before = jax.tree.map(lambda x: x[: last + 1], stacked)
        patterns = LayerPattern.stacked(config, last + 1)
        start = streams, dict.fromkeys(kept, jax.tree.map(jnp.zeros_like, streams))
        over = jnp.arange(last + 1), blocks, patterns, before, buffer
        one = jax.checkpoint(one, prevent_cse=False) if self.remat else one
        (streams, resid), segments = jax.lax.scan(one, start, over)
        return streams, resid | ({last: streams} if last in capture else {}), segments

    def _embed(self, tokens_BT: Array, positions_BT: Array) -> Array:
        """The residual stream that enters block 0."""
        resid_BTD = self.embed(tokens_BT).astype(jnp.float32)
        if self.config.scale_embeddings:
            resid_BTD = resid_BTD * self.config.d_model**0.5
        if self.config.positions == "learned":
            # Padding stays finite; a real position past the table gives NaN rather than a wrong one.
            slots_BT = jnp.where(positions_BT == PAD_POSITION, 0, positions_BT)
            resid_BTD = resid_BTD + self.position_embed(slots_BT).astype(jnp.float32)
        return constrain_batch(resid_BTD, looked_up=True)


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
    """Path ("blocks_0/attention/query/kernel") -> shape of every parameter, without making any.

    One block with experts and one without are traced, as far as the model has them: blocks of one kind have the same
    shapes, and tracing all blocks of a deep model takes seconds.
    """
    kinds = [config.routes(layer) for layer in range(config.num_layers)]
    examples = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    few_blocks = dataclasses.replace(
        config,
        num_layers=len(examples),
        sliding_layers=tuple(config.sliding_layers[layer] for layer in examples if config.sliding_layers),
        expert_layers=tuple(config.expert_layers[layer] for layer in examples if config.expert_layers),
        # What is computed in changes no shape, and models that differ in nothing else are traced once.
        dtype="float32",
        attention_dtype="float32",
        attention="xla",
    )
    params = dict(_traced_shapes(few_blocks))
    of_kind = {kinds[layer]: params.pop(f"blocks_{index}") for index, layer in enumerate(examples)}
    params |= {f"blocks_{layer}": of_kind[kind] for layer, kind in enumerate(kinds)}
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


@functools.lru_cache(maxsize=16)
def _traced_shapes(config: LMConfig) -> Params:
    """The parameters of `init_params` as shapes."""
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


def stack_blocks(tree: Any) -> Any:
    """The same parameters with all blocks stacked along a leading axis, as `blocks`: a forward then scans them.

    Deep models compile many times faster in this form, and in less memory.

    Args:
      tree: LM parameters, or a tree that contains some, such as a training state; stacked blocks stay unchanged.

    Raises:
      ValueError: blocks of different structure, such as some with experts and some without.
    """
    return _each_lm(_stack, "blocks_0", tree)


def unstack_blocks(tree: Any) -> Any:
    """Undo `stack_blocks`; parameters that are not stacked stay as they are."""
    return _each_lm(_unstack, "blocks", tree)


def _each_lm(change: Callable[[Params], Params], mark: str, tree: Any) -> Any:
    def found(node: Any) -> bool:
        return isinstance(node, dict) and mark in node

    return jax.tree.map(lambda node: change(node) if found(node) else node, tree, is_leaf=found)


def _stack(params: Params) -> Params:
    count = sum(name.startswith("blocks_") for name in params)
    blocks = [params[f"blocks_{layer}"] for layer in range(count)]
    shapes = [jax.tree.map(jnp.shape, block) for block in blocks]
    if odd := [layer for layer, shape in enumerate(shapes) if shape != shapes[0]]:
        raise ValueError(
            f"blocks 0 and {odd[0]} have different parameters, so they cannot be scanned; "
            "turn scan_blocks off for this model"
        )
    rest = {name: tree for name, tree in params.items() if not name.startswith("blocks_")}
    return {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def _unstack(params: Params) -> Params:
    rest = {name: tree for name, tree in params.items() if name != "blocks"}
    count = len(jax.tree.leaves(params["blocks"])[0])
    take = operator.itemgetter
    return rest | {f"blocks_{i}": jax.tree.map(take(i), params["blocks"]) for i in range(count)}


def extend(past: Past | None, segments: Past) -> Past:
    """Append one call's segments to the earlier ones, block by block."""
    if isinstance(segments[0], KVSegment):
        return (*(past or ()), *segments)
    before = past if past is not None else ((),) * len(segments)
    return tuple((*earlier, *fresh) for earlier, fresh in zip(before, segments, strict=True))
