import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.lm import logits as logits_module
from nla_jax.lm.logits import exact_kl, head_kernel, logits, token_statistics

B, T = 3, 101
RNG = np.random.default_rng(0)
FINAL = jnp.asarray(RNG.standard_normal((B, T, 32)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(0, 512, (B, T)))
PROBE = jnp.asarray(RNG.standard_normal((B, T)), jnp.float32)


SOFTCAP = 3.0


@pytest.fixture(scope="module", params=["tied", "untied", "capped"])
def head(request, tiny_lm):
    """Config and the parameters that the head is made of."""
    params = {"embed": tiny_lm.params["embed"]}
    if request.param == "untied":
        kernel = jnp.asarray(RNG.standard_normal((32, 512)), jnp.float32)
        params["lm_head"] = {"kernel": kernel}
    if request.param == "capped":
        return dataclasses.replace(tiny_lm.config, logit_softcap=SOFTCAP), params
    return dataclasses.replace(tiny_lm.config, tie_embeddings=request.param == "tied"), params


def plain_logits(head, final, params=None):
    config, own = head
    params = own if params is None else params
    kernel = params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"].T
    scores = final @ kernel
    return SOFTCAP * jnp.tanh(scores / SOFTCAP) if config.logit_softcap else scores


def plain_log_prob(head, final, temperature, params=None):
    log_probs = jax.nn.log_softmax(plain_logits(head, final, params) / temperature)
    return jnp.take_along_axis(log_probs, TARGETS[..., None], -1)[..., 0], log_probs


def assert_trees_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


@pytest.fixture(autouse=True)
def two_chunks_with_padding(monkeypatch):
    """The tokens make two chunks, and the last one is not full."""
    tokens = 200
    monkeypatch.setattr(logits_module, "CHUNK_LOGITS", tokens * 512)
    assert tokens < B * T < 2 * tokens and B * T % 2


def test_no_more_logits_exist_than_the_limit(head):
    config, params = head
    made = jax.make_jaxpr(lambda x: token_statistics(params, config, x, TARGETS))(FINAL)
    sizes = re.findall(r"f32\[(\d+),512\]", str(made))
    assert {int(rows) for rows in sizes} <= {32, 152}


def test_logits(head):
    config, params = head
    np.testing.assert_allclose(logits(params, config, FINAL), plain_logits(head, FINAL), atol=1e-4)
    assert head_kernel(params).shape == (32, 512)


def test_logits_round_operands_in_bfloat16(head):
    config, params = dataclasses.replace(head[0], dtype="bfloat16"), head[1]
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    out = logits(params, config, FINAL)
    assert out.dtype == jnp.float32
    expected = plain_logits((config, rounded), FINAL.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_statistics_equal_plain_log_softmax(head, temperature):
    config, params = head
    statistics = jax.jit(lambda t: token_statistics(params, config, FINAL, TARGETS, temperature=t))(
        temperature
    )
    expected, log_probs = plain_log_prob(head, FINAL, temperature)
    np.testing.assert_allclose(statistics.log_prob, expected, atol=1e-4)
    np.testing.assert_allclose(statistics.entropy, -(jnp.exp(log_probs) * log_probs).sum(-1), atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_statistics_gradients_equal_plain_log_softmax(head, temperature):
    config, params = head

    def chunked(params, final):
        return (
            token_statistics(params, config, final, TARGETS, temperature=temperature).log_prob * PROBE
        ).sum()

    def plain(params, final):
        return (plain_log_prob(head, final, temperature, params)[0] * PROBE).sum()

    assert_trees_close(*(jax.jit(jax.grad(f, argnums=(0, 1)))(params, FINAL) for f in (chunked, plain)))


def test_certain_token_has_no_entropy_and_finite_gradients(head):
    config, params = head
    loud = FINAL * 1e4
    best = plain_logits(head, loud).argmax(-1)

    def run(final):
        statistics = token_statistics(params, config, final, best)
        return statistics.log_prob.sum(), statistics

    grad, statistics = jax.grad(run, has_aux=True)(loud)
    # Capped logits leave the other tokens a chance.
    np.testing.assert_allclose(statistics.log_prob, 0, atol=10 if config.logit_softcap else 1e-3)
    assert np.isfinite(grad).all() and np.isfinite(statistics.entropy).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_exact_kl_and_its_gradients_equal_plain(head, temperature):
    config, params = head
    reference = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), params)
    reference_final = FINAL + 0.1

    def chunked(params, final):
        kl_BT = exact_kl(params, reference, config, final, reference_final, temperature=temperature)
        return (kl_BT * PROBE).sum(), kl_BT

    def plain(params, final):
        log_p = jax.nn.log_softmax(plain_logits(head, final, params) / temperature)
        log_q = jax.nn.log_softmax(plain_logits(head, reference_final, reference) / temperature)
        kl_BT = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
        return (kl_BT * PROBE).sum(), kl_BT

    (grads, kl_BT), (plain_grads, plain_kl_BT) = (
        jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(params, FINAL) for f in (chunked, plain)
    )
    np.testing.assert_allclose(kl_BT, plain_kl_BT, atol=1e-4)
    assert kl_BT.max() > 0.01
    assert_trees_close(grads, plain_grads)


def test_exact_kl_of_a_model_to_itself_is_zero(head):
    config, params = head
    np.testing.assert_allclose(exact_kl(params, params, config, FINAL, FINAL), 0, atol=1e-5)
