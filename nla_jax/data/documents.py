"""Documents, and how they are made of the rows of files and data sets."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nla_jax.lm.tokenized import as_unicode


@dataclasses.dataclass(frozen=True)
class Document:
    """One text to take contexts from."""

    id: str
    """A name that is unique in the corpus; splits and sampled positions are keyed by it."""
    text: str
    genre: str
    """Kind or origin of the text, as the built-in writer of warm-start texts names it."""


def documents_digest(documents: Sequence[Document]) -> str:
    """Identifies documents by their ids, texts and genres, in their order."""
    digest = hashlib.blake2b(digest_size=8)
    for document in documents:
        for part in dataclasses.astuple(document):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def documents_of_rows(
    rows: Iterable[tuple[str, Any]], *, field: str, genre: str, notices: Counter[str]
) -> Iterator[Document]:
    """Yield the documents of rows; rows whose text is null or blank are left out.

    Args:
      rows: the place of each row, for messages, and the row: a mapping with the text under `field`, and perhaps an `id`
        and a `genre`. A row without an id is named by a hash of its text.
      field: key of the text.
      genre: for rows that name none.
      notices: what was left out or changed is counted here.

    Raises:
      ValueError: a row that is no mapping or lacks the field, or whose text is no string; the message names its place.
    """
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{where}: this is of type {type(row).__name__}, expected an object with a field {field!r}"
            )
        if field not in row:
            raise missing_field(where, field, row)
        text = row[field]
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"{where}: the field {field!r} holds a value of type {type(text).__name__}, expected a string; name "
                "the field that holds the text with corpus.field"
            )
        text = unicode_text(text or "", notices).strip()
        if not text:
            notices["rows without text, left out"] += 1
            continue
        doc_id = row.get("id")
        if doc_id is None:
            doc_id = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        kind = row.get("genre")
        kind = genre if kind is None or kind == "" else kind
        yield Document(as_unicode(str(doc_id)), text, as_unicode(str(kind)))


def missing_field(where: str, field: str, found: Iterable[Any]) -> ValueError:
    """The error for a row or table without the field of the text."""
    return ValueError(
        f"{where}: there is no field {field!r}; found {', '.join(sorted(map(str, found))) or 'none'}: name the field "
        "that holds the text with corpus.field"
    )


def unicode_text(text: str, notices: Counter[str]) -> str:
    """A text without lone surrogates, see `as_unicode`; texts that held some are counted."""
    valid = as_unicode(text)
    if valid != text:
        notices["texts with halves of surrogate pairs, now U+FFFD"] += 1
    return valid
