import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_jax.data.corpora import document_store
from nla_jax.data.corpora.document_store import CorpusRecord, DocumentStore, write_documents
from nla_jax.data.corpora.documents import Document, documents_digest

CHAT = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "é\u2028", "tool_calls": [{"a": [1]}]},
)
DOCUMENTS = [Document(f"d{i}", f"text {i}", "g", CHAT if i % 3 == 0 else None) for i in range(10)]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Ten documents, four in a file."""
    monkeypatch.setattr(document_store, "DOCUMENTS_A_FILE", 4)
    count, digest = write_documents(tmp_path / "documents", iter(DOCUMENTS))
    assert (count, digest) == (10, documents_digest(DOCUMENTS))
    return DocumentStore(tmp_path / "documents", CorpusRecord("c", count, digest, {}))


def test_any_range_of_documents_is_read_as_it_was_written(store):
    assert len(store) == 10 and list(store) == DOCUMENTS
    assert len(list(store.folder.iterdir())) == 3
    for start in range(11):
        for stop in range(start, 11):
            assert store.read(start, stop) == DOCUMENTS[start:stop]
    with pytest.raises(IndexError, match="documents 8 to 12 were asked for, and it has 10"):
        store.read(8, 12)


def test_a_read_opens_the_files_that_hold_its_documents(store):
    for number in (0, 2):
        (store.folder / f"documents-0000{number}.parquet").unlink()
    assert store.read(4, 8) == DOCUMENTS[4:8]


def test_damaged_files_are_named(store):
    first, second, third = sorted(store.folder.iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:200])
    pq.write_table(pa.table({"id": ["x"], "text": ["y"], "genre": ["g"], "messages": [None]}), third)
    for start, kind, message in (
        (
            0,
            FileNotFoundError,
            r"documents-00000.parquet is missing, and with it 4 documents of this run; delete",
        ),
        (4, ValueError, r"documents-00001.parquet is damaged \(.*\); delete .* to read the corpus again"),
        (8, ValueError, r"documents-00002.parquet holds 1 documents, expected 2; delete"),
    ):
        with pytest.raises(kind, match=message):
            store.read(start, start + 1)


def test_a_flipped_bit_is_noticed(store):
    path = store.folder / "documents-00000.parquet"
    data = bytearray(path.read_bytes())
    texts = pq.ParquetFile(path).metadata.row_group(0).column(1)
    start = texts.dictionary_page_offset or texts.data_page_offset
    data[start + texts.total_compressed_size - 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"documents-00000.parquet is damaged"):
        store.read(0, 1)
