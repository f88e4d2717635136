"""The documents of a run: recorded beside its data, and compared when the run goes on.

A config names a corpus and not what it holds. Files are edited and packages get other versions, so the documents are
identified by a digest, which every data set that is made of them carries in its sidecar.
"""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from typing import Any

from nla_jax.data.corpus import corpus_state, load_corpus
from nla_jax.data.documents import Document, documents_digest
from nla_jax.data.sidecar import Sidecar
from nla_jax.files import AnyPath
from nla_jax.pipeline.run import Run

RECORD = "data/corpus.json"


@dataclasses.dataclass(frozen=True)
class CorpusRecord:
    """What tells the documents of a run from others."""

    corpus: str
    """The corpus as the config names it."""
    documents: int
    """How many were chosen."""
    digest: str
    """Of the chosen documents, see `documents_digest`."""
    state: dict[str, Any]
    """Of the corpus, see `corpus_state`."""


def load_documents(run: Run) -> tuple[list[Document], CorpusRecord]:
    """Load the documents that the config chooses.

    Raises:
      FileNotFoundError, ValueError, ModuleNotFoundError: see `load_corpus`.
    """
    state = corpus_state(run.config.corpus.source)
    documents = _chosen(run)
    digest = documents_digest(documents)
    return documents, CorpusRecord(run.config.corpus.source, len(documents), digest, state or {})


def check_shards(run: Run, folder: AnyPath, record: CorpusRecord) -> None:
    """Refuse to add to activations of other documents; shards that were written before there were digests pass.

    Args:
      run: the run that goes on.
      folder: of the shards that are there; it need not exist.
      record: of the documents that would be added.

    Raises:
      ValueError: a shard's documents have another digest.
    """
    before = read_record(run.directory)
    for path in sorted(folder.glob("*.nla_meta.yaml")) if folder.exists() else ():
        found = Sidecar.load(path).extraction
        if found.corpus_digest not in (None, record.digest):
            changes = _changes(before.state, record.state) if before else ""
            raise ValueError(
                f"{folder} holds activations of other documents: their digest is {found.corpus_digest}, and the "
                f"corpus {record.corpus} now gives {record.documents} documents with the digest {record.digest}"
                f"{changes}. Bring the old corpus back, use another run directory, or delete {folder} to extract again"
            )


def save_record(run: Run, record: CorpusRecord) -> None:
    """Write what tells the documents of the run from others."""
    run.write_json(RECORD, dataclasses.asdict(record))


def read_record(directory: AnyPath) -> CorpusRecord | None:
    """What tells the documents of the run in a directory from others; None for runs that did not record it."""
    path = directory / RECORD
    return CorpusRecord(**json.loads(path.read_bytes())) if path.exists() else None


def check_corpus(run: Run) -> None:
    """Refuse to go on with the data of a corpus whose files have changed since.

    Documents are read only where sizes or times of the files differ. A corpus that is not there any more is no error,
    and other versions of the packages that the built-in corpus reads are a warning.

    Raises:
      ValueError: the corpus gives other documents now.
    """
    record = read_record(run.directory)
    if record is None:
        return
    state = corpus_state(record.corpus)
    if state is None or state == record.state:
        return
    changes = _changes(record.state, state)
    if record.corpus == "docstrings":
        warnings.warn(
            f"the built-in corpus has changed since {run.directory} was made{changes}; the run goes on with its "
            f"own {record.documents} documents (digest {record.digest})",
            stacklevel=2,
        )
        return
    try:
        found = documents_digest(_chosen(run))
    except ValueError as error:
        found = f"none, since {error}"
    if found != record.digest:
        raise ValueError(
            f"the corpus {record.corpus} has changed since {run.directory} was made{changes}. Bring the old files "
            "back, or use another run directory for the new ones; to go on with the data that the run has, rename the "
            f"corpus. The digest of its documents was {record.digest} and is now {found}"
        )
    save_record(run, dataclasses.replace(record, state=state))


def _chosen(run: Run) -> list[Document]:
    corpus = run.config.corpus
    return load_corpus(
        corpus.source, field=corpus.field, max_documents=corpus.max_documents, seed=run.config.seed
    )


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two states of a corpus, in parentheses; empty where nothing does."""
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))

    def change(name: str) -> str:
        if name not in now or name not in before:
            return f"{name} is {'new' if name in now else 'gone'}"
        values: Sequence[Any] = (before[name], now[name])
        return (
            f"{name} {values[0]} is now {values[1]}" if isinstance(values[0], str) else f"{name} has changed"
        )

    shown = [change(name) for name in names[:5]] + [f"{len(names) - 5} more"] * (len(names) > 5)
    return f" ({', '.join(shown)})" if shown else ""
