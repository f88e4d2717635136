import jax
import numpy as np
import pytest
from small_nla import random_activations, small_nla

from nla_jax.autoencoder.round_trip import RoundTrip
from nla_jax.lm.transformer import stack_blocks

KEY = jax.random.key(0)
TEXTS = [f"{count} words about a shape, {'and an axis ' * (count % 4)}or {count}" for count in range(21)]


@pytest.fixture(scope="module")
def nla(tiny_lm):
    return small_nla(tiny_lm)


def round_trip(nla, batch_size, scan=False):
    return RoundTrip(nla.autoencoder, nla.mesh, batch_size, scan=scan)


@pytest.fixture(scope="module")
def whole(nla):
    """Texts and vectors of 21 rows, in one whole batch."""
    at_once = round_trip(nla, 21)
    texts = at_once.verbalize(nla.av_params, random_activations(21), KEY, 0.0)
    return texts, at_once.reconstruct(nla.ar_params, TEXTS)


@pytest.mark.parametrize("batch_size", [64, 16])
def test_batches_of_few_rows_give_what_a_whole_batch_gives(nla, whole, batch_size):
    # 64: one filled up to 64 rows; 16: a whole one, and 5 rows filled up.
    texts, rebuilt_ND = whole
    assert len(set(texts)) > 5
    batches = round_trip(nla, batch_size)
    assert batches.verbalize(nla.av_params, random_activations(21), KEY, 0.0) == texts
    np.testing.assert_allclose(batches.reconstruct(nla.ar_params, TEXTS), rebuilt_ND, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [1, 3])
def test_a_few_rows_alone(nla, whole, count):
    texts, rebuilt_ND = whole
    batches = round_trip(nla, 64)
    assert batches.verbalize(nla.av_params, random_activations(21)[:count], KEY, 0.0) == texts[:count]
    rebuilt = batches.reconstruct(nla.ar_params, TEXTS[:count])
    np.testing.assert_allclose(rebuilt, rebuilt_ND[:count], rtol=1e-3, atol=1e-3)


def test_vectors_are_those_of_the_reconstructor(nla, whole):
    prompts_NT, lengths_N = nla.autoencoder.encode(TEXTS)
    expected_ND = jax.jit(nla.autoencoder.reconstructor)(nla.ar_params, prompts_NT, lengths_N)
    np.testing.assert_allclose(whole[1], expected_ND, rtol=1e-3, atol=1e-3)
    directions_ND = whole[1] / np.linalg.norm(whole[1], axis=1, keepdims=True)
    assert (directions_ND @ directions_ND.T).min() < 0.95  # texts are told apart


def test_a_stream_is_the_same_a_batch_at_a_time(nla):
    batches, activations_ND = round_trip(nla, 16), random_activations(21)
    streamed = list(batches.stream(nla.av_params, activations_ND, KEY, 1.0))
    assert [len(texts) for texts in streamed] == [16, 5]
    assert [*streamed[0], *streamed[1]] == batches.verbalize(nla.av_params, activations_ND, KEY, 1.0)
    # The second batch has a key of its own.
    same = np.repeat(activations_ND[:1], 32, axis=0)
    first, second = batches.stream(nla.av_params, same, KEY, 1.0)
    assert first != second


def test_answers_are_the_tokens_of_the_texts(nla):
    batches, activations_ND = round_trip(nla, 64), random_activations(3)
    answers = batches.answers(nla.av_params, activations_ND, KEY, 0.0)
    texts = batches.verbalize(nla.av_params, activations_ND, KEY, 0.0)
    assert len(answers) == 3
    for ids, text in zip(answers, texts, strict=True):
        assert text.startswith(nla.autoencoder.tokenizer.decode(ids))


def test_a_failed_text_is_read_as_empty(nla):
    batches = round_trip(nla, 64)
    rebuilt_ND = batches.reconstruct(nla.ar_params, [None, "", "a shape"])
    np.testing.assert_array_equal(rebuilt_ND[0], rebuilt_ND[1])
    assert np.abs(rebuilt_ND[0] - rebuilt_ND[2]).max() > 0.1


def test_stacked_blocks_give_the_same(nla, whole):
    texts, rebuilt_ND = whole
    stacked = round_trip(nla, 64, scan=True)
    assert stacked.verbalize(stack_blocks(nla.av_params), random_activations(21)[:3], KEY, 0.0) == texts[:3]
    rebuilt = stacked.reconstruct(stack_blocks(nla.ar_params), TEXTS[:3])
    np.testing.assert_allclose(rebuilt, rebuilt_ND[:3], rtol=1e-3, atol=1e-3)
