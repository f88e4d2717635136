import hashlib

import numpy as np
import pytest

from nla_jax.data.splits import (
    SPLITS,
    check_documents,
    hash_fraction,
    monitor_documents,
    numbered,
    shuffled,
    split_of,
)

QUARTERS = dict.fromkeys(SPLITS, 0.25)


def test_hash_fraction_is_the_top_53_bits_of_the_keyed_digest():
    key = (7).to_bytes(8, "little")
    digest = hashlib.blake2b(b"doc", digest_size=8, key=key, person=b"split").digest()
    assert hash_fraction("doc", seed=7, purpose="split") == int.from_bytes(digest, "little") // 2**11 / 2**53


def test_split_is_where_the_fraction_falls():
    for i in range(200):
        position = hash_fraction(f"d{i}", seed=3, purpose="split")
        assert split_of(f"d{i}", QUARTERS, 3) == SPLITS[int(position * 4)]


def test_shares_are_met_and_seeds_differ():
    fractions = {"av_sft": 0.5, "ar_sft": 0.0, "rl": 0.3, "held_out": 0.2}
    names = [split_of(f"d{i}", fractions, 0) for i in range(4000)]
    for split, share in fractions.items():
        assert abs(names.count(split) / 4000 - share) < 0.03  # 4 standard deviations
    again = [split_of(f"d{i}", fractions, 1) for i in range(4000)]
    agreement = sum(a == b for a, b in zip(names, again, strict=True)) / 4000
    assert abs(agreement - (0.25 + 0.09 + 0.04)) < 0.03


def test_order_of_the_mapping_does_not_matter():
    backwards = dict(reversed(QUARTERS.items()))
    assert all(split_of(f"d{i}", QUARTERS, 0) == split_of(f"d{i}", backwards, 0) for i in range(50))


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"rl": 0.5, "held_out": 0.4}, "sum to 0.9, expected 1"),
        ({"rl": 0.5, "test": 0.5}, r"unknown splits \['test'\]; the splits are av_sft, ar_sft, rl, held_out"),
        ({"rl": 1.5, "held_out": -0.5}, "negative split fractions {'held_out': -0.5}"),
    ],
)
def test_bad_fractions(fractions, message):
    with pytest.raises(ValueError, match=message):
        split_of("d", fractions, 0)


def test_documents_that_choose_steps_are_a_third_by_their_hash():
    documents = [f"d{i}" for i in range(3000)]
    monitored = monitor_documents(documents, 5)
    assert monitored == {d for d in documents if hash_fraction(d, seed=5, purpose="monitor") < 1 / 3}
    assert abs(len(monitored) / 3000 - 1 / 3) < 0.04
    # Neither the order of rows nor their number changes anything; the seed does.
    assert monitor_documents([*reversed(documents), *documents], 5) == monitored
    assert monitor_documents(documents, 6) != monitored


@pytest.mark.parametrize(("documents", "fewest"), [(2, 1), (3, 1), (4, 2), (5, 2)])
def test_both_parts_of_few_held_out_documents_have_some(documents, fewest):
    ids = [f"d{i}" for i in range(documents)]
    sizes = {len(monitor_documents(ids, seed)) for seed in range(200)}
    assert sizes == set(range(fewest, documents - fewest + 1))
    # Those with the smallest numbers are taken.
    places = sorted(ids, key=lambda doc: hash_fraction(doc, seed=1, purpose="monitor"))
    chosen = monitor_documents(ids, 1)
    assert chosen == set(places[: len(chosen)])


def test_one_document_cannot_both_choose_and_report():
    with pytest.raises(ValueError, match=r"of 1 document\(s\) \['d0'\]; .* hold more documents out"):
        monitor_documents(["d0", "d0"], 0)
    with pytest.raises(ValueError, match="3 rows of one document cannot be exchanged"):
        shuffled("abc", ["d0"] * 3, 0)


def test_documents_are_numbered_in_the_order_of_their_ids():
    document_N, rows_D = numbered(["b", "ä", "b", "a", ""])
    assert document_N.tolist() == [2, 3, 2, 1, 0]
    assert rows_D.tolist() == [1, 1, 2, 1]


def test_partners_are_of_other_documents_where_no_rotation_fits_and_each_as_often():
    # Forty rows each of four documents: a rotation that avoids each row's own document all but never exists.
    doc_ids = [f"d{row % 4}" for row in range(160)]
    counts = np.zeros((4, 160))
    for seed in range(200):
        for row, partner in enumerate(shuffled(range(160), doc_ids, seed)):
            counts[row % 4, partner] += 1
    same = np.arange(4)[:, None] == np.arange(160) % 4
    assert not counts[same].any()
    # 40 rows of 200 draws over 120 partners: 67 of each, with a standard deviation of 8.
    assert abs(counts[~same] - 200 / 3).max() < 40


def test_partners_of_a_document_that_has_most_rows():
    doc_ids = ["a"] * 50 + ["b"] * 3
    partners = shuffled(doc_ids, doc_ids, 0)
    assert partners == ["b"] * 50 + ["a"] * 3


def test_a_split_with_too_few_documents_is_named():
    check_documents({"av_sft": 2, "ar_sft": 2, "rl": 2, "held_out": 4})
    with pytest.raises(ValueError, match="too few documents: rl has 1, held_out has 3, and every split"):
        check_documents({"av_sft": 2, "ar_sft": 2, "rl": 1, "held_out": 3})
