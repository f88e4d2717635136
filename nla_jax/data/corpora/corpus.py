"""The documents of a corpus as a stream: read from files, Hugging Face data sets or installed packages, filtered,
mixed, and without repetitions.

Every step holds a bounded part of the corpus in memory; what has to be ordered or remembered lies on disk.
"""

import contextlib
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from nla_jax.data.corpora.config import CorpusConfig
from nla_jax.data.corpora.docstrings import docstring_documents, docstring_versions
from nla_jax.data.corpora.documents import Document, documents_of_rows
from nla_jax.data.corpora.duplicates import SeenHashes, hash64, text_hashes
from nla_jax.data.corpora.files import corpus_files, file_documents
from nla_jax.data.corpora.filters import filter_documents
from nla_jax.data.corpora.hub import hub_rows, is_streamed, parse_hub_source
from nla_jax.data.corpora.keyed_order import in_keyed_order
from nla_jax.data.corpora.packages import check_packages, package_documents, package_versions
from nla_jax.data.corpora.user_requests import request_documents, request_versions
from nla_jax.process import warn

BUILT_IN: Mapping[str, tuple[Callable[[], Iterator[Document]], Callable[[], dict[str, str]]]] = {
    "docstrings": (docstring_documents, docstring_versions),
    "packages": (package_documents, package_versions),
    "requests": (request_documents, request_versions),
}
"""Sources that need neither files nor a network -> what reads them, and what tells the versions that they depend on."""
SelfDocuments = Callable[[str], Iterator[Document]]
"""Gives the documents of a source `self:PROMPTS`, which the target LM writes itself."""


def load_corpus(
    source: str, *, field: str = "text", max_documents: int | None = None, seed: int = 0
) -> list[Document]:
    """Load the documents of a source into memory; see `corpus_documents`, which this gathers in a list."""
    return list(corpus_documents(CorpusConfig(source, field=field, max_documents=max_documents), seed=seed))


def corpus_documents(
    config: CorpusConfig,
    *,
    seed: int,
    self_documents: SelfDocuments | None = None,
    sources: Counter[str] | None = None,
    notices: Counter[str] | None = None,
    folder: Path | None = None,
) -> Iterator[Document]:
    """Yield the documents that a config chooses, in an order that the seed decides.

    Documents of files and docstrings come in an order keyed by (seed, document id), which does not depend on the order
    of files or rows; those of a stream (a whole split of a Hugging Face data set, or chats of the target LM) as the
    stream brings them. Sources are mixed so that after any number of documents each has had its share. A smaller
    `max_documents` gives a prefix of a larger one. When all are yielded, one warning counts what was left out (rows
    without text, filtered documents, duplicates, files that are not read) or changed (lone surrogates, in whose place
    comes U+FFFD).

    Args:
      config: says the sources, one of each being
        - `docstrings`, `packages` and `requests` (built in, offline; the last two need the extra `texts`),
        - a file or a folder, also a remote one such as gs://BUCKET/FOLDER: `.txt` (one document), `.jsonl` or
          `.ndjson` (a row a line), `.json` (a list of rows) or `.parquet`, all but the last also as `.gz` or `.zst`.
          Rows hold a text or a chat and perhaps an `id` and a `genre`; text files are named by their path in the
          folder, rows without `id` by a hash of their text. Hidden files are not read.
        - `hf:NAME[:CONFIG][:SPLIT]`: split `train` by default, which is streamed; a part of it as `train[:1%]`, which
          is downloaded.
        - `self:PROMPTS`: see `self_documents`.
      seed: seed of the order, and so of the choice.
      self_documents: gives the documents of a source `self:PROMPTS`; without it such a source is an error.
      sources: counts the documents of each source, for the caller.
      notices: counts by reason what was left out or changed, for the caller.
      folder: an existing folder on this machine for what is ordered and remembered; None for a temporary one. It needs
        as much space as the texts.

    Raises:
      FileNotFoundError: a source is neither a known name nor an existing path.
      ValueError: unreadable or empty source, a row without the field, two different texts under one id, or a role or
        language that is not known.
      ModuleNotFoundError: a package is not installed that `hf:`, a built-in corpus, a language filter or near
        duplicates need.
      OSError: the disk is full.
    """
    check_sources(config)
    notices = Counter() if notices is None else notices
    sources = Counter() if sources is None else sources
    with tempfile.TemporaryDirectory(dir=folder, prefix=".corpus-", ignore_cleanup_errors=True) as temporary:
        mixture = _Mixture(config, seed, self_documents, sources, notices, Path(temporary))
        with contextlib.closing(_without_repetitions(mixture, config, notices, Path(temporary))) as stream:
            for source, document in stream:
                sources[source] += 1
                yield document
                if sources.total() == config.max_documents:
                    break
    found = "; ".join(f"{what}: {number}" for what, number in notices.items())
    if not sources:
        raise ValueError(
            f"{config.name}: no documents with text; expected at least one{found and f' ({found})'}"
        )
    if found:
        warn(f"{config.name}: {found}")


def check_sources(config: CorpusConfig) -> None:
    """Refuse a config whose sources need packages that are not installed, before anything is read.

    Raises:
      ModuleNotFoundError: naming the packages.
    """
    for source in config.mixture:
        if source in ("packages", "requests"):
            check_packages(source)


def corpus_state(source: str) -> dict[str, str] | None:
    """What tells without reading a source that it may have changed; None if it is not there any more.

    Returns:
      Sizes and times of change of files, or versions of the packages that a built-in corpus reads; nothing for Hugging
      Face data sets and for chats of the target LM.
    """
    if source in BUILT_IN:
        return BUILT_IN[source][1]()
    if source.startswith(("hf:", "self:")):
        return {}
    try:
        return corpus_files(source).state() or None
    except FileNotFoundError:
        return None


def _source_documents(
    source: str,
    config: CorpusConfig,
    seed: int,
    self_documents: SelfDocuments | None,
    notices: Counter[str],
    folder: Path,
) -> Iterator[Document]:
    """The documents of one source, filtered and in the order that the seed decides."""
    streamed = source.startswith("self:")
    if source in BUILT_IN:
        documents = BUILT_IN[source][0]()
    elif source.startswith("hf:"):
        streamed = is_streamed(source)
        rows = hub_rows(source, seed=seed, shuffle_buffer=config.shuffle_buffer)
        documents = documents_of_rows(
            rows, field=config.field, genre=parse_hub_source(source)[0], notices=notices
        )
    elif streamed:
        if self_documents is None:
            raise ValueError(
                f"corpus {source!r}: only a run can let its target LM write chats; give another source"
            )
        documents = self_documents(source)
    else:
        documents = file_documents(source, field=config.field, notices=notices)
    documents = filter_documents(
        documents,
        min_characters=config.min_characters,
        max_characters=config.max_characters,
        languages=config.languages,
        notices=notices,
    )
    if streamed:
        return documents
    # Where texts are compared as well, it is not known beforehand how many documents lead to the number wanted.
    limit = config.max_documents if config.duplicates == "same_id" else None
    return in_keyed_order(documents, seed=seed, folder=folder, limit=limit)


class _Mixture:
    """The documents of several sources, each drawn when its share of those that were accepted is furthest behind."""

    def __init__(
        self,
        config: CorpusConfig,
        seed: int,
        self_documents: SelfDocuments | None,
        accepted: Counter[str],
        notices: Counter[str],
        folder: Path,
    ):
        """Open the sources.

        Args:
          config, seed, self_documents, notices: see `corpus_documents`.
          accepted: how many documents of each source were accepted; the consumer counts them.
          folder: an existing folder for what is ordered.
        """
        self._shares, self._accepted, self._notices = config.mixture, accepted, notices
        self._streams: Mapping[str, Iterator[Document]] = {}
        for number, source in enumerate(config.mixture):
            (own_folder := folder / str(number)).mkdir()
            self._streams[source] = _source_documents(
                source, config, seed, self_documents, notices, own_folder
            )

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        """Yield sources and documents until a source ends."""
        several = len(self._shares) > 1
        while True:
            total = self._accepted.total() + 1
            source = max(self._shares, key=lambda name: self._shares[name] * total - self._accepted[name])
            document = next(self._streams[source], None)
            if document is None:
                if several:
                    self._notices[f"documents taken before {source} ended, and with it the mixture"] = (
                        total - 1
                    )
                return
            yield source, dataclasses.replace(document, id=f"{source}/{document.id}") if several else document

    def close(self) -> None:
        """Close what the sources have opened."""
        for stream in self._streams.values():
            stream.close()


def _without_repetitions(
    mixture: _Mixture, config: CorpusConfig, notices: Counter[str], folder: Path
) -> Iterator[tuple[str, Document]]:
    """The sources and documents of a mixture but those that repeat an earlier one by `config.duplicates`."""
    with SeenHashes(folder) as seen, contextlib.closing(mixture):
        for source, document in mixture:
            # The value of an id is a hash of what has it.
            key, content = hash64("id", document.id), hash64("content", document.text)
            if same_id := seen.find([key]):
                if same_id != [content]:
                    raise ValueError(
                        f"{source}: two different texts have the id {document.id!r}; make the ids unique, or leave "
                        "them out: rows without one are named by a hash of their text"
                    )
                continue
            hashes = text_hashes(document.text, config.duplicates)
            seen.add([key], content)
            if hashes and seen.find(hashes):
                notices[f"{config.duplicates} duplicates of other documents, left out"] += 1
                continue
            seen.add(hashes)
            yield source, document
