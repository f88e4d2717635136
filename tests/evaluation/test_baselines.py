import dataclasses

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV

from nla_jax.evaluation import baselines

D = 32


def test_nearest_by_direction_whatever_the_norm():
    known = np.eye(D, dtype=np.float32)[:5] * 7
    asked = np.float32([0.1, 40.0])[:, None] * np.eye(D, dtype=np.float32)[[3, 1]] + 0.01
    np.testing.assert_array_equal(baselines.nearest_by_activation(asked, known), known[[3, 1]])


def test_the_nearest_of_more_rows_than_are_compared_at_once():
    rng = np.random.default_rng(0)
    known = rng.standard_normal((9001, 8)).astype(np.float32)
    rows = [9000, 0, 4096, 4095, 8192, 5000]
    np.testing.assert_array_equal(baselines.nearest_by_activation(known[rows] * 3, known), known[rows])
    texts = [f"common word{row} words{row}" for row in range(9001)]
    found = baselines.nearest_by_text([f"words{row}, common" for row in rows], texts, known)
    np.testing.assert_array_equal(found, known[rows])
    # Of rows that are equally near, the first is taken.
    twice = np.concatenate([known, known])
    assert baselines._most_similar([known[:1] @ twice[:9001].T, known[:1] @ twice[9001:].T]).item() < 9001


def test_nearest_by_rare_words():
    known = np.arange(3 * D, dtype=np.float32).reshape(3, D)
    texts = ["about the old ships", "about the new bread", "about the loud music"]
    found = baselines.nearest_by_text(["the bread", "Music, about"], texts, known)
    np.testing.assert_array_equal(found, known[[1, 2]])


def test_a_text_without_a_known_word_is_near_to_nothing():
    texts, known = ["about ships", "about bread"], np.float32([[1, 0], [0, 3]])
    found = baselines.nearest_by_text(["", "bread", "?! unheard"], texts, known)
    np.testing.assert_allclose(found, [[0.5, 1.5], [0, 3], [0.5, 1.5]])
    assert found.dtype == np.float32


def test_words_that_add_up_are_learned_whatever_their_order():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(20)]
    meaning = rng.normal(size=(20, D)).astype(np.float32)
    chosen = [rng.choice(20, size=4, replace=False) for _ in range(400)]
    texts = [" ".join(words[i] for i in row) for row in chosen]
    vectors = np.stack([meaning[row].sum(axis=0) for row in chosen])
    found = baselines.ridge_from_words(texts[300:], texts[:300], vectors[:300])
    cosine = (
        (found * vectors[300:]).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(vectors[300:], axis=1)
    )
    assert cosine.mean() > 0.97
    turned = [" ".join(reversed(text.split())) for text in texts[300:]]
    np.testing.assert_array_equal(baselines.ridge_from_words(turned, texts[:300], vectors[:300]), found)


@pytest.mark.parametrize("noise", [0.1, 3.0, 30.0])
def test_ridge_is_that_of_scikit_learn(noise):
    rng = np.random.default_rng(1)
    has_word = (rng.random((5000, 30)) < 0.2).astype(float)
    has_word[:, 29] = has_word[:, 28]  # two words that always stand together
    vectors = has_word @ rng.normal(size=(30, D)) + noise * rng.normal(size=(5000, D)) + 2
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * np.sqrt(D)
    weights, bias = baselines._ridge(csr_matrix(has_word), vectors)
    expected = RidgeCV(alphas=baselines._RIDGE_ALPHAS).fit(has_word, unit)
    np.testing.assert_allclose(weights, expected.coef_.T, atol=1e-5)
    np.testing.assert_allclose(bias, expected.intercept_, atol=1e-5)


def test_components_are_those_of_scikit_learn():
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(5000, D)) * np.linspace(1, 6, D) + 3
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * np.sqrt(D)
    code, expected = baselines.PCACode.fit(vectors, 6), PCA(6, svd_solver="full").fit(unit)
    np.testing.assert_allclose(code.mean_D, expected.mean_, atol=1e-5)
    np.testing.assert_allclose(np.abs(code.components_CD @ expected.components_.T), np.eye(6), atol=1e-3)


def test_a_code_with_no_loss_but_its_bins():
    """Two values of one direction need one bit, and get exactly their own means."""
    side = np.arange(200) % 2 * 2 - 1
    base, axis = np.eye(D, dtype=np.float32)[:2]
    vectors = 5 * base + side[:, None] * axis
    found = baselines.PCACode.fit(vectors, 1)(vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * np.sqrt(D)
    np.testing.assert_allclose(found, unit, atol=1e-4)


def test_logit_lens_names_the_token_whose_unembedding_it_is_given(subject):
    target = subject.target
    table = np.asarray(target.lm.params["embed"]["embedding"])
    token = target.continuation(" word")[0]
    scale = np.asarray(target.lm.params["final_norm"]["scale"])
    (words,) = baselines.logit_lens_words(target, (table[token] / scale)[None] * 100, 3)
    assert words[0] == target.tokenizer.decode([token]).strip()


def test_means_by_key_are_drawn_to_the_coarser_mean():
    known = np.float32([[3, 0], [0, 5], [0, 2], [-1, 0]])
    coarser = np.float32([[1, 1], [1, 1], [0, 1]])
    found = baselines.means_by_key(["a", "c", "b"], ["a", "b", "b", "b"], known, coarser)
    root = np.sqrt(2)
    np.testing.assert_allclose(
        found, [[(root + 3) / 4, 3 / 4], [1, 1], [-root / 6, (2 * root + 3) / 6]], rtol=1e-6
    )


def test_means_by_key_of_more_rows_than_are_looked_at_once():
    known = np.tile(np.float32([[2, 0], [0, 3]]), (4500, 1))
    found = baselines.means_by_key([1], [row % 2 for row in range(9000)], known, np.zeros((1, 2), np.float32))
    np.testing.assert_allclose(found, [[0, np.sqrt(2) * 4500 / 4503]], rtol=1e-6)


def test_last_tokens_are_those_of_the_column_or_of_the_ends_of_contexts(subject):
    data, target = subject.data, subject.target
    found = baselines.last_tokens(data, target)
    assert found == [tuple(target.encode(context)[-2:]) for context in data.contexts]
    short = dataclasses.replace(data.take(slice(1)), contexts=[data.contexts[0].split()[0][:1]])
    assert [ids[0] for ids in baselines.last_tokens(short, target)] == [-1]
    stored = dataclasses.replace(data, extra={"last_token_ids": [[-1, 4]] * len(data)})
    assert baselines.last_tokens(stored, target) == [(-1, 4)] * len(data)
    assert baselines.last_tokens(dataclasses.replace(data, contexts=None, extra={}), target) is None
