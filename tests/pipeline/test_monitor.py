import numpy as np
import pytest

from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.pipeline.monitor import fve_by_place, history_rows, text_shares, watched_rows

X, Y = [1.0, 0.0], [0.0, 1.0]


def rows_of(activations, places=None, docs=None, contexts=None, explanations=None):
    N = len(activations)
    extraction = Extraction("m", 2, 1, "c", CorpusSlice(0, N), 1)
    return ActivationDataset(
        activations=np.array(activations, np.float32),
        explanations=explanations,
        doc_ids=docs or [f"doc-{i}" for i in range(N)],
        n_raw_tokens=np.full(N, 60),
        contexts=contexts,
        extra={} if places is None else {"place": places},
        sidecar=Sidecar("set", "base", N, extraction),
    )


def test_watched_rows_are_spread_over_places_and_documents():
    places = ["inside"] * 20 + ["turn_end"] * 2 + ["line_end"] * 3
    rows = rows_of([X] * 25, places, docs=[f"doc-{i % 4 if i < 20 else i}" for i in range(25)])
    chosen = watched_rows(rows, seed=0)
    assert chosen == watched_rows(rows, seed=0) != watched_rows(rows, seed=1)
    assert len(set(chosen)) == 8 and len({rows.doc_ids[i] for i in chosen}) == 8
    of_places = [places[i] for i in chosen]
    assert {place: of_places.count(place) for place in places} == {"inside": 3, "turn_end": 2, "line_end": 3}


def test_few_rows_without_places_are_all_watched():
    assert sorted(watched_rows(rows_of([X] * 3), seed=0)) == [0, 1, 2]


def test_the_history_holds_what_a_reader_needs():
    rows = rows_of(
        [X, Y, X], ["inside", "span", "inside"], contexts=["a " * 200, "b", "c"], explanations=["A", "B", "C"]
    )
    texts = ["one", None, "three"]
    rebuilt = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0]], np.float32)
    kept = history_rows(rows, [2, 1, 0], texts, rebuilt)
    assert [row["id"] for row in kept] == ["doc-2@60", "doc-1@60", "doc-0@60"]
    assert [row["cosine"] for row in kept] == [pytest.approx(0, abs=1e-6), None, pytest.approx(1)]
    assert kept[1]["place"] == "span" and kept[1]["text"] is None and kept[1]["writer_text"] == "B"
    assert len(kept[2]["context_tail"]) == 240
    bare = history_rows(rows_of([X]), [0], ["one"], rebuilt[:1])
    assert bare[0]["place"] is None and bare[0]["context_tail"] == "" and bare[0]["writer_text"] is None


def test_figures_of_a_place_are_around_its_own_mean():
    # All of both places scatter about a mean of their own in one plane.
    activations = [X, Y] * 4 + [[-1.0, 0.0]] * 7
    rows = rows_of(activations, ["inside"] * 8 + ["turn_end"] * 7)
    place = Yardstick.of(rows.activations[:8])
    yardstick = Yardstick.of(rows.activations)
    known = Yardstick(**{**vars(yardstick), "places": {"inside": place}})
    constant = np.array([[1.0, 1.0]] * 15, np.float32)
    # At 45 degrees from each: an error of 2 - sqrt(2) a row, around a mean from which each lies 1/2 away.
    expected = 1 - (2 - np.sqrt(2)) / 0.5
    found = fve_by_place("judge_fve_nrm", known, constant, ["a"] * 15, rows)
    assert found == {"judge_fve_nrm_inside": pytest.approx(expected, abs=1e-5)}
    # A failed text tells no place: it counts as the mean of all, (-3, 4) / 15, with cosines -0.6 and 0.8.
    failed = fve_by_place("f", known, constant, [None] * 15, rows)
    assert failed == {"f_inside": pytest.approx(1 - (3.2 + 0.4) / 2 / 0.5, abs=1e-5)}
    around_all = fve_by_place("f", yardstick, constant, ["a"] * 15, rows)["f_inside"]
    assert around_all == pytest.approx(yardstick.fve_nrm(constant[:8], ["a"] * 8, rows.activations[:8]))
    assert fve_by_place("f", known, constant, ["a"] * 15, rows_of(activations)) == {}


def test_repetition_stands_beside_the_writers():
    written = ["a b c d e", "a b c d f", "g h"]
    rows = rows_of([X] * 3, explanations=written, contexts=["x y z w", "", ""])
    found = text_shares(["x y z x y", None, "x y z x y"], rows)
    # Of four 2-grams in each text one stands there twice; both 4-grams of each stand in the other.
    assert found["repeated"] == pytest.approx(2 / 8) and found["boilerplate"] == 1
    # One of two 4-grams in each of the writer's first two texts is common.
    assert found["writer_repeated"] == 0 and found["writer_boilerplate"] == pytest.approx(2 / 4)
    # The first text's context holds one of its three 3-grams; the other's is empty.
    assert found["copied"] == pytest.approx(1 / 6)
    assert text_shares([None] * 3, rows_of([X] * 3)) == {}
