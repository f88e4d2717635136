"""Duplicates among documents: texts that are the same after normalization, and texts that are nearly the same.

What was seen is kept as 64-bit hashes in a database on disk, so that memory does not grow with the corpus.
"""

import hashlib
import re
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from nla_jax.data.corpora.documents import Document
from nla_jax.data.splits import hash_fraction

Duplicates = Literal["same_id", "exact", "near"]
"""Which documents are left out as repetitions of an earlier one: those with its id; also those with its normalized
text; also those with nearly its text."""

WORDS = 5
"""Words in a run; two texts are as similar as the sets of their runs of words are by Jaccard's index."""
BANDS, ROWS = 14, 8
"""Signatures of 112 values in 14 bands of 8 values: texts with one equal band are near duplicates. Two texts of Jaccard
similarity s are found with probability 1 - (1 - s**8)**14: 0.05 at 0.5, 0.56 at 0.7, 0.92 at 0.8 and 1.00 at 0.9. These
are the settings of the FineWeb corpus (Penedo et al., 2024)."""

REPEATED_WORDS = 8
"""Words in a run of which a built-in corpus repeats few."""
MAX_REPEATED = 0.5
"""Largest share of a document's runs that may occur in the documents of a built-in corpus chosen before it."""

_FACTORS_BR = np.random.default_rng(0).integers(2**64, size=(BANDS, ROWS), dtype=np.uint64) | np.uint64(1)
"""Factors of a multilinear hash of each band's values modulo 2^64, others for every band."""


def words_of(text: str) -> list[str]:
    """The words of a text for comparisons, in small letters and without punctuation.

    A text of nothing but punctuation has its signs as its words.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    return re.findall(r"\w+", text) or text.split()


class SeenHashes:
    """A set of 64-bit numbers with a value each, in a database on disk; it is gone when the block ends."""

    def __init__(self, folder: Path):
        """Make an empty set.

        Args:
          folder: where the database lies; it needs about 15 bytes a number.
        """
        # Nothing has to survive a crash, so there is neither a journal nor a wait for the disk.
        self._path = folder / "seen.sqlite"
        self._database = sqlite3.connect(self._path, isolation_level=None)
        self._database.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-65536; PRAGMA locking_mode=EXCLUSIVE;"
            "CREATE TABLE seen (hash INTEGER PRIMARY KEY, value INTEGER); BEGIN"
        )

    def __enter__(self) -> "SeenHashes":
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()
        self._path.unlink(missing_ok=True)

    def find(self, hashes: list[int]) -> list[int]:
        """The values of those of the hashes that are in the set."""
        places = ",".join("?" * len(hashes))
        return [
            value
            for (value,) in self._database.execute(f"SELECT value FROM seen WHERE hash IN ({places})", hashes)
        ]

    def add(self, hashes: Iterable[int], value: int = 0) -> None:
        """Put hashes into the set; those that are in it keep their value."""
        self._database.executemany(
            "INSERT OR IGNORE INTO seen VALUES (?, ?)", ((key, value) for key in hashes)
        )


def hash64(kind: str, data: str | bytes) -> int:
    """A signed 64-bit hash, independent for every kind of at most 16 bytes."""
    data = data.encode() if isinstance(data, str) else data
    digest = hashlib.blake2b(data, digest_size=8, person=kind.encode()).digest()
    return int.from_bytes(digest, "little", signed=True)


def text_hashes(text: str, duplicates: Duplicates) -> list[int]:
    """Hashes of a text of which any two duplicates share at least one; none where only ids are compared.

    Args:
      text: the text of a document.
      duplicates: what counts as a duplicate.

    Raises:
      ModuleNotFoundError: near duplicates are asked for, and the package `rensa` is not installed.
    """
    if duplicates == "same_id":
        return []
    words = words_of(text)
    return [hash64("text", " ".join(words)), *(band_hashes(words) if duplicates == "near" else ())]


def band_hashes(words: list[str]) -> list[int]:
    """A signed 64-bit hash of each band of the MinHash signature of a text, see `BANDS`.

    Args:
      words: the words of the text; a text of fewer than `WORDS` words is one run.

    Raises:
      ModuleNotFoundError: the package `rensa` is not installed.
    """
    try:
        from rensa import RMinHash
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "near duplicates are found with the optional package `rensa`; run `pip install rensa`, or set "
            "corpus.duplicates to exact or same_id"
        ) from error
    runs = list(map(" ".join, zip(*(words[start:] for start in range(WORDS)), strict=False)))
    signature = RMinHash(num_perm=BANDS * ROWS, seed=0)
    signature.update(runs or [" ".join(words)])
    signature_BR = np.array(signature.digest(), np.uint64).reshape(BANDS, ROWS)
    return (signature_BR * _FACTORS_BR).sum(axis=1).view(np.int64).tolist()


def without_repeated_runs(
    documents: Iterable[Document], *, purpose: str, limits: Callable[[Document], Mapping[Hashable, int]]
) -> Iterator[Document]:
    """Choose documents of a built-in corpus that repeat each other little, up to a number of each group.

    A held-out document must not be a training document with one name changed, so that documents of which more than
    `MAX_REPEATED` of the runs of `REPEATED_WORDS` words occurred before are left out. All runs are kept in memory.

    Args:
      documents: are ordered by a hash of their id, which decides which of several similar ones is kept.
      purpose: keys the order.
      limits: gives the groups that a document belongs to, each with the most documents that it may have.
    """
    counts: Counter[Hashable] = Counter()
    seen: set[int] = set()
    for document in sorted(documents, key=lambda d: hash_fraction(d.id, seed=0, purpose=purpose)):
        words = _spaced_words(document.text)
        runs = {
            hash(tuple(words[i : i + REPEATED_WORDS])) for i in range(max(len(words) - REPEATED_WORDS + 1, 1))
        }
        has_room = all(counts[group] < most for group, most in limits(document).items())
        if has_room and len(runs & seen) <= MAX_REPEATED * len(runs):
            counts.update(limits(document).keys())
            seen |= runs
            yield document


def _spaced_words(text: str) -> list[str]:
    """The words between spaces in small letters; of a script without spaces the characters."""
    words = text.lower().split()
    return words if 20 * len(words) > len(text) else list(text)


def shared_between(texts: Iterable[tuple[str, str]], *, folder: Path, duplicates: Duplicates) -> Counter[str]:
    """Count the texts of each part of a corpus that repeat a text of another part.

    Args:
      texts: the part, such as a split, and the text of each document.
      folder: an existing folder on this machine, for what was seen.
      duplicates: exact or near, see `Duplicates`.

    Returns:
      The parts that are concerned, such as "av_sft and held_out", and for each how many texts came after a text of the
      other part.

    Raises:
      ModuleNotFoundError: near duplicates are asked for, and the package `rensa` is not installed.
    """
    shared: Counter[str] = Counter()
    parts: list[str] = []
    with SeenHashes(folder) as seen:
        for part, text in texts:
            if part not in parts:
                parts.append(part)
            hashes = text_hashes(text, duplicates)
            for other in {parts[number] for number in seen.find(hashes)} - {part}:
                shared[" and ".join(sorted((part, other)))] += 1
            seen.add(hashes, parts.index(part))
    return shared
