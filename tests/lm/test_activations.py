import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.lm.activations import residual_of
from nla_jax.lm.transformer import Transformer, stack_blocks

LAYER = 2
TEXT = "The array has a shape, and the array has a type."
CHAT = [{"role": "user", "content": "a shape"}, {"role": "assistant", "content": "the type"}]


def plain_forward(lm, ids):
    """The residual stream after `LAYER` of unpadded ids, by one call of the transformer."""
    run = jax.jit(
        lambda tokens_BT: Transformer(lm.config).apply({"params": lm.params}, tokens_BT, capture=(LAYER,))
    )
    return np.asarray(run(jnp.array([ids])).resid[LAYER][0])


@pytest.fixture(scope="module")
def acts(tiny_lm):
    return tiny_lm.activations(TEXT, layer=LAYER)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 130])
def test_padding_changes_nothing(tiny_lm, count):
    ids = np.random.default_rng(count).integers(4, 512, count).tolist()
    found_TD = residual_of(tiny_lm.params, tiny_lm.config, ids, LAYER)
    assert found_TD.shape == (count, 32) and found_TD.dtype == np.float32
    np.testing.assert_allclose(found_TD, plain_forward(tiny_lm, ids), rtol=1e-4, atol=1e-5)


def test_stacked_blocks_give_the_same(tiny_lm):
    stacked = stack_blocks(tiny_lm.params)
    ids = tiny_lm.tokenizer.encode(TEXT)
    expected_TD = residual_of(tiny_lm.params, tiny_lm.config, ids, LAYER)
    np.testing.assert_allclose(
        residual_of(stacked, tiny_lm.config, ids, LAYER), expected_TD, rtol=1e-4, atol=1e-5
    )


def test_texts_up_to_the_context_length(tiny_lm):
    # A limit between two of the lengths that are compiled for is not padded beyond.
    config = dataclasses.replace(tiny_lm.config, max_positions=40)
    ids = list(range(4, 44))
    assert residual_of(tiny_lm.params, config, ids, 0).shape == (40, 32)
    with pytest.raises(
        ValueError, match="the text has 41 tokens, more than the 40 that the model was made for; cut it"
    ):
        residual_of(tiny_lm.params, config, [*ids, 4], 0)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_there_is_not(tiny_lm, layer):
    with pytest.raises(ValueError, match=f"layer {layer}|layer={layer}"):
        residual_of(tiny_lm.params, tiny_lm.config, [5], layer)


def test_activations_are_those_of_their_tokens(tiny_lm, acts):
    ids = tiny_lm.tokenizer.encode(TEXT)
    np.testing.assert_allclose(np.asarray(acts), plain_forward(tiny_lm, ids), rtol=1e-4, atol=1e-5)
    assert acts.text == "".join(acts.tokens) == TEXT and acts.layer == LAYER
    assert acts.positions == tuple(range(len(ids))) and acts.roles == [None] * len(ids)
    assert [TEXT[start:end] for start, end in acts.spans] == acts.tokens


def test_several_texts_are_read_one_by_one(tiny_lm, acts):
    short, same = tiny_lm.activations(["a type", TEXT], layer=LAYER)
    np.testing.assert_array_equal(same.vectors_ND, acts.vectors_ND)
    assert short.text == "a type"


def test_a_bos_has_no_row(tiny_lm):
    opened = tiny_lm.activations(messages=CHAT, layer=LAYER)
    assert opened.source.starts_with_bos and opened.positions[0] == 1
    expected_TD = plain_forward(tiny_lm, opened.source.ids)
    np.testing.assert_allclose(opened.vectors_ND, expected_TD[1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"positions \[0\] are not among these activations, which have \[1, 2"
    ):
        opened.at([0])


def assert_rows(acts, chosen, positions):
    assert list(chosen.positions) == list(positions)
    np.testing.assert_array_equal(chosen.vectors_ND, acts.vectors_ND[list(positions)])
    assert chosen.tokens == [acts.tokens[p] for p in positions] and chosen.source is acts.source


def test_rows_by_number(acts):
    count = len(acts)
    assert_rows(acts, acts[3], [3])
    assert_rows(acts, acts[np.int64(3)], [3])
    assert_rows(acts, acts[-1], [count - 1])
    assert_rows(acts, acts[2:5], [2, 3, 4])
    assert_rows(acts, acts[::-1], range(count - 1, -1, -1))
    assert_rows(acts, acts[[5, 1, 1, -1]], [5, 1, 1, count - 1])
    assert_rows(acts, acts[np.arange(count) % 2 == 1], range(1, count, 2))
    # Rows of chosen rows are counted among these, positions in the text.
    assert_rows(acts, acts[2:9][[0, -1]], [2, 8])
    assert_rows(acts, acts[2:9].at([8, 2]), [8, 2])
    assert [one.positions for one in acts[3:5]] == [(3,), (4,)]


def test_rows_that_there_are_not(acts):
    count = len(acts)
    for row in (count, -count - 1):
        with pytest.raises(
            IndexError, match=f"row {row} is outside these activations: they have rows 0 to {count - 1}"
        ):
            acts[row]
    for none in (slice(3, 3), [], np.zeros(count, bool)):
        with pytest.raises(ValueError, match=f"chooses none of the {count} rows; choose at least one"):
            acts[none]
    with pytest.raises(ValueError, match=f"position {count} is outside the text"):
        acts.at([count])
    with pytest.raises(
        ValueError, match=r"positions \[0\] are not among these activations, which have \[3, 4\]"
    ):
        acts[3:5].at([4, 0])


def test_rows_by_position_from_the_end(acts):
    assert_rows(acts, acts.at([-1, 0]), [len(acts) - 1, 0])


def test_rows_by_phrase_and_pattern(acts):
    found = acts.phrase("the array")
    assert "".join(found.tokens).strip() == "the array"
    both = acts.match("[Tt]he array")
    assert len(both) > len(found) and set(found.positions) < set(both.positions)
    # A phrase is no pattern.
    assert acts.phrase(".").positions == (len(acts) - 1,)
    assert len(acts.match(".")) == len(acts)
    with pytest.raises(ValueError, match="nothing in the text matches"):
        acts.phrase("no such")
    with pytest.raises(
        ValueError, match="none of these 2 activations lies at a match of 'type'; choose from the whole"
    ):
        acts[:2].match("type")


def test_rows_by_role_and_turn(tiny_lm):
    acts = tiny_lm.activations(messages=CHAT, layer=LAYER)
    assert "".join(acts.role("user").tokens) == "a shape"
    assert "".join(acts.role("assistant").tokens) == "the type"
    assert set(acts.role("assistant").roles) == {"assistant"}
    last = acts.last_of_turn()
    assert [last.text[start:end] for start, end in last.spans] == [
        acts.role(role).tokens[-1] for role in ("user", "assistant")
    ]
    with pytest.raises(
        ValueError, match="no token has the role 'tool'; the roles of this text are assistant, user"
    ):
        acts.role("tool")
    with pytest.raises(ValueError, match="none of these 1 activations lies at a token of role 'assistant'"):
        acts.role("user")[0].role("assistant")
    with pytest.raises(ValueError, match="plain text has no turns"):
        tiny_lm.activations("a text", layer=LAYER).last_of_turn()


def test_as_an_array(acts):
    np.testing.assert_array_equal(np.asarray(acts), acts.vectors_ND)
    assert np.asarray(acts[2]).shape == (1, 32)
    assert np.asarray(acts, np.float16).dtype == np.float16
    assert np.stack([acts[0], acts[1]]).shape == (2, 1, 32)
    np.testing.assert_array_equal(jnp.asarray(np.asarray(acts[:2])).sum(0), acts.vectors_ND[:2].sum(0))


def test_in_words(acts):
    assert repr(acts[:2]) == f"Activations(2 tokens of layer 2, d 32: {''.join(acts.tokens[:2])!r})"
    assert repr(acts) == f"Activations({len(acts)} tokens of layer 2, d 32: {TEXT!r})"
