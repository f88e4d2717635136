"""Sampling continuations of a shared prompt in one jitted loop; it knows tokens, not text.

The prompt's keys and values come in as segments and are not copied. The loop owns one buffer per block for the
sampled tokens, updated in place, and ends when every row has ended.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nla_jax.lm.attention import PAD_POSITION, KVSegment
from nla_jax.lm.config import LMConfig
from nla_jax.lm.logits import head_kernel, logits
from nla_jax.lm.transformer import Params, Past, Transformer, unstack_blocks
from nla_jax.sharding.constraints import constrain_batch, constrain_vocabulary, tensor_shards

_BINS = 256
"""Tokens per bin of the two-level inverse CDF."""


@flax.struct.dataclass
class Samples:
    """Sampled continuations.

    Attributes:
      tokens_BT: sampled ids, 0 after a row's end.
      log_probs_BT: log-probability of each under the sampling distribution, 0 after the end.
      lengths_B: tokens up to and including the closing or end token.
      closed_B: whether the row ended with the closing sequence.
    """

    tokens_BT: Int[Array, "B T"]
    log_probs_BT: Float[Array, "B T"]
    lengths_B: Int[Array, "B"]
    closed_B: Bool[Array, "B"]

    @property
    def answers(self) -> tuple[Array, Array, Array]:
        """Tokens, lengths, and whether each row closed: everything that the texts are decoded from."""
        return self.tokens_BT, self.lengths_B, self.closed_B


def sample_token(
    key: Array, logits_BV: Float[Array, "B V"], temperature: Float[Array, ""]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draw one token a row from softmax(logits / temperature); temperature 0 takes the most likely one.

    Draws by inverse CDF in two levels (first a bin of tokens, then a token in it), which needs one uniform number
    a row where Gumbel noise needs one a token.

    Args:
      key: one random key for all rows, or one for each: a row's draw then does not depend on the rows beside it.
      logits_BV: logits of the next token.
      temperature: 0 is greedy.

    Returns:
      ids, and their log-probabilities under the distribution drawn from (temperature 1 for greedy draws).
    """
    greedy = temperature == 0
    scaled_BV = logits_BV / jnp.where(greedy, 1.0, temperature)
    peak_B = scaled_BV.max(axis=-1)
    weight_BV = jnp.exp(scaled_BV - peak_B[:, None])
    # Every device of the tensor axis holds whole bins; only the bins' shares are exchanged between devices.
    padding = -weight_BV.shape[1] % (_BINS * tensor_shards())
    weight_BCV = constrain_vocabulary(
        jnp.pad(weight_BV, ((0, 0), (0, padding))).reshape(len(peak_B), -1, _BINS)
    )
    share_BC = constrain_batch(weight_BCV.sum(axis=-1))

    def best() -> Array:
        # The first token that reaches the peak; an argmax over all tokens takes seven times as long on CPU.
        bin_B = jnp.argmax(weight_BCV.max(axis=-1), axis=-1)
        return bin_B * _BINS + jnp.argmax(_row(weight_BCV, bin_B), axis=-1)

    def draw() -> Array:
        edges_BC = jnp.cumsum(share_BC, axis=-1)
        uniform_B = jax.vmap(jax.random.uniform)(key) if key.ndim else jax.random.uniform(key, peak_B.shape)
        target_B = uniform_B * edges_BC[:, -1]
        bin_B = jnp.minimum(jnp.sum(edges_BC <= target_B[:, None], axis=-1), edges_BC.shape[1] - 1)
        before_B = jnp.where(bin_B > 0, _row(edges_BC, jnp.maximum(bin_B - 1, 0)), 0)
        inside_BV = jnp.cumsum(_row(weight_BCV, bin_B), axis=-1)
        # Rounding may leave the target past the bin's last edge; the last token with weight is the draw then.
        target_B = jnp.minimum(target_B - before_B, inside_BV[:, -1] * (1 - 1e-6))
        return bin_B * _BINS + jnp.sum(inside_BV <= target_B[:, None], axis=-1)

    drawn_B = jax.lax.cond(greedy, best, draw)
    return drawn_B, _row(scaled_BV, drawn_B) - peak_B - jnp.log(share_BC.sum(axis=-1))


def _row(x_BC: Array, index_B: Int[Array, "B"]) -> Array:
    """For each b, the entry `x_BC[b, index_B[b]]`."""
    return jax.vmap(lambda x_C, index: x_C[index])(x_BC, index_B)


def in_compute_dtype(params: Params, config: LMConfig) -> Params:
    """The weights for forwards without gradients: kernels in compute dtype, and a head that is not tied.

    Weights that have this form already are returned unchanged (under `jit_aliasing`, as the same arrays); stacked
    blocks stay stacked. With few rows in bfloat16 on CPU, a head that is a transposed view of the embedding takes four
    times as long as one of its own.
    """

    def cast(path: tuple, x: Array) -> Array:
        part, axes = path[0].key, x.ndim
        # Embeddings are looked up, not multiplied: they enter the float32 stream as they are.
        multiplied = part not in ("embed", "position_embed") and axes - (part == "blocks") > 1
        return x.astype(config.compute_dtype) if multiplied else x

    params = jax.tree_util.tree_map_with_path(cast, params)
    if "lm_head" in params:
        return params
    # The barrier keeps the transposition out of loops, where it would be fused back into the product.
    head = jax.lax.optimization_barrier(head_kernel(params).astype(config.compute_dtype))
    return {**params, "lm_head": {"kernel": head}}


def for_decoding(params: Params, config: LMConfig) -> Params:
    """The weights in the form that `sample` reads fastest: `in_compute_dtype`, with blocks unstacked.

    `sample` takes stacked blocks as well. Its program then compiles several times faster, which pays off for a few
    rows, but every token step copies the weights that it slices out of the stack.
    """
    return in_compute_dtype(unstack_blocks(params), config)


def sample(
    params: Params,
    config: LMConfig,
    past: Past,
    final_ND: Float[Array, "N D"],
    first_position: int | Int[Array, "N"],
    key: Array,
    *,
    group: int,
    max_tokens: int,
    closing: tuple[int, ...],
    end_token: int,
    temperature: float | Float[Array, ""] = 1.0,
) -> Samples:
    """Sample `group` continuations for each of N prompts; B = N * group rows, a prompt's rows adjacent.

    Args:
      params: weights, best from `for_decoding`; or with stacked blocks, from `in_compute_dtype`.
      config: the weights' config.
      past: per block, the prompt's segments, whose row counts divide N; stacked if the blocks are.
      final_ND: the prompt's last final-norm output, from which the first token is drawn.
      first_position: position of the first sampled token, one for all prompts or one each.
      key: random key, one for all rows or one for each of the B; token t of the loop uses fold_in(key, t).
      group: number of continuations a prompt.
      max_tokens: most tokens of a row; a row that reaches it is cut without being closed.
      closing: token sequence that ends a row as complete.
      end_token: a token that ends a row too; the row has failed unless this token completes `closing`.
      temperature: 0 is greedy.
    """
    model = Transformer(config)
    B = final_ND.shape[0] * group
    temperature = jnp.float32(temperature)
    closing_M = jnp.asarray(closing, jnp.int32)
    margin = len(closing) - 1
    first_B = jnp.repeat(jnp.broadcast_to(jnp.int32(first_position), len(final_ND)), group)

    stacked = "blocks" in params

    def empty() -> KVSegment:
        values = jnp.zeros((config.num_kv_heads, B, max_tokens, config.head_dim), config.cache_dtype)
        return KVSegment(values.swapaxes(2, 3), values, jnp.full((B, max_tokens), PAD_POSITION, jnp.int32))

    def empty_buffers() -> tuple[KVSegment, ...] | KVSegment:
        """A buffer a block; where blocks are stacked, one buffer with a leading axis of blocks."""
        if not stacked:
            return tuple(empty() for _ in range(config.num_layers))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (config.num_layers, *x.shape)), empty())

    def key_of_step(t: Array) -> Array:
        return jax.vmap(jax.random.fold_in, (0, None))(key, t) if key.ndim else jax.random.fold_in(key, t)

    def step(carry):
        t, final_BD, buffers, tokens, log_probs, lengths, closed, ended = carry
        logits_BV = constrain_vocabulary(logits(params, config, constrain_batch(final_BD)))
        drawn, log_prob = sample_token(key_of_step(t), logits_BV, temperature)
        drawn, log_prob = jnp.where(ended, 0, drawn), jnp.where(ended, 0.0, log_prob)
        # `tokens` is led by `margin` impossible ids, so that the last tokens can be compared from the start.
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, drawn[:, None], t + margin, axis=1)
        log_probs = jax.lax.dynamic_update_slice_in_dim(log_probs, log_prob[:, None], t, axis=1)
        recent = jax.lax.dynamic_slice_in_dim(tokens, t, margin + 1, axis=1)
        closed = closed | (~ended & (recent == closing_M).all(axis=1))
        lengths = jnp.where(ended, lengths, t + 1)
        ended = ended | closed | (drawn == end_token)
        positions = first_B[:, None] + t
        slots = (buffers, t) if stacked else [(buffer, t) for buffer in buffers]
        out = model.apply({"params": params}, drawn[:, None], positions, past=past, buffers=slots)
        filled = out.segments[0] if stacked else tuple(segment for (segment,) in out.segments)
        return t + 1, out.final_BTD[:, 0], filled, tokens, log_probs, lengths, closed, ended

    def unfinished(carry):
        return (carry[0] < max_tokens) & ~carry[-1].all()

    no = jnp.zeros(B, bool)
    start = (
        jnp.int32(0),
        jnp.repeat(final_ND, group, axis=0),
        empty_buffers(),
        jnp.full((B, max_tokens + margin), -1, jnp.int32),
        jnp.zeros((B, max_tokens)),
        jnp.zeros(B, jnp.int32),
        no,
        no,
    )
    _, _, _, tokens, log_probs, lengths, closed, _ = jax.lax.while_loop(unfinished, step, start)
    return Samples(jnp.maximum(tokens[:, margin:], 0), log_probs, lengths, closed)
