import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.lm.attention import PAD_POSITION
from nla_jax.lm.transformer import (
    EMBEDDING_LAYER,
    Injection,
    Transformer,
    extend,
    init_params,
    stack_blocks,
    unit,
    unstack_blocks,
)

RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(4, 500, (2, 9)))
LAYERS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def forward(tiny_lm):
    """The compiled forward with the tiny model's weights bound."""
    model = Transformer(tiny_lm.config)
    apply = jax.jit(model.apply, static_argnames=("capture", "stop_after"))
    return lambda *args, **kwargs: apply({"params": tiny_lm.params}, *args, **kwargs)


def assert_trees_close(actual, expected, tolerance=1e-4):
    """Compare leaves by their norms, so that small entries of large gradients do not decide."""

    def close(path, a, b):
        error = np.linalg.norm(np.asarray(a - b)) / max(np.linalg.norm(np.asarray(b)), 1e-12)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"

    jax.tree_util.tree_map_with_path(close, actual, expected)


def test_unit_is_one_long_and_has_a_finite_gradient_at_zero():
    np.testing.assert_allclose(unit(jnp.array([3.0, 4.0])), [0.6, 0.8], atol=1e-6)
    assert np.isfinite(jax.grad(lambda v: unit(v).sum())(jnp.zeros(4))).all()


def test_later_positions_and_layers_depend_on_an_injection_and_no_others(tiny_lm, forward):
    """Causality, by gradients: entry (layer, t) of the map says whether the injection at slot 4 reaches it."""
    slot, probe = 4, RNG.standard_normal(tiny_lm.config.d_model).astype(np.float32)

    def reached(layer):
        def readings(vectors):
            out = forward(TOKENS, inject=Injection(vectors, slot, layer), capture=LAYERS)
            return jnp.stack([out.resid[k] @ probe for k in LAYERS] + [out.final_BTD @ probe])[:, 0]

        return np.abs(jax.jacobian(readings)(jnp.ones((2, 32)))[:, :, 0]).sum(-1) > 0

    for layer in (EMBEDDING_LAYER, 1):
        expected = np.zeros((5, 9), bool)
        expected[max(layer, 0) :, slot:] = True
        if layer >= 0:
            # In its own layer only the slot is touched: attention spreads it from the next block on.
            expected[layer] = np.arange(9) == slot
        np.testing.assert_array_equal(reached(layer), expected)


@pytest.mark.parametrize("layer", [EMBEDDING_LAYER, 0, 2])
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_injection_changes_values_from_its_place_on(forward, layer, mode):
    slot, vectors = 3, 5 * RNG.standard_normal((2, 32)).astype(np.float32)
    plain = forward(TOKENS, capture=LAYERS)
    out = forward(TOKENS, inject=Injection(jnp.asarray(vectors), slot, layer, mode), capture=LAYERS)
    for k in LAYERS:
        changed = np.abs(out.resid[k] - plain.resid[k]).max((0, 2)) > 1e-4
        before = k < layer
        only_slot = k == layer
        expected = [not before and (t == slot if only_slot else t >= slot) for t in range(9)]
        np.testing.assert_array_equal(changed, expected, err_msg=f"layer {k}")
    if layer != EMBEDDING_LAYER:
        there = np.asarray(plain.resid[layer][:, slot])
        length = np.linalg.norm(there, axis=1, keepdims=True)
        direction = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        expected = vectors if mode == "replace" else there + direction * length
        np.testing.assert_allclose(out.resid[layer][:, slot], expected, rtol=1e-4, atol=1e-4)


def test_injecting_a_tokens_own_embedding_changes_nothing(tiny_lm, forward):
    embedding = tiny_lm.params["embed"]["embedding"][TOKENS[:, 2]]
    out = forward(TOKENS, inject=Injection(embedding, slot=2))
    np.testing.assert_array_equal(out.final_BTD, forward(TOKENS).final_BTD)


def test_an_injection_serves_a_group_of_rows(tiny_lm, forward):
    vectors = jax.random.normal(jax.random.key(3), (2, tiny_lm.config.d_model))
    tokens = jnp.tile(TOKENS[:1], (6, 1))
    shared = forward(tokens, inject=Injection(vectors, 1, EMBEDDING_LAYER), capture=(EMBEDDING_LAYER, 2))
    alone = forward(tokens, inject=Injection(jnp.repeat(vectors, 3, axis=0), 1), capture=(EMBEDDING_LAYER, 2))
    np.testing.assert_array_equal(shared.resid[EMBEDDING_LAYER][:, 1], np.repeat(vectors, 3, axis=0))
    np.testing.assert_array_equal(shared.resid[2], alone.resid[2])


@pytest.mark.parametrize(
    "ask",
    [
        {"capture": (3,), "stop_after": 2},
        {"capture": (-2,)},
        {"inject": Injection(jnp.ones((1, 32)), layer=3), "stop_after": 2},
        {"stop_after": 9},
    ],
)
def test_layers_that_do_not_run_are_refused(forward, ask):
    with pytest.raises(ValueError, match=r"blocks 0 to 2 run|blocks 0 to 3"):
        forward(TOKENS, **ask)


def test_tokens_do_not_reach_earlier_positions(forward):
    other = forward(TOKENS.at[:, 5].add(1)).final_BTD
    difference = np.abs(forward(TOKENS).final_BTD - other).max((0, 2))
    np.testing.assert_array_equal(difference > 0, np.arange(9) >= 5)


def test_stop_after_runs_fewer_blocks_and_gives_the_same_stream(forward):
    stopped, whole = forward(TOKENS, capture=(1,), stop_after=1), forward(TOKENS, capture=(1,))
    np.testing.assert_allclose(stopped.resid[1], whole.resid[1], rtol=1e-6, atol=1e-6)
    assert len(stopped.segments) == 2 and len(whole.segments) == 4
    assert stopped.final_BTD is None


def test_stop_after_needs_no_later_weights(tiny_lm):
    params = {name: tiny_lm.params[name] for name in ("embed", "blocks_0", "blocks_1")}
    out = Transformer(tiny_lm.config.truncated(1)).apply({"params": params}, TOKENS, capture=(1,))
    whole = Transformer(tiny_lm.config).apply({"params": tiny_lm.params}, TOKENS, capture=(1,))
    np.testing.assert_allclose(out.resid[1], whole.resid[1], rtol=1e-6, atol=1e-6)
    assert out.final_BTD is None


@pytest.mark.parametrize("place", [0, 4, 9])
def test_padding_anywhere_is_invisible(forward, place):
    padded = jnp.insert(TOKENS, jnp.array([place, place]), 7, axis=1)
    positions = jnp.asarray(np.insert(np.tile(np.arange(9), (2, 1)), [place, place], PAD_POSITION, axis=1))
    out = forward(padded, positions).final_BTD
    kept = positions[0] != PAD_POSITION
    np.testing.assert_allclose(out[:, kept], forward(TOKENS).final_BTD, rtol=1e-5, atol=1e-5)
    assert np.isfinite(out).all()


def test_rows_do_not_mix(forward):
    np.testing.assert_allclose(
        forward(TOKENS[::-1]).final_BTD, forward(TOKENS).final_BTD[::-1], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("way", ["calls", "one pass", "packed", "packed and scanned", "scanned"])
def test_prefill_in_shared_pieces_equals_the_plain_forward(tiny_lm, way):
    """Prefix (1 row), tails (2 rows) and answers (6 rows): values and gradients as if every row ran alone.

    The shared side recomputes its blocks as well (remat), which must change nothing.
    """
    config = dataclasses.replace(tiny_lm.config, num_layers=2)
    params = {name: tiny_lm.params[name] for name in ("embed", "blocks_0", "blocks_1", "final_norm")}
    prefix, tails, answers = (jnp.asarray(RNG.integers(4, 500, shape)) for shape in (5, (2, 4), (6, 6)))
    whole = jnp.concatenate([jnp.tile(prefix, (6, 1)), jnp.repeat(tails, 3, axis=0), answers], axis=1)
    probe = RNG.standard_normal((6, 15, 32)).astype(np.float32)
    model = Transformer(config, remat=True, pack="packed" in way)

    def plain(params):
        out = Transformer(config).apply({"params": params}, whole, capture=(0,))
        return out.final_BTD[:, 5:], out.resid[0][:, 5:]

    def shared(params):
        def at(start, tokens):
            return jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)

        if "scanned" in way:
            params = stack_blocks(params)
        if way == "calls":
            past = extend(None, model.apply({"params": params}, prefix[None]).segments)
            tail = model.apply({"params": params}, tails, at(5, tails), past=past, capture=(0,))
            past = extend(past, tail.segments)
            answer = model.apply({"params": params}, answers, at(9, answers), past=past, capture=(0,))
            final, resid = (tail.final_BTD, answer.final_BTD), (tail.resid[0], answer.resid[0])
        else:
            positions = jnp.arange(5)[None], at(5, tails), at(9, answers)
            pieces = prefix[None], tails, answers
            out = model.apply({"params": params}, pieces, positions, capture=(0,))
            final, resid = out.final_BTD[1:], out.resid[0][1:]

        def joined(tail_part, answer_part):
            return jnp.concatenate([jnp.repeat(tail_part, 3, axis=0), answer_part], axis=1)

        return joined(*final), joined(*resid)

    def with_gradient(run):
        def loss(params):
            final, resid = run(params)
            return (final * probe[:, 5:]).sum(), (final, resid)

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (shared_grads, shared_values), (plain_grads, plain_values) = with_gradient(shared), with_gradient(plain)
    assert_trees_close(shared_values, plain_values, 1e-5)
    assert_trees_close(shared_grads, plain_grads, 1e-4)


def test_scanned_blocks_continue_inject_and_stop_as_unrolled_ones(tiny_lm):
    stacked = stack_blocks(tiny_lm.params)
    model, vectors = Transformer(tiny_lm.config), jnp.asarray(RNG.standard_normal((2, 32)), jnp.float32)

    @jax.jit
    def run(params):
        before = model.apply({"params": params}, TOKENS[:1, :4])
        positions = jnp.broadcast_to(4 + jnp.arange(5), (2, 5))
        tokens, past = TOKENS[:, 4:], extend(None, before.segments)
        inject = Injection(vectors, 2, 1)
        whole = model.apply(
            {"params": params}, tokens, positions, past=past, inject=inject, capture=(-1, 1, 2, 3)
        )
        part = model.apply({"params": params}, tokens, positions, past=past, capture=(2,), stop_after=2)
        return whole.resid, whole.final_BTD, part.resid

    assert_trees_close(run(stacked), run(tiny_lm.params), 1e-5)


def test_unstacking_undoes_stacking_and_knows_its_own(tiny_lm):
    stacked = stack_blocks(tiny_lm.params)
    assert stacked["blocks"]["mlp"]["up"]["kernel"].shape == (4, 32, 64)
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked), tiny_lm.params)
    same = {"done": stacked, "count": jnp.zeros(3)}
    jax.tree.map(np.testing.assert_array_equal, stack_blocks(same), same)
    jax.tree.map(np.testing.assert_array_equal, stack_blocks({"lm": tiny_lm.params})["lm"], stacked)


def test_bfloat16_stays_close_and_keeps_a_float32_stream(tiny_lm, forward):
    config = dataclasses.replace(tiny_lm.config, dtype="bfloat16")
    out = Transformer(config).apply({"params": tiny_lm.params}, TOKENS, capture=(3,))
    expected = forward(TOKENS, capture=(3,)).resid[3]
    assert out.resid[3].dtype == jnp.float32
    error = np.linalg.norm(out.resid[3] - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 3e-2


def test_init_params_has_the_shapes_of_loaded_weights(tiny_lm):
    def shapes(params):
        return jax.tree.map(lambda x: (x.shape, x.dtype), params)

    untied = dataclasses.replace(tiny_lm.config, tie_embeddings=False)
    head = {"lm_head": {"kernel": ((32, 512), jnp.float32)}}
    key = jax.random.key(0)
    assert shapes(init_params(tiny_lm.config, key)) == shapes(tiny_lm.params)
    assert shapes(init_params(untied, key)) == shapes(tiny_lm.params) | head
