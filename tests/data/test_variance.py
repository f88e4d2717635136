import dataclasses

import numpy as np
import pytest

from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.data.variance import VarianceCounts


def rows(activations, docs, corpus="texts", **extra):
    activations = np.asarray(activations, np.float32)
    about = Extraction("m", activations.shape[1], 3, corpus, CorpusSlice(0, len(set(docs))), 2)
    positions = np.arange(len(docs)) + 1
    sidecar = Sidecar("set", "base", len(docs), about)
    return ActivationDataset(activations, None, list(docs), positions, None, extra, sidecar)


def shares(*parts, **options):
    counting = VarianceCounts(**options)
    for part in parts:
        counting.add(part)
    return {share.by: share for share in counting.shares()}


def test_shares_by_hand():
    # Directions (1, 0) four times and (0, 1) twice, whatever the norms; times √2 they vary around (2/3, 1/3) √2.
    data = rows([[3, 0], [5, 0], [2, 0], [1, 0], [0, 4], [0, 2]], ["a", "a", "a", "b", "b", "b"])
    (share,) = shares(data).values()
    # Squares about the mean: 6 rows · 2 coordinates · 2 · (2/3 · 1/3) = 16/3. Within "b" 3 · 2 · 2 · (1/3 · 2/3) = 8/3.
    assert share.held_in == pytest.approx(1 / 2, rel=1e-6)
    assert share.corrected == pytest.approx(1 - (8 / 3 / (6 - 2)) / (16 / 3 / (6 - 1)), rel=1e-6)
    assert (share.by, share.rows, share.groups) == ("document", 6, 2)


def test_parts_groupings_and_sources():
    columns = {
        "genre": ["x", "x", None, "y"],
        "place": ["inside"] * 4,
        "last_token_ids": [[1, 2], [3, 2], [-1, 2], [1, 2]],
    }
    docs = ["self:builtin/1", "self:builtin/2", "/data/a.jsonl/1", "/data/a.jsonl/2"]
    vectors = np.random.default_rng(0).standard_normal((4, 5))
    data = rows(vectors, docs, "0.5 self:builtin + 0.5 /data/a.jsonl", **columns)
    found = shares(data)
    assert {by: share.groups for by, share in found.items()} == {
        "source": 2,
        "genre": 3,
        "document": 4,
        "last two tokens": 3,
    }  # all rows have one place and one last token
    assert found["document"].held_in == pytest.approx(1) and found["document"].corrected is None
    in_parts = shares(data.take(slice(0, 1)), data.take([1, 2]), data.take(slice(3, 4)))
    for by, share in found.items():
        assert dataclasses.astuple(in_parts[by]) == pytest.approx(dataclasses.astuple(share))
    assert "source" not in shares(rows(vectors, docs, "self:builtin"))
    assert [*shares(rows(vectors, docs, "docstrings", last_token_ids=[None] * 4))] == ["document"]


def test_groups_that_mean_nothing_explain_nothing_once_corrected():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3000, 16))
    chance = shares(rows(vectors, [f"d{i // 3}" for i in range(3000)]))["document"]
    # Means of three rows have a third of the variance, by chance; those of one row all of it.
    assert chance.held_in == pytest.approx(1 / 3, abs=0.02) and abs(chance.corrected) < 0.02
    sizes = np.where(np.arange(1500) % 3 == 0, 3, 1)
    groups = np.repeat(np.arange(1500), sizes)
    centers = rng.standard_normal((1500, 16))[groups]
    noise = rng.standard_normal((len(groups), 16))
    half = shares(rows(centers + noise, [f"d{group}" for group in groups]))["document"]
    # Directions of sums of two equal parts: half is the centers'.
    assert half.held_in > 0.7 and half.corrected == pytest.approx(0.5, abs=0.05)


def test_a_sample_of_the_groups_is_looked_at_where_not_all_fit():
    rng = np.random.default_rng(0)
    groups = np.arange(4000) // 4
    vectors = rng.standard_normal((1000, 4))[groups] + rng.standard_normal((4000, 4))
    data = rows(vectors, [f"d{group}" for group in groups])
    whole, some = shares(data)["document"], shares(data, group_bytes=300 * 4 * 8)["document"]
    assert whole.groups == 1000 and 100 < some.groups <= 300 and some.rows == 4 * some.groups
    assert some.corrected == pytest.approx(whole.corrected, abs=0.05)
    # The order of rows does not matter.
    backwards = shares(data.take(slice(None, None, -1)), group_bytes=300 * 4 * 8)["document"]
    assert dataclasses.astuple(backwards) == pytest.approx(dataclasses.astuple(some))


def test_where_nothing_varies_there_is_no_share():
    assert shares(rows(np.ones((4, 3)), ["a", "a", "b", "b"])) == {}
    assert shares(rows(np.zeros((4, 3)), ["a", "a", "b", "b"])) == {}
