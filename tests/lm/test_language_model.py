import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.lm.language_model import LanguageModel
from nla_jax.lm.logits import logits
from nla_jax.lm.transformer import Injection, Transformer, stack_blocks

PROMPT = "The array has"
CHAT = [{"role": "user", "content": "What is a shape?"}]
TOKENS = 6


@functools.partial(jax.jit, static_argnames="config")
def scores(params, tokens_1T, inject, *, config):
    """Next-token scores (T, V) of one plain forward."""
    out = Transformer(config).apply({"params": params}, tokens_1T, inject=inject)
    return logits(params, config, out.final_BTD)[0]


def greedy(lm, ids, inject=None):
    """The likeliest continuation by whole forwards, one a token, until the end token."""
    tokens_1T = np.zeros((1, len(ids) + TOKENS), np.int32)
    tokens_1T[0, : len(ids)] = ids
    for at in range(len(ids), tokens_1T.shape[1]):
        tokens_1T[0, at] = scores(lm.params, tokens_1T, inject, config=lm.config)[at - 1].argmax()
        if tokens_1T[0, at] == lm.tokenizer.eos_token_id:
            break
    return lm.tokenizer.decode(tokens_1T[0, len(ids) : at + 1], skip_special_tokens=True)


def test_greedy_generation_is_repeated_argmax(tiny_lm):
    expected = greedy(tiny_lm, tiny_lm.tokenizer.encode(PROMPT))
    assert len(expected) > 4
    assert tiny_lm.generate(PROMPT, max_tokens=TOKENS) == expected


def test_answers_to_messages(tiny_lm):
    source = tiny_lm.tokenize(messages=CHAT)
    assert source.text.endswith("What is a shape?<|im_end|>\n<|im_start|>assistant\n")
    assert tiny_lm.generate(messages=CHAT, max_tokens=TOKENS) == greedy(tiny_lm, source.ids)


@pytest.mark.parametrize(("layer", "mode"), [(1, "replace"), (-1, "replace"), (0, "add")])
def test_an_injection_is_that_of_the_forward(tiny_lm, layer, mode):
    vector_1D = 20 * jax.random.normal(jax.random.key(3), (1, 32))
    slot = len(tiny_lm.tokenizer.encode(PROMPT)) - 1
    inject = Injection(vector_1D, slot=slot, layer=layer, mode=mode)
    written = tiny_lm.generate(PROMPT, inject=inject, max_tokens=TOKENS)
    assert written == greedy(tiny_lm, tiny_lm.tokenizer.encode(PROMPT), inject)
    assert written != tiny_lm.generate(PROMPT, max_tokens=TOKENS)


def test_a_slot_outside_the_prompt(tiny_lm):
    count = len(tiny_lm.tokenizer.encode(PROMPT))
    for slot in (count, -1):
        with pytest.raises(
            ValueError, match=rf"slot {slot} is outside the prompt: it has tokens 0 to {count - 1}"
        ):
            tiny_lm.generate(PROMPT, inject=Injection(jnp.zeros((1, 32)), slot=slot, layer=1))


def test_several_samples(tiny_lm):
    texts = tiny_lm.generate(PROMPT, samples=4, temperature=1.0, max_tokens=TOKENS)
    assert len(texts) == 4 and len(set(texts)) > 1
    assert texts == tiny_lm.generate(PROMPT, samples=4, temperature=1.0, max_tokens=TOKENS)
    assert texts != tiny_lm.generate(PROMPT, samples=4, temperature=1.0, max_tokens=TOKENS, seed=1)
    # Without a temperature all are the likeliest.
    assert (
        tiny_lm.generate(PROMPT, samples=4, max_tokens=TOKENS)
        == [tiny_lm.generate(PROMPT, max_tokens=TOKENS)] * 4
    )


def test_stacked_blocks_write_the_same(tiny_lm):
    stacked = LanguageModel(tiny_lm.config, stack_blocks(tiny_lm.params), tiny_lm.tokenizer, tiny_lm.name)
    inject = Injection(jnp.full((1, 32), 3.0), slot=1, layer=0)
    for settings in ({}, {"inject": inject}, {"samples": 3, "temperature": 1.0}):
        expected = tiny_lm.generate(PROMPT, max_tokens=TOKENS, **settings)
        assert stacked.generate(PROMPT, max_tokens=TOKENS, **settings) == expected
    expected = tiny_lm.activations(PROMPT, layer=1).vectors_ND
    np.testing.assert_allclose(
        stacked.activations(PROMPT, layer=1).vectors_ND, expected, rtol=1e-4, atol=1e-5
    )


def test_neither_or_both_of_text_and_messages(tiny_lm):
    for arguments in ({}, {"text": PROMPT, "messages": CHAT}):
        with pytest.raises(ValueError, match="give either a text or messages"):
            tiny_lm.tokenize(**arguments)
    with pytest.raises(ValueError, match="give either a text or messages"):
        tiny_lm.generate(max_tokens=1)
    with pytest.raises(ValueError, match="has no tokens"):
        tiny_lm.generate("")


def test_more_than_the_context_holds(tiny_lm):
    count = len(tiny_lm.tokenizer.encode(PROMPT))
    with pytest.raises(
        ValueError, match=f"a prompt of {count} tokens and {513 - count} more exceed the 512 that the"
    ):
        tiny_lm.generate(PROMPT, max_tokens=513 - count)
