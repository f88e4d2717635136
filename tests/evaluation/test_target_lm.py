import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.evaluation.target_lm import TargetLM
from nla_jax.lm.logits import logits
from nla_jax.lm.transformer import Injection, Transformer

LAYER = 2
LENGTH = 64
TEXTS = [
    "Return a list of the words in the string",
    "Parse one argument",
    "A dictionary that maps every key to a count of its values, and more words to make it long enough",
]


@pytest.fixture(scope="module")
def target(tiny_lm):
    return TargetLM(tiny_lm, tiny_lm.config, LAYER, batch_tokens=256)


@functools.partial(jax.jit, static_argnames="config")
def whole_forward(params, config, tokens_BT):
    """The log-probs and captured activations of one text a row, in one plain pass."""
    out = Transformer(config).apply({"params": params}, tokens_BT, capture=(LAYER,))
    return jax.nn.log_softmax(logits(params, config, out.final_BTD)), out.resid[LAYER]


def seen(target, ids):
    """Both for one text; all are padded behind to one length, which causal attention does not notice."""
    padded = jnp.array([ids + [0] * (LENGTH - len(ids))])
    return (found[0, : len(ids)] for found in whole_forward(target.lm.params, target.config, padded))


def test_likelihoods_are_those_of_the_whole_text(target):
    options = [[" of words", " and an error is raised", " x"]] * len(TEXTS)
    found, tokens = target.log_likelihood(TEXTS, options)
    for text, row, counts, row_options in zip(TEXTS, found, tokens, options, strict=True):
        prompt = target.encode(text)
        for option, value, count in zip(row_options, row, counts, strict=True):
            answer = target.continuation(option)
            log_p, _ = seen(target, prompt + answer)
            own = sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
            assert value == pytest.approx(own, abs=2e-4) and count == len(answer)


def test_likelihood_needs_options(target):
    with pytest.raises(ValueError, match="as many options"):
        target.log_likelihood(TEXTS[:2], [["a"], ["a", "b"]])
    with pytest.raises(ValueError, match="no tokens"):
        target.log_likelihood(TEXTS[:1], [["a", ""]])


def test_activations_are_those_of_the_last_tokens(target):
    found = target.activations(TEXTS, last=2)
    for text, own in zip(TEXTS, found, strict=True):
        _, resid_TD = seen(target, target.encode(text))
        np.testing.assert_allclose(own, resid_TD[-2:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="fewer than the 99"):
        target.activations(TEXTS, last=99)


def test_divergence_of_an_exchanged_activation(target):
    own = target.activations(TEXTS)[:, 0]
    other = np.roll(own, 1, axis=0)
    found, there = target.divergence(TEXTS, np.stack([own, other], axis=1))
    np.testing.assert_allclose(there, own, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[:, 0], 0, atol=1e-5)
    for text, vector, value in zip(TEXTS, other, found[:, 1], strict=True):
        ids = target.encode(text)
        inject = Injection(jnp.array([vector]), slot=len(ids) - 1, layer=LAYER)
        out = Transformer(target.config).apply({"params": target.lm.params}, jnp.array([ids]), inject=inject)
        log_q = jax.nn.log_softmax(logits(target.lm.params, target.config, out.final_BTD))[0, -1]
        log_p = next(seen(target, ids))[-1]
        assert value == pytest.approx(float(jnp.sum(jnp.exp(log_p) * (log_p - log_q))), rel=1e-3)
        assert value > 0.01
