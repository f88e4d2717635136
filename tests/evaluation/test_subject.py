"""Figures by place, of rows in two dimensions whose variances can be worked out by hand."""

import dataclasses

import numpy as np
import pytest

from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.positions import SPAN_PLACE
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.evaluation.subject import AROUND_PLACES, PLACES, Prediction, Subject
from nla_jax.evaluation.suites import controls
from nla_jax.lm.places import TOKEN_PLACES

RIGHT, UP, LEFT = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)
INSIDE = [RIGHT, UP] * 4
"""Their mean is (√2, √2) / 2 after normalization, and the variance about it 1/2."""
SENTENCE_ENDS = [RIGHT, LEFT] * 4
"""Their mean is zero, and the variance about it 1."""


def rows(vectors, places, **columns):
    count = len(vectors)
    extraction = Extraction("org/model", 2, 1, "corpus", CorpusSlice(0, count), 1)
    return ActivationDataset(
        activations=np.float32(vectors),
        explanations=None,
        doc_ids=[f"doc-{i // 2}" for i in range(count)],
        n_raw_tokens=np.arange(count) % 2 + 50,
        contexts=None,
        extra={"place": places} | columns,
        sidecar=Sidecar("set", "base", count, extraction),
    )


def subject_of(data, training=None, **fields):
    training = data if training is None else training
    of = {place: np.array(training.extra["place"]) == place for place in set(training.extra["place"])}
    whole = Yardstick.of(training.activations)
    places = {place: Yardstick.of(training.activations[rows_N]) for place, rows_N in of.items()}
    return Subject(
        data,
        training,
        dataclasses.replace(whole, places=places),
        {"av": lambda h, **_: ["a text"] * len(h)},
        {"judge": lambda texts: np.float32([RIGHT] * len(texts))},
        load_target=lambda: pytest.fail("the target is not needed"),
        **fields,
    )


DATA = rows(INSIDE + SENTENCE_ENDS, ["inside"] * 8 + ["sentence_end"] * 8)


def values(lines):
    return {row.labels["place"]: row.figures["fve_nrm"].estimate().value for row in lines}


def test_the_order_of_tables_has_every_place_once():
    assert sorted(PLACES) == sorted([*TOKEN_PLACES, SPAN_PLACE])


def test_each_place_is_measured_around_its_own_mean():
    subject = subject_of(DATA)
    exact_inside_alone = Prediction("x", np.float32(INSIDE + [RIGHT] * 8) * 5, ar="judge")
    lines = subject.place_lines(exact_inside_alone)
    # At sentence ends half of the rows have the error mean(8, 0) = 4, so 16 in all, against variances of 8 and 8 / 2.
    assert values(lines) == pytest.approx(
        {AROUND_PLACES: 1 - 16 / 12, "sentence_end": 1 - 16 / 8, "inside": 1}
    )
    assert [row.labels["place"] for row in lines] == [AROUND_PLACES, "sentence_end", "inside"]
    assert [len(row.ids) for row in lines] == [16, 8, 8] and lines[1].ids == subject.ids[8:]
    # Around the mean of all, (√2, √2) / 4, the variances are 12 × 5 / 8 and 4 × 13 / 8.
    whole = subject.line(exact_inside_alone).figures["fve_nrm"].estimate()
    assert whole.value == pytest.approx(1 - 16 / 14, rel=1e-5) and subject.line(
        exact_inside_alone
    ).labels == {"AR": "judge"}


def test_the_mean_of_the_same_place_explains_nothing_at_any_place():
    subject = subject_of(DATA)
    (mean,) = [p for p in controls.without_information(subject) if p.name == controls.PLACE_MEAN]
    assert values(subject.place_lines(mean)) == pytest.approx(
        {AROUND_PLACES: 0, "sentence_end": 0, "inside": 0}, abs=1e-6
    )
    # Of all rows it explains what lies between places: 14 - 12 of 14.
    assert subject.line(mean).figures["fve_nrm"].estimate().value == pytest.approx(2 / 14, rel=1e-5)


def test_places_of_few_rows_or_of_one_document_have_no_lines():
    few = subject_of(DATA.take(slice(1, 16)), training=DATA)
    assert list(few.places) == ["sentence_end"]
    one = dataclasses.replace(DATA, doc_ids=["doc-0"] * 8 + DATA.doc_ids[8:])
    assert list(subject_of(one).places) == ["sentence_end"]
    # Rows of a place whose mean is not known are measured around that of all.
    prediction = Prediction("x", np.float32(INSIDE[1:] + SENTENCE_ENDS))
    unknown = dataclasses.replace(few, yardstick=dataclasses.replace(few.yardstick, places={}))
    assert unknown.places == {} and unknown.place_lines(prediction) == []
    without = dataclasses.replace(DATA, extra={})
    assert subject_of(DATA).places and not dataclasses.replace(subject_of(DATA), data=without).places


def test_some_rows_are_divided_among_places():
    subject = subject_of(DATA)
    ratio = subject.figures(np.float32([RIGHT] * 12), rows=slice(4, 16))["fve_nrm"]
    parts = subject.by_place(subject.around_places(ratio, slice(4, 16)), slice(4, 16))
    assert list(parts) == ["sentence_end"] and parts["sentence_end"][1] == subject.ids[8:]
    assert parts["sentence_end"][0].estimate().value == pytest.approx(1 - 16 / 8)


def test_a_text_that_failed_counts_as_the_mean_of_all_at_every_place():
    subject = subject_of(DATA)
    (line,) = [
        row
        for row in subject.place_lines(subject.read("av", [None] * 16, ar="judge"))
        if row.labels["place"] == "sentence_end"
    ]
    # The mean of all points to (1, 1): mean((√2 - 1)², 1) and mean((√2 + 1)², 1) are 2 - √2 and 2 + √2.
    assert line.figures["fve_nrm"].estimate().value == pytest.approx(1 - 2)


def test_lookups_of_last_tokens_are_made_among_rows_of_the_same_place():
    tokens = [[7, 1], [7, 2]] * 4 + [[8, 1], [9, 1]] * 4
    data = dataclasses.replace(DATA, extra={**DATA.extra, "last_token_ids": tokens})
    subject = subject_of(data)
    last, two, nearest = (subject.place_lines(lookup) for lookup in controls.lookups(subject))
    # Four rows and three times the place's mean (1/2 of the variance): (3 / 7)² is left of it, at sentence ends all.
    assert values(last) == pytest.approx(
        {AROUND_PLACES: 1 - (4 * 9 / 49 + 8) / 12, "sentence_end": 0, "inside": 1 - 9 / 49}, abs=1e-6
    )
    assert values(two)["sentence_end"] == pytest.approx(1 - 9 / 49, rel=1e-5)
    assert values(two)["inside"] == pytest.approx(1 - (9 / 49) ** 2, abs=1e-6)
    assert set(values(nearest).values()) == {1}
    assert [row.labels["AR"] for row in last] == ["-"] * 3


def test_without_places_last_tokens_are_looked_up_among_all_rows():
    tokens = [[7, 1]] * 8 + [[7, 2]] * 8
    data = dataclasses.replace(DATA, extra={**DATA.extra, "last_token_ids": tokens})
    without = dataclasses.replace(data, extra={"last_token_ids": tokens})
    subject = dataclasses.replace(subject_of(data), data=without)
    last = controls.lookups(subject)[0]
    # Means of eight rows and three times that of all, which is (√2, √2) / 4.
    root = np.sqrt(2)
    np.testing.assert_allclose(last.vectors_ND[0], [(8 * root / 2 + 3 * root / 4) / 11] * 2, rtol=1e-6)
    np.testing.assert_allclose(last.vectors_ND[15], [3 * root / 4 / 11] * 2, rtol=1e-6)


def test_gains_over_lookups_are_paired_by_place():
    tokens = [[7, 1]] * 16
    subject = subject_of(dataclasses.replace(DATA, extra={**DATA.extra, "last_token_ids": tokens}))
    table = controls.gains_over_lookups(subject, controls.lookups(subject))
    found = {(row.name, row.labels.get("place")): row.figures["fve_nrm"] for row in table.rows}
    gain = found[f"AV av over the {controls.LAST_TOKEN}", "inside"]
    # The AR answers (1, 0): an error of 1 against a variance of 1/2; one token for all tells no more than the place.
    assert gain.value == pytest.approx(-1, abs=1e-6) and gain.n == 8
    assert gain.low <= gain.value <= gain.high
    places = (None, AROUND_PLACES, "sentence_end", "inside")
    assert [place for name, place in found if name.endswith(controls.NEAREST)] == list(places)
    assert found[f"AV av over the {controls.NEAREST}", None].value == pytest.approx(-(8 + 16) / 14, rel=1e-5)
