import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.lm.config import Experts, LMConfig
from nla_jax.lm.moe import RoutedMLP, grouped_matmul

E, K, D, F = 5, 2, 6, 7
CONFIG = LMConfig(
    "qwen3_moe", 10, D, 1, 2, 1, 3, 8, experts=Experts(E, K, F), expert_layers=(True,), tie_embeddings=True
)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 9, D)), jnp.float32)
PARAMS = {
    name: jnp.asarray(RNG.standard_normal(shape) / 2, jnp.float32)
    for name, shape in {"router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}.items()
}


def every_expert(params, x, normalize):
    """The sum over all experts of what they give every token, unchosen ones weighted by zero."""
    scores = jax.nn.softmax(x @ params["router"])
    kept = jnp.where(scores >= jnp.sort(scores)[..., -K, None], scores, 0)
    shares = kept / kept.sum(-1, keepdims=True) if normalize else kept
    gate, up = (jnp.einsum("btd,edf->btef", x, params[name]) for name in ("gate", "up"))
    return jnp.einsum("btef,efd,bte->btd", jax.nn.silu(gate) * up, params["down"], shares)


@pytest.mark.parametrize("normalize", [True, False])
def test_values_and_gradients_equal_running_every_expert(normalize):
    experts = dataclasses.replace(CONFIG.experts, normalize=normalize)
    model = RoutedMLP(dataclasses.replace(CONFIG, experts=experts))

    def with_gradient(run):
        def loss(params, x):
            out = run(params, x)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(PARAMS, X)

    actual = with_gradient(lambda params, x: model.apply({"params": params}, x))
    expected = with_gradient(lambda params, x: every_expert(params, x, normalize))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


def test_a_tokens_result_depends_on_no_other_token():
    model = RoutedMLP(CONFIG)
    whole = model.apply({"params": PARAMS}, X)
    alone = model.apply({"params": PARAMS}, X[1:, 4:5])
    np.testing.assert_allclose(alone[0, 0], whole[1, 4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouped_matmul_rounds_operands_and_keeps_float32(dtype):
    sizes = np.array([3, 0, 4, 1])
    rows, kernel = (jnp.asarray(RNG.standard_normal(s), jnp.float32) for s in ((8, D), (4, D, F)))
    probe = jnp.asarray(RNG.standard_normal((8, F))).astype(dtype).astype(jnp.float32)
    rounded = [np.asarray(x.astype(dtype), np.float64) for x in (rows, kernel)]
    group = np.repeat(np.arange(4), sizes)
    run = jax.jit(
        lambda r, k, p: (lambda out, pull: (out, *pull(p)))(
            *jax.vjp(lambda r, k: grouped_matmul(r, k, jnp.asarray(sizes), jnp.dtype(dtype)), r, k)
        )
    )
    out, grad_rows, grad_kernel = run(rows, kernel, probe)
    assert out.dtype == grad_rows.dtype == grad_kernel.dtype == jnp.float32
    expected = np.einsum("mi,mio->mo", rounded[0], rounded[1][group])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        grad_rows, np.einsum("mo,mio->mi", probe, rounded[1][group]), rtol=1e-5, atol=1e-5
    )
    for e in range(4):
        wanted = rounded[0][group == e].T @ np.asarray(probe)[group == e]
        np.testing.assert_allclose(grad_kernel[e], wanted, rtol=1e-5, atol=1e-5)
