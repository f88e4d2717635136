import numpy as np
import pytest

from nla_jax.evaluation.dictionaries import (
    SparseDictionary,
    StrengthCode,
    code_bits,
    strongest,
    strongest_features,
)

H = np.float32([[3, 4], [-1, 0.5]])


def dictionary(**fields):
    """Two coordinates and four features, which read +x, +y, -x, and x + y."""
    encode = np.float32([[1, 0, -1, 1], [0, 1, 0, 1]])
    return SparseDictionary(
        **{
            "encode_DF": encode,
            "encode_bias_F": np.float32([0, 1, 0, -5]),
            "decode_FD": encode.T.copy(),
            "decode_bias_D": np.float32([1, 0]),
            "source": "by hand",
        }
        | fields
    )


def test_a_relu_of_what_is_left_of_the_bias():
    # Less the bias the rows are (2, 4) and (-2, 0.5).
    strengths = dictionary().strengths(H)
    np.testing.assert_allclose(strengths, [[2, 5, 0, 1], [0, 1.5, 2, 0]])
    np.testing.assert_allclose(dictionary().decode(strengths, H), [[4, 6], [-1, 1.5]])
    as_they_are = dictionary(is_centered=False).strengths(H)
    np.testing.assert_allclose(as_they_are, [[3, 5, 0, 2], [0, 1.5, 1, 0]])


def test_features_jump_over_their_thresholds():
    found = dictionary(threshold_F=np.float32([2, 4.9, 0, 0.5])).strengths(H)
    np.testing.assert_allclose(found, [[0, 5, 0, 1], [0, 0, 2, 0]])


def test_the_k_strongest_are_active():
    np.testing.assert_allclose(dictionary(k=1).strengths(H), [[0, 5, 0, 0], [0, 0, 2, 0]])
    # A negative pre-activation is not active, even if it is among the greatest.
    np.testing.assert_allclose(dictionary(k=3).strengths(H), [[2, 5, 0, 1], [0, 1.5, 2, 0]])


def test_a_gate_opens_and_another_map_measures():
    gated = dictionary(gain_F=np.float32([2, 1, 1, 1]), gain_bias_F=np.float32([-1, 0, -3, 9]))
    # Gates are open where a ReLU is positive. Strengths: 2·2 - 1, 4, closed, 6 + 9; closed, 0.5, 2 - 3, closed.
    np.testing.assert_allclose(gated.strengths(H), [[3, 4, 0, 15], [0, 0.5, 0, 0]])


def test_norms_are_taken_out_and_put_back():
    # (3, 4) has the norm 5, so it becomes √2 / 5 (3, 4).
    scaled = dictionary(normalization="constant_norm_rescale", is_centered=False)
    factor = np.sqrt(2) / 5
    np.testing.assert_allclose(scaled.strengths(H)[0], [3 * factor, 4 * factor + 1, 0, 0], rtol=1e-6)
    empty = np.zeros((1, 4), np.float32)
    np.testing.assert_allclose(scaled.decode(empty, H[:1]), [[1 / factor, 0]], rtol=1e-6)


def test_a_layer_norm_is_undone():
    # (3, 4) has the mean 3.5 and, with n - 1, the deviation √0.5: it becomes (-√0.5, √0.5).
    normed = dictionary(normalization="layer_norm", is_centered=False)
    root = np.sqrt(0.5)
    np.testing.assert_allclose(normed.strengths(H)[0], [0, 1 + root, root, 0], rtol=1e-4)
    empty = np.zeros((1, 4), np.float32)
    np.testing.assert_allclose(normed.decode(empty, H[:1]), [[root + 3.5, 3.5]], rtol=1e-5)


def test_the_strongest_of_few_and_of_many_features():
    row = np.float32([[0, 3, 1, 2, 3]])
    np.testing.assert_array_equal(strongest_features(row, 3), [[1, 4, 3]])
    np.testing.assert_allclose(strongest(row, 2), [[0, 3, 0, 0, 3]])
    assert strongest(row, 9) is row
    many = np.random.default_rng(0).permutation(400).reshape(2, 200).astype(np.float32)
    np.testing.assert_array_equal(strongest_features(many, 5), np.argsort(-many, axis=1)[:, :5])


def test_parts_are_the_whole(monkeypatch):
    monkeypatch.setattr("nla_jax.evaluation.dictionaries.STRENGTHS_AT_ONCE", 12)
    rows = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)
    parts = list(dictionary().in_parts(rows))
    assert [(part.start, part.stop) for part, _ in parts] == [(0, 3), (3, 6), (6, 8)]
    np.testing.assert_array_equal(np.concatenate([s for _, s in parts]), dictionary().strengths(rows))


def test_strengths_are_rounded_to_the_means_of_their_bins():
    code = StrengthCode.fit(np.float32([1, 2, 10, 20]), bits=1)
    np.testing.assert_allclose(code(np.float32([[0, 1.7, 400], [0, 0, 9]])), [[0, 1.5, 15], [0, 0, 15]])
    with pytest.raises(ValueError, match="no feature of the dictionary is active"):
        StrengthCode.fit(np.float32([]), bits=1)


def test_bits_of_a_code():
    # One of eight features: log2 9 for how many, 3 for which, 4 for its strength; of none only how many.
    np.testing.assert_allclose(code_bits(np.array([1, 0]), 7 + 1, 4), [np.log2(9) + 3 + 4, np.log2(9)])
    # Two of four can be any of six pairs.
    np.testing.assert_allclose(code_bits(np.array([2]), 4, 0), np.log2(5) + np.log2(6))
