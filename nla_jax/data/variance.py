"""How much of the variance of activations lies between groups of rows, such as places, documents or last tokens.

What a grouping explains is what a lookup by it could. Sums by group are taken in one pass over parts of the rows.
Shape letters: B rows of a part, D model.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, UInt64

from nla_jax.autoencoder import metrics
from nla_jax.autoencoder.yardstick import CHUNK_ROWS
from nla_jax.data.dataset import ActivationDataset

GROUP_BYTES = 2**26
"""Memory for the sums of one grouping. Of more groups than fit, those with the smallest hashes are kept: a random
choice, which does not depend on the order of rows."""


@dataclasses.dataclass(frozen=True)
class VarianceShare:
    """The share of the variance of normalized activations that lies between the groups of one grouping."""

    by: str
    """What rows of a group have in common."""
    rows: int
    groups: int
    held_in: float
    """Of the rows themselves, `1 - SS_within / SS_total`: 1 where every row is a group of its own."""
    corrected: float | None
    """The same with unbiased variances, `1 - (SS_within / (N - G)) / (SS_total / (N - 1))` for N rows in G groups,
    which is known as adjusted R² and as Kelley's ε². Means of small groups lie apart by chance alone, and this is
    subtracted: groups that mean nothing have about 0, which may come out a little negative, and groups of one row are
    not taken for explained. None where all groups have one row."""


class VarianceCounts:
    """Shares of variance in the making, of the rows of one data set."""

    def __init__(self, group_bytes: int = GROUP_BYTES):
        self._group_bytes = group_bytes
        self._groupings: dict[str, _GroupSums] = {}

    def add(self, part: ActivationDataset) -> None:
        """Add some rows."""
        groupings = {by: hashes(values) for by, values in _groups(part)}
        for start in range(0, len(part), CHUNK_ROWS):
            unit_BD = metrics.normalize(part.activations[start : start + CHUNK_ROWS]).astype(np.float64)
            for by, keys in groupings.items():
                if by not in self._groupings:
                    self._groupings[by] = _GroupSums(max(self._group_bytes // unit_BD[0].nbytes, 2))
                self._groupings[by].add(unit_BD, keys[start : start + CHUNK_ROWS])

    def shares(self) -> tuple[VarianceShare, ...]:
        """The share of each grouping that has several groups."""
        found = (sums.share(by) for by, sums in self._groupings.items())
        return tuple(share for share in found if share is not None)


class _GroupSums:
    """Of each group of one grouping the number of its rows, the sum of their squares, and their sum."""

    def __init__(self, most_groups: int):
        self._most, self._below = most_groups, 2**64
        self._groups: dict[int, tuple[int, float, np.ndarray]] = {}

    def add(self, unit_BD: Float[np.ndarray, "B D"], keys_B: UInt64[np.ndarray, "B"]) -> None:
        """Add rows by the hashes of their groups."""
        order = np.argsort(keys_B, kind="stable")
        keys, starts, counts = np.unique(keys_B[order], return_index=True, return_counts=True)
        sums = np.add.reduceat(unit_BD[order], starts, axis=0)
        squares = np.add.reduceat(np.square(unit_BD).sum(axis=1)[order], starts)
        for key, count, square, sum_D in zip(
            keys.tolist(), counts.tolist(), squares.tolist(), sums, strict=True
        ):
            if key < self._below:
                earlier = self._groups.get(key, (0, 0.0, 0.0))
                self._groups[key] = earlier[0] + count, earlier[1] + square, earlier[2] + sum_D
        while len(self._groups) > self._most:
            self._below //= 2
            self._groups = {key: group for key, group in self._groups.items() if key < self._below}

    def share(self, by: str) -> VarianceShare | None:
        """The share of the variance between the groups; None for a single one, and where nothing varies."""
        groups = len(self._groups)
        if groups < 2:
            return None
        rows = sum(count for count, _, _ in self._groups.values())
        squares = sum(square for _, square, _ in self._groups.values())
        explained = sum(np.dot(sum_D, sum_D) / count for count, _, sum_D in self._groups.values())
        total_D = sum(sum_D for _, _, sum_D in self._groups.values())
        total, within = float(squares - np.dot(total_D, total_D) / rows), float(squares - explained)
        if total <= 1e-9 * squares:
            return None
        corrected = None if rows == groups else 1 - (within / (rows - groups)) / (total / (rows - 1))
        return VarianceShare(by, rows, groups, 1 - within / total, corrected)


def _groups(part: ActivationDataset) -> Iterator[tuple[str, list[str]]]:
    """What rows are grouped by as far as the data tell it: its name, and the group of each row."""
    if (source_of := _source_reader(part.sidecar.extraction.corpus)) is not None:
        yield "source", [source_of(doc_id) for doc_id in part.doc_ids]
    for column in ("genre", "place"):
        if column in part.extra:
            yield column, [str(value) for value in part.extra[column]]
    yield "document", part.doc_ids
    ids = part.extra.get("last_token_ids")
    if ids is not None and all(ids):
        yield "last token", [str(own[-1]) for own in ids]
        yield "last two tokens", [str(own) for own in ids]


def _source_reader(corpus: str) -> Callable[[str], str] | None:
    """What tells the source of a document from its id; None where the corpus, by its name, is not a mixture."""
    named = [re.fullmatch(r"[\d.e-]+ (.+)", part) for part in corpus.split(" + ")]
    if len(named) < 2 or None in named:
        return None
    sources = sorted((match[1] for match in named), key=len, reverse=True)
    return lambda doc_id: next((source for source in sources if doc_id.startswith(f"{source}/")), "")


def hashes(texts: Sequence[str]) -> UInt64[np.ndarray, "N"]:
    """A number of 64 bits for each text."""
    digests = (hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), np.uint64)
