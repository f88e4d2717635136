"""Routed experts: each token visits the few feed-forward layers that a router picks for it.

Tokens are sorted by expert, so that one grouped matrix product serves all experts, whatever their loads: no
capacity, no dropped tokens, and a token's result depends on no other token.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nla_jax.lm.attention import matmul
from nla_jax.lm.config import LMConfig
from nla_jax.lm.layers import ACTIVATIONS

_ROWS_OF_BOTH = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)
"""Dimension numbers that contract the ragged rows of two matrices, with one product for each group of rows."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    rows_MI: Float[Array, "M I"],
    kernel_EIO: Float[Array, "E I O"],
    sizes_E: Int[Array, "E"],
    dtype: jnp.dtype,
) -> Float[Array, "M O"]:
    """Multiply consecutive groups of rows by a matrix each, rounding as `contract` does.

    Args:
      rows_MI: rows; a group's rows are adjacent, and the groups in order.
      kernel_EIO: one matrix a group.
      sizes_E: number of rows of each group; they sum to M.
      dtype: operand dtype, in the backward pass too; the result is float32.
    """
    rows_MI, kernel_EIO = rows_MI.astype(dtype), kernel_EIO.astype(dtype)
    return jax.lax.ragged_dot(rows_MI, kernel_EIO, sizes_E, preferred_element_type=jnp.float32)


def _grouped_forward(rows_MI, kernel_EIO, sizes_E, dtype):
    rounded = rows_MI.astype(dtype), kernel_EIO.astype(dtype)
    # Empty arrays remember the operands' dtypes for their gradients.
    like = jnp.empty(0, rows_MI.dtype), jnp.empty(0, kernel_EIO.dtype)
    return grouped_matmul(*rounded, sizes_E, dtype), (*rounded, sizes_E, *like)


def _grouped_backward(dtype, residuals, grad_MO):
    rows_MI, kernel_EIO, sizes_E, like_rows, like_kernel = residuals
    grad_rows_MI = grouped_matmul(grad_MO, kernel_EIO.swapaxes(1, 2), sizes_E, dtype)
    grad_kernel_EIO = jax.lax.ragged_dot_general(
        rows_MI, grad_MO.astype(dtype), sizes_E, _ROWS_OF_BOTH, preferred_element_type=jnp.float32
    )
    return grad_rows_MI.astype(like_rows.dtype), grad_kernel_EIO.astype(like_kernel.dtype), None


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


class RoutedMLP(nn.Module):
    """Gated feed-forward experts; each token gets the weighted sum of the experts that the router scores highest."""

    config: LMConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the layer."""
        experts, dtype = self.config.experts, self.config.compute_dtype
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        (N, D), E, K, F = x_ND.shape, experts.count, experts.per_token, experts.d_ff
        init = nn.initializers.lecun_normal(batch_axis=0)
        gate_EDF = self.param("gate", init, (E, D, F))
        up_EDF = self.param("up", init, (E, D, F))
        down_EFD = self.param("down", init, (E, F, D))
        router_DE = self.param("router", nn.initializers.lecun_normal(), (D, E))

        shares_NK, chosen_NK = jax.lax.top_k(jax.nn.softmax(matmul(x_ND, router_DE, dtype)), K)
        if experts.normalize:
            shares_NK = shares_NK / shares_NK.sum(axis=-1, keepdims=True)
        # A visit is a pair of token and expert, numbered token by token; sorted, an expert's visits are adjacent.
        visit_M = jnp.argsort(chosen_NK.reshape(-1))
        sizes_E = jnp.bincount(chosen_NK.reshape(-1), length=E).astype(jnp.int32)
        rows_MD = x_ND[visit_M // K]
        gate_MF = ACTIVATIONS[self.config.activation](grouped_matmul(rows_MD, gate_EDF, sizes_E, dtype))
        hidden_MF = gate_MF * grouped_matmul(rows_MD, up_EDF, sizes_E, dtype)
        out_MD = grouped_matmul(hidden_MF, down_EFD, sizes_E, dtype)
        out_NKD = out_MD[jnp.argsort(visit_M)].reshape(N, K, D)
        return jnp.sum(out_NKD * shares_NK[..., None], axis=1).reshape(x_BTD.shape)
