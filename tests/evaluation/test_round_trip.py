import numpy as np
import pytest

from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.evaluation.round_trip import EvaluationConfig, Moments, gain_row, shuffled, system_row


def held_out(n: int = 12, d: int = 8) -> ActivationDataset:
    rng = np.random.default_rng(0)
    extraction = Extraction("m", d, 1, "c", CorpusSlice(0, n), 1)
    return ActivationDataset(
        activations=rng.normal(size=(n, d)).astype(np.float32) + 1,
        explanations=["text"] * n,
        doc_ids=[f"d{i // 3}" for i in range(n)],
        n_raw_tokens=np.full(n, 60),
        contexts=None,
        extra={},
        sidecar=Sidecar("x", "base", n, extraction),
    )


def row(prediction, failed=None):
    data = held_out()
    failed = np.zeros(len(data), bool) if failed is None else failed
    moments = Moments.of(data.activations)
    config = EvaluationConfig(bootstrap_samples=50)
    return system_row("x", "nla", "own", prediction, failed, data, moments, 1.0, config)


def test_oracle_and_mean_land_where_they_should():
    data = held_out()
    oracle = row(data.activations)
    assert oracle["fve"]["value"] == 1 and abs(oracle["fve_nrm"]["value"] - 1) < 1e-6
    assert oracle["fve"]["n"] == 12 and oracle["fve"]["documents"] == 4
    mean = row(np.broadcast_to(data.activations.mean(axis=0), data.activations.shape))
    assert abs(mean["fve"]["value"]) < 1e-6


def test_failed_rows_count_as_the_mean():
    data = held_out()
    nonsense = np.full_like(data.activations, -5.0)
    failed = row(nonsense, np.ones(len(data), bool))
    assert abs(failed["fve"]["value"]) < 1e-6 and failed["failed_fraction"] == 1
    assert row(nonsense)["fve"]["value"] < -1


def test_gain_is_the_difference_and_its_interval_is_paired():
    data, config = held_out(), EvaluationConfig(bootstrap_samples=200)
    moments, rng = Moments.of(data.activations), np.random.default_rng(1)
    noise = rng.normal(size=data.activations.shape).astype(np.float32)
    before, after = data.activations + noise, data.activations + 0.9 * noise

    def gain(*pair):
        return gain_row("after over before", "own", *pair, data, moments, config)["fve_nrm"]

    none, found = gain(before, before), gain(before, after)
    assert max(map(abs, (none["value"], none["low"], none["high"]))) < 1e-7
    single = [row(prediction)["fve_nrm"] for prediction in (before, after)]
    assert found["value"] == pytest.approx(single[1]["value"] - single[0]["value"], abs=1e-6)
    assert found["high"] - found["low"] < 0.5 * (single[0]["high"] - single[0]["low"])


def test_shuffled_never_keeps_a_document():
    for n in (6, 12):
        documents = [f"d{i // 3}" for i in range(n)]
        partner = shuffled(list(range(n)), documents, seed=0)
        assert all(documents[p] != own for p, own in zip(partner, documents, strict=True))
    uneven = ["a"] * 7 + ["b"] * 2
    partner = shuffled(list(range(9)), uneven, seed=0)
    assert all(uneven[p] != own for p, own in zip(partner, uneven, strict=True))
