"""Splits of documents: keyed hashes that decide a document's split, pairs across documents, and the check that
held-out documents were not trained on.

A hash needs no shuffled list: the answer for one document never depends on the others, on their order or on the number
of processes.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.store import StoredDataset

Data = TypeVar("Data", ActivationDataset, StoredDataset)

SPLITS = ("av_sft", "ar_sft", "rl", "held_out")
"""The disjoint uses of documents, in the order in which their fractions fill the unit interval."""
ROTATIONS_TRIED = 64
"""Rotations of all rows that `shuffled` tries before it draws a partner for each row alone."""

MONITOR_SHARE = 1 / 3
"""Share of the held-out documents that training is watched on, and that choose the steps that are kept."""


FEWEST_DOCUMENTS = {**dict.fromkeys(SPLITS, 2), "held_out": 4}
"""Documents that a split has at least: those that are held out are divided again, see `monitor_documents`."""


def hash_fraction(key: str, *, seed: int, purpose: str) -> float:
    """Map `key` to a uniform number in [0, 1), independent for every (seed, purpose).

    Args:
      key: any text, such as a document id.
      seed: any 64-bit signed integer.
      purpose: at most 16 bytes; two uses of the same key must not share one, or their choices are correlated.
    """
    digest = hashlib.blake2b(
        key.encode(errors="surrogatepass"),
        digest_size=8,
        key=seed.to_bytes(8, "little", signed=True),
        person=purpose.encode(),
    ).digest()
    # 53 bits are all a float holds; more could round up to 1.0.
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def split_of(doc_id: str, fractions: Mapping[str, float], seed: int) -> str:
    """Name the split of a document.

    Args:
      doc_id: the document's id; every row of a document lands in the same split.
      fractions: split name -> share of the documents; names from `SPLITS`, shares summing to 1.
      seed: another seed gives another, independent division.

    Raises:
      ValueError: an unknown split name, a negative share, or shares that do not sum to 1.
    """
    if unknown := sorted(set(fractions) - set(SPLITS)):
        raise ValueError(f"unknown splits {unknown}; the splits are {', '.join(SPLITS)}")
    if negative := {name: share for name, share in fractions.items() if share < 0}:
        raise ValueError(f"negative split fractions {negative}; give shares between 0 and 1")
    if not math.isclose(total := sum(fractions.values()), 1.0, abs_tol=1e-9):
        raise ValueError(f"split fractions {dict(fractions)} sum to {total:g}, expected 1")
    position = hash_fraction(doc_id, seed=seed, purpose="split")
    used = [name for name in SPLITS if fractions.get(name, 0) > 0]
    edge = 0.0
    for name in used:
        edge += fractions[name]
        if position < edge:
            return name
    return used[-1]  # the shares may sum to a hair less than 1


def splits_of(doc_ids: Sequence[str], fractions: Mapping[str, float], seed: int) -> np.ndarray:
    """The split of each row by its document, see `split_of`, as an array of names that compares with a name."""
    return np.array([split_of(doc_id, fractions, seed) for doc_id in doc_ids], dtype=object)


def check_documents(counts: Mapping[str, int]) -> None:
    """Check how many documents each split has.

    Raises:
      ValueError: a split has fewer than `FEWEST_DOCUMENTS`.
    """
    small = {split: counts[split] for split, fewest in FEWEST_DOCUMENTS.items() if counts[split] < fewest}
    if small:
        found = ", ".join(f"{split} has {count}" for split, count in small.items())
        raise ValueError(
            f"there are too few documents: {found}, and every split needs 2, held_out 4; use more documents or larger "
            "shares (corpus.held_out and its neighbors)"
        )


def monitor_documents(doc_ids: Iterable[str], seed: int) -> set[str]:
    """The held-out documents that training is watched on; figures are reported on the others.

    A step that is kept because it is the best on some documents flatters on them. Both parts have a document at least,
    and two where there are four.

    Args:
      doc_ids: those of all held-out rows, in any order.
      seed: another seed gives another, independent division.

    Raises:
      ValueError: there is one document, or none.
    """
    places = {doc_id: hash_fraction(doc_id, seed=seed, purpose="monitor") for doc_id in set(doc_ids)}
    if len(places) < 2:
        raise ValueError(
            f"the held-out rows are of {len(places)} document(s) {sorted(places)}; one at least is for choosing the "
            "step that is kept, and another for figures: hold more documents out (corpus.held_out, or another "
            "data.held_out)"
        )
    fewest = 2 if len(places) > 3 else 1
    count = sum(place < MONITOR_SHARE for place in places.values())
    count = min(max(count, fewest), len(places) - fewest)
    return set(sorted(places, key=places.get)[:count])


def shuffled(items: Sequence[Any], doc_ids: Sequence[str], seed: int) -> list[Any]:
    """For every row, the item of a row of another document.

    Raises:
      ValueError: all rows are of one document.
    """
    if len(set(doc_ids)) < 2:
        raise ValueError(
            f"{len(items)} rows of one document cannot be exchanged for those of others; use more documents "
            "(corpus.held_out) or more rows (evaluation.rows, evaluation.monitor_rows)"
        )
    order = np.random.default_rng(seed).permutation(len(items))
    document_N, rows_D = numbered(doc_ids)
    for shift in range(1, min(len(items), ROTATIONS_TRIED + 1)):
        partner = np.empty(len(items), int)
        partner[order] = np.roll(order, shift)
        if (document_N[partner] != document_N).all():
            return [items[i] for i in partner]
    # Where documents have many rows, hardly a rotation avoids the row's own. With each document's rows side by side, a
    # partner is drawn from the rows before them and behind them.
    by_document_N = np.argsort(document_N, kind="stable")
    own_N, first_N = rows_D[document_N], (np.cumsum(rows_D) - rows_D)[document_N]
    drawn_N = np.random.default_rng(seed).integers(len(items) - own_N)
    return [items[i] for i in by_document_N[drawn_N + own_N * (drawn_N >= first_N)]]


def some_rows(data: Data, count: int, seed: int) -> Data:
    """At most `count` rows, in their order: the first of an order that mixes documents."""
    order = np.random.default_rng(seed).permutation(len(data))
    return data.take(np.sort(order[:count]))


def numbered(doc_ids: Sequence[str]) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "D"]]:
    """The number of each row's document, documents being in the order of their ids, and the rows of each document."""
    number_of = {doc: number for number, doc in enumerate(sorted(set(doc_ids)))}
    document_N = np.fromiter((number_of[doc] for doc in doc_ids), int, len(doc_ids))
    return document_N, np.bincount(document_N, minlength=len(number_of))


def text_start(text: str) -> str:
    """The first 160 characters of a text, with one blank between words: two copies of a document share them."""
    # Eighty words with a blank behind each have 160 characters at least.
    return " ".join(text.split(None, 80))[:160]


def check_unseen(
    data: ActivationDataset, trained_on: Iterable[tuple[str, Sequence[str], Sequence[str | None]]]
) -> None:
    """Refuse held-out rows of documents that were trained on.

    Two documents count as the same if they have one id, or if their texts begin with the same 160 characters.

    Args:
      data: the held-out rows.
      trained_on: the rows of the other splits, some at a time: the split's name, their documents and their contexts.

    Raises:
      ValueError: a document was trained on; the message gives the number of such documents and the first few.
    """
    documents = set(data.doc_ids)
    held_out = dict(zip(map(text_start, data.contexts or ()), data.doc_ids, strict=False))
    held_out.pop("", None)
    shared: dict[str, set[str]] = {}
    for split, doc_ids, contexts in trained_on:
        starts = [text_start(context or "") for context in contexts]
        shared.setdefault(split, set()).update(documents.intersection(doc_ids))
        shared[split] |= {held_out[start] for start in starts if start in held_out}
    for split, seen in shared.items():
        if seen:
            some = ", ".join(sorted(seen)[:3])
            raise ValueError(
                f"{len(seen)} of {len(documents)} documents to evaluate on were trained on in {split} "
                f"({some}{', ...' if len(seen) > 3 else ''}): every figure would flatter; hold other documents "
                "out"
            )
