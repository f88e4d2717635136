"""The chosen documents of a run on disk, of which parts are read: parquet files of a fixed number of documents each."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from nla_jax.data.corpora.documents import Document, DocumentsDigest
from nla_jax.data.corpora.keyed_order import messages_of_json
from nla_jax.files import AnyPath, local_copy, write_atomically

DOCUMENTS_A_FILE = 4096
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.large_string()),
        ("genre", pa.string()),
        ("messages", pa.large_string()),
    ]
)
"""Columns of a file; `messages` is JSON, and null for documents that are no chats."""


@dataclasses.dataclass(frozen=True)
class CorpusRecord:
    """What tells the documents of a run from others."""

    corpus: str
    """The corpus or the data sets as the config names them."""
    documents: int
    """How many were chosen."""
    digest: str
    """Of the chosen documents, see `documents_digest`, or of the rows of data sets, see `splits_digest`."""
    state: dict[str, str]
    """Tells whether there may be others now, see `corpus_state` and `data_state`."""
    choice: str | None = None
    """Digest of the config fields that decide the choice; None of data sets, and where no documents are stored."""
    sources: dict[str, int] = dataclasses.field(default_factory=dict)
    """How many documents were chosen of each source; empty of data sets, and in earlier runs."""
    notices: dict[str, int] = dataclasses.field(default_factory=dict)
    """What was left out or changed, counted by reason."""


class DocumentStore:
    """Documents in the files of a folder, in a fixed order; at most two files of them are in memory."""

    def __init__(self, folder: AnyPath, record: CorpusRecord):
        """Open a store; nothing is read yet.

        Args:
          folder: of the files that `write_documents` wrote.
          record: of the documents.
        """
        self.folder, self.record, self._count = folder, record, record.documents
        self._file = functools.lru_cache(maxsize=2)(self._read_file)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Document]:
        for start in range(0, self._count, DOCUMENTS_A_FILE):
            yield from self.read(start, min(start + DOCUMENTS_A_FILE, self._count))

    def read(self, start: int, stop: int) -> list[Document]:
        """The documents from `start` to before `stop`.

        Raises:
          IndexError: there are not as many.
          FileNotFoundError, ValueError: a file is missing or damaged.
        """
        if not 0 <= start <= stop <= self._count:
            raise IndexError(
                f"{self.folder}: documents {start} to {stop} were asked for, and it has {self._count}"
            )
        documents: list[Document] = []
        while start < stop:
            number, first = divmod(start, DOCUMENTS_A_FILE)
            part = self._file(number)[first : first + stop - start]
            documents += part
            start += len(part)
        return documents

    def _read_file(self, number: int) -> list[Document]:
        path = _file_of(self.folder, number)
        expected = min(DOCUMENTS_A_FILE, self._count - number * DOCUMENTS_A_FILE)
        remedy = f"delete {self.folder.parent} to read the corpus again"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing, and with it {expected} documents of this run; {remedy}"
            )
        try:
            with local_copy(path) as file:
                table = pq.read_table(file, page_checksum_verification=True)
            columns = [table.column(name).to_pylist() for name in SCHEMA.names]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
        if len(table) != expected:
            raise ValueError(f"{path} holds {len(table)} documents, expected {expected}; {remedy}")
        return [
            Document(doc_id, text, genre, messages_of_json(messages))
            for doc_id, text, genre, messages in zip(*columns, strict=True)
        ]


def write_documents(folder: AnyPath, documents: Iterable[Document]) -> tuple[int, str]:
    """Write documents to the files of a folder, in their order; files that are there are replaced.

    Args:
      folder: is made if need be.
      documents: read once, of which one file's are in memory.

    Returns:
      How many they are, and their digest (see `documents_digest`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest, count, pending = DocumentsDigest(), 0, []
    for document in documents:
        digest.add(document)
        pending.append(document)
        count += 1
        if len(pending) == DOCUMENTS_A_FILE:
            _write_file(_file_of(folder, count // DOCUMENTS_A_FILE - 1), pending)
            pending = []
    if pending:
        _write_file(_file_of(folder, count // DOCUMENTS_A_FILE), pending)
    return count, digest.hexdigest()


def _file_of(folder: AnyPath, number: int) -> AnyPath:
    return folder / f"documents-{number:05d}.parquet"


def _write_file(path: AnyPath, documents: list[Document]) -> None:
    columns = {
        "id": [document.id for document in documents],
        "text": [document.text for document in documents],
        "genre": [document.genre for document in documents],
        "messages": [document.messages_json for document in documents],
    }
    with write_atomically(path) as temporary:
        pq.write_table(pa.table(columns, SCHEMA), temporary, compression="zstd", write_page_checksum=True)
