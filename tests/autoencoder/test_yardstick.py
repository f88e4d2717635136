import numpy as np
import pytest
from safetensors import safe_open

from nla_jax.autoencoder.yardstick import CHUNK_ROWS, Part, Yardstick

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
    bounds = ((0, 1), (1, 1), (1, 4500), (4500, 5000))
    parts = Yardstick.of_parts(Part(rows[start:end]) for start, end in bounds)
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


def by_place(rows, seed=0):
    """Rows around a mean of their own at each of two places, 20 of "edge", and the rest in the middle; one is alone."""
    rng = np.random.default_rng(seed)
    places = ["edge" if i % (rows // 20) == 0 else "middle" for i in range(rows)]
    places[1], places[2] = "alone", None
    centers = {"edge": [9, 0, 0], "middle": [0, 9, 0]}
    vectors = [centers.get(place, [0, 0, 9]) + rng.standard_normal(3) for place in places]
    return np.array(vectors, np.float32), places, [f"doc{i // 30}" for i in range(rows)]


def test_places_have_yardsticks_of_their_own_rows():
    vectors, places, docs = by_place(CHUNK_ROWS + 904)
    whole = Yardstick.of(vectors, places=places, doc_ids=docs)
    halves = Yardstick.of_parts(
        Part(vectors[part], places[part], docs[part]) for part in (slice(0, 2000), slice(2000, None))
    )
    alone = Yardstick.of(vectors)
    for found in (whole, halves):
        assert sorted(found.places) == ["edge", "middle"]
        np.testing.assert_allclose(found.normalized_mean_D, alone.normalized_mean_D, rtol=1e-6)
        for place in ("edge", "middle"):
            rows = np.array([own == place for own in places])
            expected = Yardstick.of(vectors[rows])
            np.testing.assert_allclose(found.at(place).mean_D, expected.mean_D, rtol=1e-5, atol=1e-6)
            assert found.at(place).spread == pytest.approx(expected.spread, rel=1e-4)
            assert (found.at(place).count, found.at(place).norm_p75) == (rows.sum(), expected.norm_p75)
            assert found.at(place).description.endswith(f"training activations at the place {place}")
        assert found.at("alone") is found.at(None) is found


def test_a_place_needs_rows_of_several_documents():
    vectors, places, docs = by_place(100)
    assert "edge" in Yardstick.of(vectors, places=places, doc_ids=docs).places
    of_one = ["one" if place == "edge" else doc for place, doc in zip(places, docs, strict=True)]
    assert [*Yardstick.of(vectors, places=places, doc_ids=of_one).places] == ["middle"]
    # The first row is one of the twenty.
    assert [*Yardstick.of(vectors[1:], places=places[1:], doc_ids=docs[1:]).places] == ["middle"]
    assert "edge" in Yardstick.of(vectors, places=places).places


def test_a_column_of_something_else_than_places_is_not_looked_at():
    vectors = np.ones((33 * 20, 2), np.float32)
    values = [f"town {i % 33}" for i in range(len(vectors))]
    assert not Yardstick.of(vectors, places=values).places
    few = [int(value.split()[1]) for value in values]
    assert not Yardstick.of(vectors, places=few).places
    assert len(Yardstick.of(vectors[:640], places=[f"town {i % 32}" for i in range(640)]).places) == 32


def test_fve_around_the_means_of_places_by_hand():
    # At each place directions are (1, 0) and (0, 1), in equal parts; at "b" the axes are turned round.
    vectors = np.array([[1, 0], [0, 2], [-3, 0], [0, -1]] * 20, np.float32)
    places = ["a", "a", "b", "b"] * 20
    yardstick = Yardstick.of(vectors, places=places)
    np.testing.assert_allclose(yardstick.at("b").normalized_mean_D, [-(2**0.5) / 2] * 2, rtol=1e-6)
    texts = ["t"] * 80
    # Around the mean of all, which is zero, rows vary by 1; around their places' by half.
    assert yardstick.fve_nrm(-vectors, texts, vectors) == pytest.approx(1 - 4)
    assert yardstick.fve_nrm(-vectors, texts, vectors, places) == pytest.approx(1 - 8)
    # A row at an unknown place is measured around the mean of all: 79 · 1/2 + 1.
    unknown = [None, *places[1:]]
    assert yardstick.fve_nrm(-vectors, texts, vectors, unknown) == pytest.approx(1 - 320 / 40.5)
    assert yardstick.fve_nrm(vectors * 3, texts, vectors, places) == pytest.approx(1)


def test_places_are_saved_and_loaded(tmp_path):
    vectors, places, docs = by_place(200)
    saved = Yardstick.of(vectors, places=[place and f"{place}/x" for place in places], doc_ids=docs)
    saved.save(tmp_path)
    loaded = Yardstick.load(tmp_path)
    assert [*loaded.places] == [*saved.places] == ["edge/x", "middle/x"]
    for place, own in saved.places.items():
        np.testing.assert_array_equal(loaded.at(place).normalized_mean_D, own.normalized_mean_D)
        np.testing.assert_array_equal(loaded.at(place).mean_D, own.mean_D)
        for name in ("spread", "norm_p75", "count", "source"):
            assert getattr(loaded.at(place), name) == getattr(own, name)


def test_what_is_saved_is_loaded_exactly(tmp_path):
    activations = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32) * 1e3
    saved = Yardstick.of(activations, "activations of “own” texts")
    saved.save(tmp_path)
    loaded = Yardstick.load(str(tmp_path))
    np.testing.assert_array_equal(loaded.mean_D, saved.mean_D)
    np.testing.assert_array_equal(loaded.normalized_mean_D, saved.normalized_mean_D)
    for name in ("spread", "norm_p75", "count", "source"):
        assert getattr(loaded, name) == getattr(saved, name)
    # The same names as in files of earlier versions, and no others.
    with safe_open(tmp_path / "yardstick.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["mean", "normalized_mean"]
        assert sorted(file.metadata()) == ["count", "norm_p75", "source", "spread"]
    assert not loaded.places


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
