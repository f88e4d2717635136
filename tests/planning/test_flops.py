import jax
import jax.numpy as jnp
import pytest

from nla_jax.planning.flops import matmul_flops

A, B = jnp.zeros((3, 5)), jnp.zeros((5, 7))
PRODUCT = 2 * 3 * 5 * 7
SQUARE = jnp.zeros((4, 4))


def repeated(x):
    return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=6)[0]


def until(x):
    def unfinished(carry):
        return (carry[0] < 9) & (carry[1].sum() >= 0)

    return jax.lax.while_loop(unfinished, lambda carry: (carry[0] + 1, carry[1] @ x), (0, x))[1]


@pytest.mark.parametrize(
    ("function", "arguments", "expected", "once"),
    [
        (jnp.matmul, (A, B), PRODUCT, PRODUCT),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (A[None], B[None]), PRODUCT, PRODUCT),
        (jax.jit(jax.vmap(jnp.matmul)), (A[None], B[None]), PRODUCT, PRODUCT),
        # The gradient of one product is two.
        (jax.grad(lambda a, b: (a @ b).sum(), (0, 1)), (A, B), 3 * PRODUCT, 3 * PRODUCT),
        (repeated, (SQUARE,), 6 * 128, 128),
        (until, (SQUARE,), 9 * 128, 128),
        # One branch runs.
        (lambda x: jax.lax.cond(x.sum() > 0, lambda: x @ x, lambda: x), (SQUARE,), 128, 128),
        # Forward, its repetition, and two products backward.
        (jax.grad(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ x)).sum())), (SQUARE,), 4 * 128, 4 * 128),
    ],
    ids=["product", "batched", "jit and vmap", "gradient", "scan", "while", "cond", "remat"],
)
def test_matrix_products_are_counted(function, arguments, expected, once):
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    assert matmul_flops(jaxpr) == expected
    assert matmul_flops(jaxpr, once=True) == once
