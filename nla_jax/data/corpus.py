"""Documents from files, Hugging Face data sets, or the docstrings of the installed packages."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from nla_jax.data.corpus_files import corpus_files, file_documents
from nla_jax.data.docstrings import docstring_documents, docstring_versions
from nla_jax.data.documents import Document, documents_of_rows
from nla_jax.data.splits import hash_fraction
from nla_jax.process import warn

STREAMED_ROWS = 10
"""Rows of a Hugging Face data set that are read for each of `max_documents`."""


def load_corpus(
    source: str, *, field: str = "text", max_documents: int | None = None, seed: int = 0
) -> list[Document]:
    """Load the documents of a source, in an order keyed by (seed, document id).

    The order does not depend on the order of files or rows, and a smaller `max_documents` gives a prefix of a
    larger one; only of a Hugging Face data set that is streamed (see `source`) are the first rows alone ordered.
    A repeated row is kept once. What is left out (rows without text, files that are not read) or changed (lone
    surrogates, in whose place comes U+FFFD) is counted in one warning.

    Args:
      source: one of
        - `docstrings` (built in, offline),
        - a file or a folder, also a remote one such as gs://BUCKET/FOLDER: `.txt` (one document), `.jsonl` or
          `.ndjson` (a row a line), `.json` (a list of rows) or `.parquet`, all but the last also as `.gz` or `.zst`.
          Rows hold a text and perhaps an `id` and a `genre`; text files are named by their path in the folder, rows
          without `id` by a hash of their text. Hidden files are not read.
        - `hf:NAME[:CONFIG][:SPLIT]`: split `train` by default, and a part of it as `train[:1%]`. With `max_documents`
          and a whole split the data set is streamed, and only its first `10 * max_documents` rows are read.
      field: name of the field or column of rows that holds the text.
      max_documents: keep at most this many documents.
      seed: seed of the order, and so of the choice.

    Raises:
      FileNotFoundError: the source is neither a known name nor an existing path.
      ValueError: unreadable or empty source, a row without the field, or two different texts under one id.
      ModuleNotFoundError: `hf:` without the `datasets` package.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents={max_documents}; expected a positive number, or None for all")
    notices: Counter[str] = Counter()
    if source == "docstrings":
        documents = docstring_documents()
    elif source.startswith("hf:"):
        rows = _hub_rows(source, max_documents)
        documents = documents_of_rows(rows, field=field, genre=parse_hub_source(source)[0], notices=notices)
    else:
        documents = file_documents(source, field=field, notices=notices)
    unique: dict[str, Document] = {}
    for document in documents:
        kept = unique.setdefault(document.id, document)
        if kept.text != document.text:
            raise ValueError(
                f"{source}: two different texts have the id {document.id!r}; make the ids unique, or leave them out: "
                "rows without one are named by a hash of their text"
            )
    found = "; ".join(f"{what}: {count}" for what, count in notices.items())
    if not unique:
        raise ValueError(f"{source}: no documents with text; expected at least one{found and f' ({found})'}")
    if found:
        warn(f"{source}: {found}")
    ordered = sorted(unique.values(), key=lambda d: (hash_fraction(d.id, seed=seed, purpose="corpus"), d.id))
    return ordered[:max_documents]


def corpus_state(source: str) -> dict[str, str] | None:
    """What tells without reading a corpus that it may have changed; None if it is not there any more.

    Returns:
      Sizes and times of change of files, or versions of the packages whose docstrings are read; nothing for Hugging
      Face data sets.
    """
    if source == "docstrings":
        return docstring_versions()
    if source.startswith("hf:"):
        return {}
    try:
        return corpus_files(source).state() or None
    except FileNotFoundError:
        return None


def parse_hub_source(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split that `hf:NAME[:CONFIG][:SPLIT]` says; colons in brackets belong to the split.

    Raises:
      ValueError: more or fewer parts, or an empty one.
    """
    name, *parts = re.split(r":(?![^\[]*\])", source.removeprefix("hf:"))
    if not name or len(parts) > 2 or not all(parts):
        raise ValueError(
            f"corpus {source!r} is not of the form hf:NAME[:CONFIG][:SPLIT]; for instance hf:ORG/NAME, "
            "hf:ORG/NAME:test, hf:ORG/NAME:CONFIG:train or hf:ORG/NAME:train[:1%]"
        )
    split = parts.pop() if parts else "train"
    return name, parts[0] if parts else None, split


def _hub_rows(source: str, max_documents: int | None) -> Iterator[tuple[str, Any]]:
    name, config, split = parse_hub_source(source)
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"corpus {source!r} needs the optional package `datasets`; run `pip install datasets`, "
            "or give a local file or 'docstrings'"
        ) from error
    # Parts of splits, such as train[:1%], cannot be streamed.
    is_streamed = max_documents is not None and re.fullmatch(r"[\w.-]+", split) is not None
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=is_streamed)
    except ValueError as error:
        if config is None and split in datasets.get_dataset_config_names(name):
            remedy = (
                f"{split!r} is a configuration: write hf:{name}:{split}:SPLIT, for instance with split train"
            )
        else:
            remedy = "write hf:NAME[:CONFIG][:SPLIT] with a configuration and a split that the data set has"
        raise ValueError(f"corpus {source!r} cannot be loaded: {error}; {remedy}") from error
    if is_streamed:
        rows = itertools.islice(rows, STREAMED_ROWS * max_documents)
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))
