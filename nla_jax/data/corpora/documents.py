"""Documents, and how they are made of the rows of files and data sets."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nla_jax.data.corpora.chats import CHAT_FIELDS, ChatLeftOut, Message, read_chat, render_plain
from nla_jax.lm.tokenized import as_unicode


@dataclasses.dataclass(frozen=True)
class Document:
    """One text or chat to take contexts from."""

    id: str
    """A name that is unique in the corpus; splits and sampled positions are keyed by it."""
    text: str
    """The text; of a chat a plain rendering, see `render_plain`, and activations are read of its messages instead."""
    genre: str
    """Kind or origin of the text, as the built-in writer of warm-start texts names it."""
    messages: tuple[Message, ...] | None = None
    """The turns of a chat, as `read_chat` gives them; None for other texts."""

    @property
    def messages_json(self) -> str | None:
        """The messages as JSON, as they are stored; None for other texts."""
        return None if self.messages is None else json.dumps(self.messages, ensure_ascii=False)


class DocumentsDigest:
    """Identifies documents by their ids, texts, genres and messages, in the order in which they are added."""

    def __init__(self):
        self._digest = hashlib.blake2b(digest_size=8)

    def add(self, document: Document) -> None:
        """Add the next document."""
        messages = document.messages_json
        for part in (document.id, document.text, document.genre, *([] if messages is None else [messages])):
            data = part.encode()
            self._digest.update(len(data).to_bytes(8, "little") + data)

    def hexdigest(self) -> str:
        """The digest of what was added, 16 hexadecimal digits."""
        return self._digest.hexdigest()


def documents_digest(documents: Iterable[Document]) -> str:
    """Identifies documents by their ids, texts, genres and messages, in their order."""
    digest = DocumentsDigest()
    for document in documents:
        digest.add(document)
    return digest.hexdigest()


def documents_of_rows(
    rows: Iterable[tuple[str, Any]], *, field: str, genre: str, notices: Counter[str]
) -> Iterator[Document]:
    """Yield the documents of rows; rows whose text is null or blank and chats that cannot be used are left out.

    Args:
      rows: the place of each row, for messages, and the row: a mapping with the text or the chat under `field`, or a
        chat under one of `CHAT_FIELDS`, and perhaps an `id` and a `genre`. A row without an id is named by a hash of
        its text.
      field: key of the text or chat.
      genre: for rows that name none.
      notices: what was left out or changed is counted here.

    Raises:
      ValueError: a row that is no mapping or lacks the field, or whose text is neither string nor chat; the message
        names its place.
    """
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{where}: this is of type {type(row).__name__}, expected an object with a field {field!r}"
            )
        name = field_of_row(field, row)
        if name is None:
            raise missing_field(where, field, row)
        messages = None
        if name in CHAT_FIELDS or isinstance(row[name], list | tuple):
            if not row[name]:
                notices["rows without text, left out"] += 1
                continue
            try:
                messages = read_chat(row[name], where)
            except ChatLeftOut as reason:
                notices[f"{reason}, left out"] += 1
                continue
            text = render_plain(messages)
        else:
            text = _text_of_row(row[name], name, where, notices)
        if not text:
            notices["rows without text, left out"] += 1
            continue
        doc_id = row.get("id")
        if doc_id is None:
            doc_id = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        kind = row.get("genre")
        kind = genre if kind is None or kind == "" else kind
        yield Document(as_unicode(str(doc_id)), text, as_unicode(str(kind)), messages)


def _text_of_row(text: Any, field: str, where: str, notices: Counter[str]) -> str:
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"{where}: the field {field!r} holds a value of type {type(text).__name__}, expected a string or a chat; "
            "name the field that holds the text with corpus.field"
        )
    return unicode_text(text or "", notices).strip()


def field_of_row(field: str, names: Iterable[str]) -> str | None:
    """The field of a row or table that is read: `field`, else the first of `CHAT_FIELDS` that there is, else None."""
    names = set(names)
    return next((name for name in (field, *CHAT_FIELDS) if name in names), None)


def missing_field(where: str, field: str, found: Iterable[Any]) -> ValueError:
    """The error for a row or table without the field of the text."""
    return ValueError(
        f"{where}: there is no field {field!r}; found {', '.join(sorted(map(str, found))) or 'none'}: name the field "
        "that holds the text or the chat with corpus.field"
    )


def unicode_text(text: str, notices: Counter[str]) -> str:
    """A text without lone surrogates, see `as_unicode`; texts that held some are counted."""
    valid = as_unicode(text)
    if valid != text:
        notices["texts with halves of surrogate pairs, now U+FFFD"] += 1
    return valid
