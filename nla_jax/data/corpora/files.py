"""Corpora in local or remote files: text, JSON and parquet, compressed or not, alone or in folders."""

import contextlib
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from nla_jax.data.corpora.documents import (
    Document,
    documents_of_rows,
    field_of_row,
    missing_field,
    unicode_text,
)
from nla_jax.files import AnyPath, as_path, fingerprint

FORMATS = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
"""Endings of files that are read, in small or capital letters; all but parquet may be compressed."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ROWS_AT_ONCE = 1024
"""Rows of a parquet file that are in memory as documents at once."""


@dataclasses.dataclass(frozen=True)
class CorpusFiles:
    """The files of a corpus."""

    root: AnyPath
    """The folder that documents are named in."""
    files: tuple[AnyPath, ...]
    """What is read, in order."""
    unread: tuple[str, ...]
    """Further files in the folder, by their names in it."""

    def state(self) -> dict[str, str]:
        """What changes with every file that is read, by its name in the folder."""
        return {path.relative_to(self.root).as_posix(): fingerprint(path) for path in self.files}


def corpus_files(source: str) -> CorpusFiles:
    """Find the files of a corpus.

    Hidden files and folders (a dot before the name) are not read: systems and tools keep their own notes there.

    Args:
      source: a file or a folder; also a remote one, such as gs://BUCKET/FOLDER.

    Raises:
      FileNotFoundError: there is nothing of that name.
      ValueError: a file of another format.
    """
    root = as_path(source)
    if not root.exists():
        raise FileNotFoundError(
            f"corpus {source!r} does not exist; give docstrings, packages, requests, hf:NAME[:CONFIG][:SPLIT], or a "
            f"{', '.join(FORMATS)} file or a folder of them"
        )
    if not root.is_dir():
        if _format_of(root) is None:
            raise ValueError(
                f"{root}: unknown corpus format {''.join(root.suffixes[-2:])!r}; expected {', '.join(FORMATS)}, all "
                f"but parquet also with {' or '.join(COMPRESSIONS)} behind"
            )
        return CorpusFiles(root.parent, (root,), ())
    files, unread = [], []
    for path in sorted(_files_below(root), key=lambda path: path.parts):
        name = path.relative_to(root)
        is_read = _format_of(path) is not None and not any(part.startswith(".") for part in name.parts)
        (files if is_read else unread).append(path if is_read else name.as_posix())
    return CorpusFiles(root, tuple(files), tuple(unread))


def file_documents(source: str, *, field: str, notices: Counter[str]) -> Iterator[Document]:
    """Yield the documents of a file or folder.

    A text file is one document, named by its path in the folder, whose genre is the folder's name. The genre of rows
    that name none is the name of their file.

    Args:
      source: see `corpus_files`.
      field: key of the text in rows.
      notices: what was left out or changed is counted here.

    Raises:
      FileNotFoundError: see `corpus_files`.
      ValueError: see `corpus_files` and `documents_of_rows`; or a file that cannot be read.
    """
    corpus = corpus_files(source)
    if corpus.unread:
        some = ", ".join(corpus.unread[:3]) + (", ..." if len(corpus.unread) > 3 else "")
        notices[f"files in the folder that were not read ({some})"] += len(corpus.unread)
    for path in corpus.files:
        kind = _format_of(path)
        if kind == ".txt":
            name = path.relative_to(corpus.root).as_posix()
            with _opened(path, newline=None) as file:
                text = unicode_text(file.read(), notices).strip()
            if text:
                yield Document(name, text, path.parent.name or _stem(path))
            else:
                notices["files without text, left out"] += 1
            continue
        if kind == ".parquet":
            rows = _parquet_rows(path, field)
        elif kind == ".json":
            rows = _json_rows(path)
        else:
            rows = _json_lines(path)
        yield from documents_of_rows(rows, field=field, genre=_stem(path), notices=notices)


def _files_below(folder: AnyPath) -> list[AnyPath]:
    if isinstance(folder, Path):
        return [path for path in folder.rglob("*") if not path.is_dir()]
    import fsspec

    store, key = fsspec.url_to_fs(str(folder))  # One request lists all of them.
    return [folder / name[len(key) :].lstrip("/") for name in store.find(key)]


def _format_of(path: PurePath) -> str | None:
    """The format of a file by its name; None for files that are not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        kind = suffixes[-2] if len(suffixes) > 1 else None
        return kind if kind in FORMATS and kind != ".parquet" else None
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def _stem(path: PurePath) -> str:
    """A file's name without the endings of format and compression."""
    return PurePath(path.stem).stem if path.suffix.lower() in COMPRESSIONS else path.stem


@contextlib.contextmanager
def _opened(path: AnyPath, *, newline: str | None) -> Iterator[IO[str]]:
    """A file's text, decompressed and without a byte-order mark; ValueError names a file that cannot be read.

    Args:
      path: the file.
      newline: what ends a line, as for `io.TextIOWrapper`.
    """
    codec = COMPRESSIONS.get(path.suffix.lower())
    try:
        with path.open("rb") as file:
            raw = pa.CompressedInputStream(file, codec) if codec else file
            with io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline) as text:
                yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy or write it again") from error


def _json_lines(path: AnyPath) -> Iterator[tuple[str, Any]]:
    # Only \n ends a line: JSON strings may hold other line separators, such as U+2028, unescaped.
    with _opened(path, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _parsed(line, where)


def _json_rows(path: AnyPath) -> Iterator[tuple[str, Any]]:
    """Rows of a .json file, which is a list of rows; many files of that name hold a row a line instead."""
    with _opened(path, newline="\n") as file:
        is_list = file.read(1024).lstrip()[:1] == "["
    if not is_list:
        yield from _json_lines(path)
        return
    with _opened(path, newline="\n") as file:
        content = file.read()
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(_parsed(content, str(path)), 1))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not a JSON object: {error}; expected a row a line, or in a .json file one list of rows. Take "
            "files that hold no texts out of the folder"
        ) from error


def _parquet_rows(path: AnyPath, field: str) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as file:
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
            read = field_of_row(field, names)
            if read is None:
                raise missing_field(str(path), field, names)
            columns = [name for name in (read, "id", "genre") if name in names]
            number = 0
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); copy or write it again") from error
