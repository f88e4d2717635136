import numpy as np
import pytest

from nla_jax.autoencoder.yardstick import Yardstick

ACTIVATIONS = np.array([[3, 4], [0, 2], [-6, 8], [5, 0]], np.float32)
"""Norms 5, 2, 10 and 5; directions (.6, .8), (0, 1), (-.6, .8) and (1, 0)."""


def test_numbers_by_hand():
    yardstick = Yardstick.of(ACTIVATIONS)
    np.testing.assert_allclose(yardstick.mean_D, [0.5, 3.5], rtol=1e-6)
    # Normalized vectors have the norm √2; their mean is √2 (1, 2.6) / 4.
    mean_D = 2**0.5 * np.array([0.25, 0.65])
    np.testing.assert_allclose(yardstick.normalized_mean_D, mean_D, rtol=1e-6)
    # The mean square about a mean is the mean square less that of the mean: 1 - (0.25² + 0.65²).
    assert yardstick.spread == pytest.approx(1 - (0.25**2 + 0.65**2), rel=1e-6)
    # Norms in order 2, 5, 5, 10: three quarters of the way is a quarter of the way from 5 to 10.
    assert yardstick.norm_p75 == pytest.approx(6.25)
    assert (yardstick.count, yardstick.description) == (4, "mean of 4 training activations")


def test_parts_are_summed_up_as_if_they_were_one():
    rng = np.random.default_rng(0)
    # Every coordinate has a mean that is large beside its spread, as in real models.
    rows = (rng.standard_normal((5000, 7)) + rng.standard_normal(7) * 100).astype(np.float32)
    whole = Yardstick.of(rows)
    parts = Yardstick.of_parts(rows[start:end] for start, end in ((0, 1), (1, 1), (1, 4500), (4500, 5000)))
    unit = rows.astype(float) / np.linalg.norm(rows.astype(float), axis=1, keepdims=True) * 7**0.5
    for found in (whole, parts):
        np.testing.assert_allclose(found.mean_D, rows.mean(axis=0, dtype=float), rtol=1e-6)
        np.testing.assert_allclose(found.normalized_mean_D, unit.mean(axis=0), rtol=1e-6)
        assert found.spread == pytest.approx(np.mean((unit - unit.mean(axis=0)) ** 2), rel=1e-3)
        assert found.norm_p75 == pytest.approx(np.percentile(np.linalg.norm(rows, axis=1), 75), rel=1e-6)
        assert found.count == 5000


def test_activations_that_make_no_mean_are_named():
    with pytest.raises(ValueError, match="there are no rows of mine to take a mean of"):
        Yardstick.of(ACTIVATIONS[:0], "rows of mine")
    damaged = ACTIVATIONS.copy()
    damaged[1, 0], damaged[3] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"rows of mine hold NaN or infinity \(rows \[1, 3\]\)"):
        Yardstick.of(damaged, "rows of mine")


def test_fve_by_hand():
    yardstick = Yardstick.of(ACTIVATIONS, "rows of mine")
    assert yardstick.description == "mean of 4 rows of mine"
    texts = ["a", "b", None, "d"]
    # Whatever the norms, true directions explain everything; the failed row is read as the mean.
    predictions = np.array([[0.3, 0.4], [0, 9], [np.nan, np.nan], [1, 0]], np.float32)
    failed = yardstick.mean_D / np.linalg.norm(yardstick.mean_D) @ [-0.6, 0.8]
    # The error of one row is 2 (1 - cos), those of the others 0; the spread of four is four times the mean's.
    assert yardstick.fve_nrm(predictions, texts, ACTIVATIONS) == pytest.approx(
        1 - 2 * (1 - failed) / (4 * yardstick.spread), rel=1e-5
    )
    opposite = yardstick.fve_nrm(-ACTIVATIONS, ["a"] * 4, ACTIVATIONS)
    assert opposite == pytest.approx(1 - 4 / yardstick.spread, rel=1e-5)


def test_what_is_saved_is_loaded_exactly(tmp_path):
    activations = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32) * 1e3
    saved = Yardstick.of(activations, "activations of “own” texts")
    saved.save(tmp_path)
    loaded = Yardstick.load(str(tmp_path))
    np.testing.assert_array_equal(loaded.mean_D, saved.mean_D)
    np.testing.assert_array_equal(loaded.normalized_mean_D, saved.normalized_mean_D)
    for name in ("spread", "norm_p75", "count", "source"):
        assert getattr(loaded, name) == getattr(saved, name)


def test_a_directory_without_one(tmp_path):
    assert Yardstick.load(tmp_path) is None


def test_a_file_that_is_damaged_or_another(tmp_path):
    Yardstick.of(ACTIVATIONS).save(tmp_path)
    path = tmp_path / "yardstick.safetensors"
    whole = path.read_bytes()
    for content in (
        whole[:-5],
        whole[:20],
        b"",
        b"not safetensors at all",
        whole.replace(b"spread", b"sprout"),
    ):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match="is not a yardstick of training activations .*; copy the file again"
        ):
            Yardstick.load(tmp_path)
