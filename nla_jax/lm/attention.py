"""Attention over key/value segments that may be shared between rows.

A segment with fewer rows than the queries serves consecutive groups of query rows: a prompt prefix with one row
serves the whole batch, a prompt with N rows serves N groups. Sharing folds the group into the query length of one
matrix product, so shared keys and values are never copied to the full batch. Where the queries' own tokens are the
only segment, a fused kernel can compute attention instead.
"""

import functools
import re
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nla_jax.lm.attention_kernels import attend_itself

PAD_POSITION = 2**30
"""Position of an unused key: it lies after every query, so the causal rule hides it."""
_FLOAT32 = jnp.dtype("float32")


@flax.struct.dataclass
class KVSegment:
    """Keys and values of consecutive tokens; their number of rows R divides the batch that attends to them.

    Keys are rotated already, and laid out for the product with queries. Unused slots have position PAD_POSITION. The
    segments of stacked blocks have a leading axis of blocks.
    """

    keys: Float[Array, "*L K R Dh S"]
    values: Float[Array, "*L K R S Dh"]
    positions: Int[Array, "*L R S"]

    def write(self, fresh: "KVSegment", slot: Int[Array, ""]) -> "KVSegment":
        """Put a shorter segment's tokens into the slots from `slot` on."""
        place = jax.lax.dynamic_update_slice_in_dim
        return KVSegment(
            place(self.keys, fresh.keys, slot, axis=3),
            place(self.values, fresh.values, slot, axis=2),
            place(self.positions, fresh.positions, slot, axis=1),
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract(spec: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """Two-operand einsum with operands rounded to `dtype` and float32 accumulation and result.

    The backward pass rounds its operands to `dtype` as well; without that, the float32 cotangent would meet
    a `dtype` operand, and mixed products are slow everywhere.

    Args:
      spec: einsum spec without ellipses; each letter stands in at least two of the three terms.
      a: first operand.
      b: second operand.
      dtype: operand dtype.
    """
    rounded = a.astype(dtype), b.astype(dtype)
    product = functools.partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
    if re.fullmatch(r"(\w)(\w),\1(\w)->\2\3", spec) and dtype == jnp.bfloat16:
        return jax.lax.platform_dependent(*rounded, cpu=_sum_over_rows, default=product)
    return product(*rounded)


def _sum_over_rows(a_MI: Array, b_MO: Array) -> Array:
    """aᵀ b, a weight's gradient, in the one form that XLA:CPU computes in bfloat16; other forms take twice the time.

    The left operand has to be transposed in memory. XLA folds a plain transposition, of an operand or of the result,
    into the product; the further axis and the barriers prevent that.
    """
    a_1IM = jax.lax.optimization_barrier(a_MI.T[None])
    product_1IO = jnp.einsum("xim,mo->xio", a_1IM, b_MO, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product_1IO)[0]


def _contract_forward(spec, a, b, dtype):
    rounded = a.astype(dtype), b.astype(dtype)
    # Empty arrays remember the operands' dtypes for their gradients.
    return contract(spec, *rounded, dtype), (*rounded, jnp.empty(0, a.dtype), jnp.empty(0, b.dtype))


def _contract_backward(spec, dtype, residuals, grad):
    a, b, like_a, like_b = residuals
    terms, out = spec.split("->")
    left, right = terms.split(",")
    grad_a = contract(f"{out},{right}->{left}", grad, b, dtype).astype(like_a.dtype)
    grad_b = contract(f"{left},{out}->{right}", a, grad, dtype).astype(like_b.dtype)
    return grad_a, grad_b


contract.defvjp(_contract_forward, _contract_backward)


def matmul(x: Float[Array, "*B I"], kernel: Float[Array, "I O"], dtype: jnp.dtype) -> Float[Array, "*B O"]:
    """`x @ kernel` through `contract`: operands in `dtype`, float32 result."""
    out = contract("mi,io->mo", x.reshape(-1, x.shape[-1]), kernel, dtype)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


def attend(
    query_BTHD: Float[Array, "B T H Dh"],
    positions_BT: Int[Array, "B T"],
    segments: Sequence[KVSegment],
    dtype: jnp.dtype = _FLOAT32,
    *,
    scale: float | None = None,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    implementation: str = "xla",
) -> Float[Array, "B T H Dh"]:
    """Causal grouped-query attention of queries to all segments, softmax in float32.

    A key is visible where its position is at most the query's. Query head h reads kv head h // (H / K).

    Args:
      query_BTHD: rotated queries, unscaled.
      positions_BT: the queries' positions.
      segments: keys and values; each segment's row count must divide B.
      dtype: operand dtype of the two matrix products.
      scale: factor of the scores; default Dh**-0.5.
      window: keys at this distance and farther are hidden too.
      softcap: scaled scores s become softcap * tanh(s / softcap).
      implementation: "xla", or a kernel, "cudnn" or "splash". A kernel is used where `positions_BT` itself is the
        positions of the only segment, so that queries and keys are the same tokens; other calls stay on XLA. The
        positions must then be consecutive with padding at the end; padding rows of the result may hold any finite
        numbers.

    Raises:
      ValueError: values that the kernel does not take.
    """
    B, T, H, Dh = query_BTHD.shape
    K = len(segments[0].keys)
    G = H // K
    scale = Dh**-0.5 if scale is None else scale
    if implementation != "xla" and len(segments) == 1 and segments[0].positions is positions_BT:
        return attend_itself(
            implementation,
            query_BTHD,
            segments[0].keys.transpose(1, 0, 3, 2),
            segments[0].values.swapaxes(0, 1),
            dtype,
            scale=scale,
            window=window,
            softcap=softcap,
        )
    # Heads first: rows that share a segment are then adjacent, and every product below is one of plain matrices.
    query_KBGTD = (query_BTHD * scale).reshape(B, T, K, G, Dh).transpose(2, 0, 3, 1, 4)

    def scores(segment: KVSegment) -> Array:
        """Scores (K, R, B // R, G, T, S) of the queries that share each of the segment's R rows; -inf is hidden."""
        R, S = segment.positions.shape
        score = contract("krqd,krds->krqs", query_KBGTD.reshape(K, R, -1, Dh), segment.keys, dtype)
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        query_at, key_at = positions_BT.reshape(R, B // R, 1, T, 1), segment.positions.reshape(R, 1, 1, 1, S)
        visible = key_at <= query_at
        if window is not None:
            visible &= key_at > query_at - window
        return jnp.where(visible, score.reshape(K, R, B // R, G, T, S), -jnp.inf)

    def weights(score: Array) -> Array:
        return jnp.exp(score - peak_KBGT.reshape(*score.shape[:-1], 1))

    def mix(segment: KVSegment, weight: Array) -> Array:
        R, S = segment.positions.shape
        mixed = contract("krqs,krsd->krqd", weight.reshape(K, R, -1, S), segment.values, dtype)
        return mixed.reshape(K, B, G, T, Dh)

    def per_query(x: Array) -> Array:
        return x.reshape(K, B, G, T)

    all_scores = [scores(segment) for segment in segments]
    peak_KBGT = functools.reduce(jnp.maximum, [per_query(score.max(-1)) for score in all_scores])
    # A padding query may see no key at all: a finite peak keeps its row free of NaN.
    peak_KBGT = jax.lax.stop_gradient(jnp.maximum(peak_KBGT, -1e30))
    all_weights = [weights(score) for score in all_scores]
    total_KBGT = sum(per_query(weight.sum(-1)) for weight in all_weights)
    out = sum(mix(segment, weight) for segment, weight in zip(segments, all_weights, strict=True))
    out_KBGTD = out / jnp.maximum(total_KBGT, 1e-30)[..., None]
    return out_KBGTD.transpose(1, 3, 0, 2, 4).reshape(B, T, H, Dh)
