import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from nla_jax.autoencoder import metrics
from nla_jax.evaluation import estimates
from nla_jax.evaluation.estimates import Ratio, bootstrap

RNG = np.random.default_rng(0)


def test_two_documents_by_hand():
    # Documents a (1) and b (0), same weight: the resamples aa, ab, ba, bb give 1, 0.5, 0.5, 0.
    ratio = Ratio.of([1, 1, 0, 0], np.ones(4), ["a", "a", "b", "b"])
    found = ratio.estimate()
    assert (found.value, found.low, found.high, found.n, found.documents) == (0.5, 0.0, 1.0, 4, 2)
    # A quarter of the resamples is aa: the middle 40% is all 0.5.
    middle = ratio.estimate(level=0.4)
    assert (middle.low, middle.high) == (0.5, 0.5)


def test_documents_are_resampled_and_not_rows():
    doc_ids = np.repeat([f"doc-{i}" for i in range(10)], 20)
    values = np.repeat(RNG.uniform(size=10), 20)
    by_document = Ratio.mean(values, doc_ids).estimate()
    by_row = Ratio.mean(values, np.arange(200).astype(str)).estimate()
    # 20 copies of each row: treating them as independent shrinks the interval by about √20.
    ratio = (by_document.high - by_document.low) / (by_row.high - by_row.low)
    assert 3.5 < ratio < 5.5
    assert by_document.value == pytest.approx(values.mean())


def test_interval_covers_the_truth_as_often_as_it_says():
    covered = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        found = Ratio.mean(rng.normal(0.3, 1, size=60), [str(i) for i in range(60)]).estimate(samples=400)
        covered += found.low <= 0.3 <= found.high
    assert 0.88 < covered / 200 < 0.99


def test_draws_in_parts_are_those_of_one_piece(monkeypatch):
    rng = np.random.default_rng(3)
    doc_ids = [f"doc {i}" for i in rng.integers(30, size=200)]
    columns = rng.normal(size=(200, 3))
    documents, document_N = np.unique(doc_ids, return_inverse=True)
    sums = np.stack([np.bincount(document_N, column) for column in columns.T], axis=1)
    counts = np.random.default_rng(7).multinomial(len(documents), np.full(30, 1 / 30), size=100)
    for at_once in (estimates.COUNTS_AT_ONCE, 64, 1):
        monkeypatch.setattr(estimates, "COUNTS_AT_ONCE", at_once)
        estimates._counts.cache_clear()
        found = estimates.resampled_sums(columns, doc_ids, seed=7, samples=100)
        np.testing.assert_allclose(found, counts @ sums, rtol=1e-12)


def test_order_of_rows_does_not_matter_but_the_seed_does():
    numerator, denominator = RNG.uniform(size=(2, 30))
    doc_ids, order = np.array([f"doc-{i % 7}" for i in range(30)]), RNG.permutation(30)
    first = Ratio.of(numerator, denominator, doc_ids).estimate(seed=3)
    moved = Ratio.of(numerator[order], denominator[order], doc_ids[order]).estimate(seed=3)
    np.testing.assert_allclose(dataclasses.astuple(moved), dataclasses.astuple(first), rtol=1e-12)
    assert Ratio.of(numerator, denominator, doc_ids).estimate(seed=4) != first


def test_fve_carries_what_every_report_needs():
    target = RNG.normal(size=(40, 6)).astype(np.float32) + 1
    prediction, mean = target + 0.5 * RNG.normal(size=target.shape).astype(np.float32), target.mean(axis=0)
    doc_ids = [f"doc-{i % 8}" for i in range(40)]
    found = Ratio.explained(*metrics.fve_terms(prediction, target, mean), doc_ids).estimate()
    assert found.value == pytest.approx(float(metrics.fve(prediction, target, mean)), abs=1e-6)
    assert found.low < found.value < found.high
    assert (found.n, found.documents) == (40, 8)
    assert found.denominator == pytest.approx(target.var(axis=0).mean(), rel=1e-5)


def test_paired_difference_is_narrower_than_either():
    doc_ids = [f"doc-{i % 20}" for i in range(80)]
    hard = np.repeat(RNG.uniform(size=20), 4).reshape(20, 4).T.ravel()
    before = Ratio.mean(hard, doc_ids)
    after = Ratio.mean(hard + 0.1 + 0.01 * RNG.normal(size=80), doc_ids)
    gain = after.over(before)
    single = after.estimate()
    assert gain.value == pytest.approx(single.value - before.estimate().value)
    assert gain.low > 0 and gain.high - gain.low < 0.2 * (single.high - single.low)
    assert before.over(before).high == 0


def test_statistics_that_are_no_ratios():
    truth, score = RNG.integers(2, size=100), RNG.normal(size=100)
    doc_ids = [f"doc-{i % 25}" for i in range(100)]

    def auroc(weights):
        return roc_auc_score(truth, score, sample_weight=weights)

    found = bootstrap(auroc, doc_ids)
    assert found.value == pytest.approx(roc_auc_score(truth, score))
    assert found.low < found.value < found.high and found.documents == 25
    with pytest.raises(ValueError, match="rows of both kinds"):
        bootstrap(lambda weights: float("nan"), doc_ids)


def test_errors_name_value_and_remedy():
    ones = np.ones(3)
    with pytest.raises(ValueError, match="3 numerators, 3 denominators and 2 document ids"):
        Ratio.of(ones, ones, ["a", "b"])
    with pytest.raises(ValueError, match=r"1 document\(s\).*hold out more documents"):
        Ratio.of(ones, ones, ["a", "a", "a"]).estimate()
    with pytest.raises(ValueError, match=r"denominator is 0\.0.*differ from the training mean"):
        Ratio.of(ones, 0 * ones, ["a", "b", "c"]).estimate()
    with pytest.raises(ValueError, match="same rows"):
        Ratio.mean(ones, ["a", "b", "c"]).over(Ratio.mean(ones, ["a", "b", "d"]))
