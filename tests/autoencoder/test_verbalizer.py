import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.autoencoder.prompts import PromptTemplates, build_verbalizer_prompt, encode_responses
from nla_jax.autoencoder.verbalizer import InjectionConfig, Verbalizer, sft_loss, token_mask
from nla_jax.lm.transformer import EMBEDDING_LAYER, Injection, Transformer

TEMPLATES = PromptTemplates(verbalizer="Vector: {injection_char}. Explain it.")
RNG = np.random.default_rng(0)
ACTIVATIONS = jnp.asarray(RNG.standard_normal((2, 32)), jnp.float32)
TEXTS = [
    "a list of functions",
    "text",
    "how to parse a string",
    "x",
    "an argument",
    "the <empty_output> marker",
]


@pytest.fixture(scope="module")
def small(tiny_lm):
    """The tiny model's first two blocks under its head: as good for every law here, and faster."""
    params = {name: tiny_lm.params[name] for name in ("embed", "blocks_0", "blocks_1", "final_norm")}
    return dataclasses.replace(
        tiny_lm, config=dataclasses.replace(tiny_lm.config, num_layers=2), params=params
    )


def make(lm, **injection):
    prompt = build_verbalizer_prompt(lm.tokenizer, TEMPLATES)
    return Verbalizer(lm.config, prompt, InjectionConfig(**injection), scale=3.0)


def responses(verbalizer, lm, rows):
    """Encoded answers of unlike lengths; one of them writes the marker."""
    ids, lengths = encode_responses(lm.tokenizer, verbalizer.prompt, TEXTS[-rows:], 24)
    assert (ids == verbalizer.prompt.marker).any() and len(set(lengths.tolist())) > 1
    return jnp.asarray(ids), jnp.asarray(lengths)


def plain_statistics(verbalizer, params, activations, ids, lengths):
    """Log-probs and entropies from whole rows, prompt and answer, each run alone and injected with `replace`/`add`."""
    prompt, group = verbalizer.prompt, len(ids) // len(activations)
    prompt_ids = jnp.array((*prompt.prefix, prompt.marker, *prompt.tail))
    rows = jnp.concatenate([jnp.tile(prompt_ids, (len(ids), 1)), ids], axis=1)
    vectors = activations / jnp.linalg.norm(activations, axis=1, keepdims=True) * verbalizer.scale
    if "affine" in params:
        vectors = vectors @ (jnp.eye(32) + params["affine"]["kernel"]) + params["affine"]["bias"]
    inject = Injection(
        jnp.repeat(vectors, group, axis=0),
        len(prompt.prefix),
        verbalizer.injection.layer,
        verbalizer.injection.mode,
    )
    out = Transformer(verbalizer.config).apply({"params": params["lm"]}, rows, inject=inject)
    log_probs = jax.nn.log_softmax(
        out.final_BTD[:, prompt.length - 1 : -1] @ params["lm"]["embed"]["embedding"].T
    )
    chosen = jnp.take_along_axis(log_probs, ids[..., None], axis=2)[..., 0]
    return chosen, -(jnp.exp(log_probs) * log_probs).sum(-1)


def plain_loss(verbalizer, params, activations, ids, lengths):
    mask = np.arange(ids.shape[1]) < np.asarray(lengths)[:, None]
    return -(plain_statistics(verbalizer, params, activations, ids, lengths)[0] * mask).sum()


def assert_trees_close(actual, expected, tolerance=1e-4):
    def close(path, a, b):
        error = np.linalg.norm(np.asarray(a - b)) / max(np.linalg.norm(np.asarray(b)), 1e-9)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"

    jax.tree_util.tree_map_with_path(close, actual, expected)


@pytest.mark.parametrize(
    ("group", "injection", "spare"),
    [
        (3, {}, None),
        (1, {"layer": 0, "affine": True}, None),
        (3, {"layer": 0, "mode": "add"}, None),
        (3, {"layer": 0}, 0),
        (3, {}, 11),
    ],
    ids=str,
)
def test_shared_computation_equals_whole_rows(small, group, injection, spare):
    """Loss, and gradients for every weight and the activations, as if nothing had been shared or left out."""
    verbalizer = make(small, **injection)
    params = verbalizer.init(small.params)
    if "affine" in params:
        params["affine"]["kernel"] += 0.1 * jnp.asarray(RNG.standard_normal((32, 32)), jnp.float32)
        params["affine"]["bias"] += 0.5
    ids, lengths = responses(verbalizer, small, 2 * group)

    token_budget = None if spare is None else int(lengths.sum()) + spare

    def shared(params, activations):
        return sft_loss(verbalizer, params, activations, ids, lengths, token_budget)[0]

    def plain(params, activations):
        return plain_loss(verbalizer, params, activations, ids, lengths)

    values, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, ACTIVATIONS) for f in (shared, plain)
    )
    assert_trees_close(values, expected)


def test_a_budget_that_holds_not_all_tokens_gives_nothing(small):
    verbalizer = make(small)
    ids, lengths = responses(verbalizer, small, 6)
    token_budget = int(lengths.sum()) - 1
    loss, _ = sft_loss(verbalizer, verbalizer.init(small.params), ACTIVATIONS, ids, lengths, token_budget)
    assert np.isnan(loss)


def test_statistics_equal_whole_rows(small):
    verbalizer = make(small)
    params = verbalizer.init(small.params)
    ids, lengths = responses(verbalizer, small, 6)
    statistics = jax.jit(verbalizer.statistics)(params, ACTIVATIONS, ids, lengths)
    plain = jax.jit(lambda p: plain_statistics(verbalizer, p, ACTIVATIONS, ids, lengths))
    log_prob, entropy = plain(params)
    mask = np.asarray(token_mask(lengths, ids.shape[1]), bool)
    np.testing.assert_allclose(statistics.log_prob[mask], log_prob[mask], atol=1e-4)
    np.testing.assert_allclose(statistics.entropy[mask], entropy[mask], atol=1e-4)


def test_loss_ignores_what_stands_after_a_length(small):
    verbalizer = make(small)
    params = verbalizer.init(small.params)
    ids, lengths = responses(verbalizer, small, 2)
    noise = jnp.where(jnp.arange(ids.shape[1]) < lengths[:, None], ids, 77)
    loss = jax.jit(lambda ids: sft_loss(verbalizer, params, ACTIVATIONS, ids, lengths))
    np.testing.assert_allclose(loss(noise), loss(ids), rtol=1e-6)
    assert loss(ids)[1] == lengths.sum()


def test_only_the_direction_of_an_activation_matters(small):
    verbalizer = make(small)
    params = verbalizer.init(small.params)
    read = jax.jit(lambda h: verbalizer.read(params, h)[1])
    np.testing.assert_allclose(read(100 * ACTIVATIONS), read(ACTIVATIONS), atol=1e-4)
    assert np.abs(read(-ACTIVATIONS) - read(ACTIVATIONS)).max() > 0.1


def test_affine_map_starts_as_the_identity(small):
    plain, affine = make(small), make(small, affine=True)
    ours, expected = (
        jax.jit(lambda h, v=v: v.read(v.init(small.params), h)[1])(ACTIVATIONS) for v in (affine, plain)
    )
    np.testing.assert_array_equal(ours, expected)
    assert "affine" not in plain.init(small.params)


def test_add_keeps_the_norm_of_what_is_there():
    resid = jnp.asarray(RNG.standard_normal((2, 5, 32)), jnp.float32)
    out = Injection(100 * ACTIVATIONS, slot=3, mode="add")(resid)
    added = out[:, 3] - resid[:, 3]
    np.testing.assert_allclose(
        jnp.linalg.norm(added, axis=1), jnp.linalg.norm(resid[:, 3], axis=1), rtol=1e-4
    )
    cosine = (
        (added * ACTIVATIONS).sum(1) / jnp.linalg.norm(added, axis=1) / jnp.linalg.norm(ACTIVATIONS, axis=1)
    )
    np.testing.assert_allclose(cosine, 1, rtol=1e-5)
    np.testing.assert_array_equal(out[:, [0, 1, 2, 4]], resid[:, [0, 1, 2, 4]])


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_samplers_log_probs_are_the_trainers(small, temperature):
    verbalizer = make(small, layer=0)
    params = verbalizer.init(small.params)
    draw = jax.jit(
        lambda t: verbalizer.sample(
            params, ACTIVATIONS, jax.random.key(0), group=3, max_tokens=16, temperature=t
        )
    )
    samples = draw(temperature)
    statistics = jax.jit(verbalizer.statistics)(
        params, ACTIVATIONS, samples.tokens_BT, samples.lengths_B, temperature
    )
    mask = np.asarray(token_mask(samples.lengths_B, 16), bool)
    np.testing.assert_allclose(samples.log_probs_BT[mask], statistics.log_prob[mask], atol=1e-4)
    assert samples.tokens_BT.shape == (6, 16) and mask.sum() > 60


def test_a_sampled_marker_is_plain_text(small):
    """The marker's own vector is replaced, so naming another token as marker changes nothing, even when it is drawn."""
    verbalizer = make(small)
    params = verbalizer.init(small.params)

    def draw(verbalizer):
        return jax.jit(
            lambda params: verbalizer.sample(
                params, ACTIVATIONS, jax.random.key(0), group=3, max_tokens=16, temperature=5.0
            )
        )(params)

    samples = draw(verbalizer)
    marker = int(samples.tokens_BT[0, 2])
    again = draw(
        dataclasses.replace(verbalizer, prompt=dataclasses.replace(verbalizer.prompt, marker=marker))
    )
    np.testing.assert_array_equal(samples.tokens_BT, again.tokens_BT)
    np.testing.assert_allclose(samples.log_probs_BT, again.log_probs_BT, atol=1e-5)


def test_layer_outside_the_model_is_an_error(small):
    with pytest.raises(ValueError, match="layer 2 is outside the model: it has blocks 0 to 1"):
        make(small, layer=2)
    assert make(small, layer=EMBEDDING_LAYER).injection.layer == -1


def test_token_mask():
    np.testing.assert_array_equal(token_mask(jnp.array([0, 2, 3]), 3), [[0, 0, 0], [1, 1, 0], [1, 1, 1]])
