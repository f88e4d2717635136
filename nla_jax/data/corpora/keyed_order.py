"""Documents in an order keyed by (seed, document id), sorted on disk, so that memory does not grow with the corpus."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from nla_jax.data.corpora.documents import Document
from nla_jax.data.splits import hash_fraction

KEYS_AT_ONCE = 100_000
"""Keys that are gathered before the bound of a limited choice is computed again."""


def in_keyed_order(
    documents: Iterable[Document], *, seed: int, folder: Path, limit: int | None = None
) -> Iterator[Document]:
    """Yield documents ordered by a hash of (seed, id), and equal ids in the order in which they came.

    The order does not depend on the order of the documents given, and a smaller limit gives a prefix of a larger one.

    Args:
      documents: read once, and kept in a database in `folder` as far as they can be among the first.
      seed: seed of the order.
      folder: where the database lies; it needs as much space as the texts.
      limit: how many different ids are needed at most; None for all. Somewhat more may be yielded.
    """
    database = sqlite3.connect(folder / "ordered.sqlite", isolation_level=None)
    try:
        # Nothing has to survive a crash, so there is neither a journal nor a wait for the disk.
        database.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-65536; PRAGMA locking_mode=EXCLUSIVE;"
            "CREATE TABLE documents (key REAL, id TEXT, text TEXT, genre TEXT, messages TEXT); BEGIN"
        )
        bound = _Bound(limit)
        for document in documents:
            key = hash_fraction(document.id, seed=seed, purpose="corpus")
            if bound.admits(key):
                row = (key, document.id, document.text, document.genre, document.messages_json)
                database.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?)", row)
        # The index is sorted on disk; sorting the rows themselves would move every text several times.
        database.execute("CREATE INDEX by_key ON documents (key, id)")
        found = database.execute("SELECT id, text, genre, messages FROM documents ORDER BY key, id, rowid")
        for doc_id, text, genre, messages in found:
            yield Document(doc_id, text, genre, messages_of_json(messages))
    finally:
        database.close()
        (folder / "ordered.sqlite").unlink(missing_ok=True)


def messages_of_json(text: str | None) -> tuple[dict, ...] | None:
    """The messages of a document from `Document.messages_json`."""
    return None if text is None else tuple(json.loads(text))


class _Bound:
    """The key above which a document cannot be among the first `limit`."""

    def __init__(self, limit: int | None):
        self._limit, self._bound = limit, 1.0
        self._keys: list[float] = []
        self._smallest = np.empty(0)

    def admits(self, key: float) -> bool:
        """Whether a document with this key can still be among the first; the key is noted."""
        if self._limit is None:
            return True
        if key > self._bound:
            return False
        self._keys.append(key)
        if len(self._keys) >= max(self._limit, KEYS_AT_ONCE):
            # Equal keys are of equal ids, of which one is kept.
            self._smallest = np.unique(np.concatenate([self._smallest, self._keys]))[: self._limit]
            self._keys = []
            if len(self._smallest) == self._limit:
                self._bound = float(self._smallest[-1])
        return True
