import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.autoencoder.prompts import PromptTemplates, build_reconstructor_prompt, encode_reconstructor
from nla_jax.autoencoder.reconstructor import Reconstructor, mse_loss
from nla_jax.lm.transformer import Transformer

LAYER = 1
RNG = np.random.default_rng(0)
TARGETS = jnp.asarray(RNG.standard_normal((4, 32)), jnp.float32)
TEXTS = ["a list of functions", "x", "how to parse a string", None]


@pytest.fixture(scope="module")
def reconstructor(tiny_lm):
    prompt = build_reconstructor_prompt(tiny_lm.tokenizer, PromptTemplates())
    assert prompt.prefix
    return Reconstructor(tiny_lm.config.truncated(LAYER), prompt)


@pytest.fixture(scope="module")
def prompts(reconstructor, tiny_lm):
    ids, lengths = encode_reconstructor(tiny_lm.tokenizer, reconstructor.prompt, TEXTS, 40)
    assert len(set(lengths.tolist())) > 2
    return jnp.asarray(ids), jnp.asarray(lengths)


def plain_stream(config, params, prefix, ids, lengths):
    """Layer LAYER at each row's last token, from whole rows: no sharing, and padding left to causality."""
    prefixes = jnp.tile(jnp.array(prefix, jnp.int32), (len(ids), 1))
    rows = jnp.concatenate([prefixes, ids], axis=1)
    out = Transformer(config).apply({"params": params}, rows, capture=(LAYER,))
    return out.resid[LAYER][jnp.arange(len(ids)), len(prefix) + lengths - 1]


def test_identity_head_gives_the_target_models_residual_stream(tiny_lm, reconstructor, prompts):
    prediction = jax.jit(reconstructor)(reconstructor.init(tiny_lm.params), *prompts)
    expected = jax.jit(lambda p: plain_stream(tiny_lm.config, p, reconstructor.prompt.prefix, *prompts))(
        tiny_lm.params
    )
    np.testing.assert_allclose(prediction, expected, rtol=1e-4, atol=1e-4)


def test_parameters_are_the_first_blocks_and_a_head(tiny_lm, reconstructor):
    params = reconstructor.init(tiny_lm.params)
    assert params["lm"].keys() == {"embed", "blocks_0", "blocks_1"}
    np.testing.assert_array_equal(params["head"]["kernel"], np.eye(32))


@pytest.mark.parametrize("spare", [None, 0])
def test_loss_and_gradients_equal_whole_rows(tiny_lm, reconstructor, prompts, spare):
    ids, lengths = prompts
    token_budget = None if spare is None else int(lengths.sum()) + spare
    assert token_budget is None or token_budget < ids.size
    params = reconstructor.init(tiny_lm.params)
    params["head"]["kernel"] += 0.1 * jnp.asarray(RNG.standard_normal((32, 32)), jnp.float32)

    def shared(params):
        saving = dataclasses.replace(reconstructor, remat=True)
        return mse_loss(saving, params, ids, lengths, TARGETS, token_budget).sum()

    def plain(params):
        stream = plain_stream(reconstructor.config, params["lm"], reconstructor.prompt.prefix, ids, lengths)
        prediction = stream @ params["head"]["kernel"]
        norms = jnp.linalg.norm(prediction, axis=1) * jnp.linalg.norm(TARGETS, axis=1)
        return (2 - 2 * (prediction * TARGETS).sum(1) / norms).sum()

    (loss, grads), (plain_value, plain_grads) = (
        jax.jit(jax.value_and_grad(f))(params) for f in (shared, plain)
    )
    np.testing.assert_allclose(loss, plain_value, rtol=1e-5)

    def close(path, a, b):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(close, grads, plain_grads)


def test_padding_is_invisible(tiny_lm, reconstructor, prompts):
    ids, lengths = prompts
    params = reconstructor.init(tiny_lm.params)
    wider = jnp.where(jnp.arange(48) < lengths[:, None], jnp.pad(ids, ((0, 0), (0, 8))), 77)
    run = jax.jit(reconstructor)
    np.testing.assert_allclose(run(params, wider, lengths), run(params, ids, lengths), rtol=1e-4, atol=1e-5)


def test_a_template_without_a_shared_prefix(tiny_lm):
    prompt = build_reconstructor_prompt(
        tiny_lm.tokenizer, PromptTemplates(reconstructor="{explanation}\nThe text goes on:")
    )
    assert prompt.prefix == ()
    reconstructor = Reconstructor(tiny_lm.config.truncated(LAYER), prompt)
    params = reconstructor.init(tiny_lm.params)
    ids, lengths = map(jnp.asarray, encode_reconstructor(tiny_lm.tokenizer, prompt, TEXTS[:2], 24))
    expected = jax.jit(lambda p: plain_stream(reconstructor.config, p, (), ids, lengths))(params["lm"])
    np.testing.assert_allclose(jax.jit(reconstructor)(params, ids, lengths), expected, rtol=1e-4, atol=1e-4)


def test_layer_outside_the_model_is_an_error(tiny_lm):
    with pytest.raises(ValueError, match="layer 4 is outside the model: it has blocks 0 to 3"):
        tiny_lm.config.truncated(4)
