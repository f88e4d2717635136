"""What suites measure by place beside the fve_nrm, whose places are tested in test_subject.py."""

import dataclasses

import numpy as np

from nla_jax.autoencoder import metrics
from nla_jax.evaluation.planted import cheaters
from nla_jax.evaluation.suites import degeneracy, faithfulness


def test_copying_and_repetition_by_place_are_parts_of_the_whole(subject):
    table = degeneracy.runs_by_place(subject)
    assert [(row.labels["place"], row.name) for row in table.rows] == [
        (place, name)
        for place in ("sentence_end", "inside")
        for name in ("AV warm start", "AV after RL", "explainer texts")
    ]
    whole = {}
    for of_all in (degeneracy.copying(subject), degeneracy.readability(subject)):
        whole |= next(row.figures for row in of_all.rows if row.name == "explainer texts")
    parts = [row for row in table.rows if row.name == "explainer texts"]
    for name in ("copied 3-grams", "longest span (words)", "repeated 2-grams", "boilerplate 4-grams"):
        hits = sum(row.figures[name].numerator_N.sum() for row in parts)
        assert hits == whole[name].numerator_N.sum() and (hits > 0 or name == "repeated 2-grams")
    assert sorted(id_ for row in parts for id_ in row.ids) == sorted(subject.ids)


def test_what_rewrites_keep_at_a_place_is_around_its_own_mean(subject):
    config = dataclasses.replace(subject.config, rewrite_rows=32, generated_rows=0)
    exact = cheaters.oracle(dataclasses.replace(subject, config=config))
    rewritten = degeneracy.rewriting(exact)
    (row,) = [
        row
        for row in degeneracy.rewriting_by_place(exact, rewritten).rows
        if row.name == "unchanged" and row.labels == {"quotes": "kept", "AR": "judge", "place": "inside"}
    ]
    assert row.figures["kept"].estimate().value == 1 and len(row.ids) == 16
    # All that lies around the mean of the place is explained.
    inside_ND = metrics.normalize(subject.data.activations[subject.places["inside"]])
    mean_D = subject.yardstick.at("inside").normalized_mean_D
    np.testing.assert_allclose(
        row.figures["kept"].denominator_N, np.mean((inside_ND - mean_D) ** 2, axis=1), rtol=1e-5
    )


def test_true_claims_are_counted_at_their_places(subject):
    data = subject.data
    # The quotes are true at every second row, which is where a sentence ends.
    texts = [('"nothing of it"', text)[row % 2] for row, text in enumerate(data.explanations)]
    checked = {"explainer texts": faithfulness.check(subject, texts)}
    table = faithfulness.claims_by_place(subject, checked)
    name = "detail: a quoted span"
    share = {row.labels["place"]: row.figures["by stem"] for row in table.rows if row.name == name}
    assert share["sentence_end"].estimate().value == 1
    inside = share["inside"].estimate()
    assert inside.value == 0 and inside.n == 16
