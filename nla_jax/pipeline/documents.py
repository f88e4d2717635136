"""The documents of a run: chosen once, stored and recorded beside its data, and compared when the run goes on.

A config names a corpus, or data sets made elsewhere, and not what they hold. Files are edited and packages get other
versions, so the documents are identified by a digest, which every data set that is made of them carries in its sidecar.
"""

import dataclasses
import errno
import functools
import json
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from nla_jax.data.adoption import adopt, data_state, documents_of, splits_digest
from nla_jax.data.corpora.config import CorpusConfig
from nla_jax.data.corpora.corpus import BUILT_IN, check_sources, corpus_documents, corpus_state
from nla_jax.data.corpora.document_store import CorpusRecord, DocumentStore, write_documents
from nla_jax.data.corpora.documents import Document, documents_digest
from nla_jax.data.corpora.duplicates import shared_between
from nla_jax.data.sidecar import Sidecar
from nla_jax.data.splits import split_of
from nla_jax.data.store import StoredDataset
from nla_jax.files import AnyPath, local_folder, remove_folder
from nla_jax.pipeline.digests import corpus_digest
from nla_jax.pipeline.run import Run
from nla_jax.process import warn
from nla_jax.sharding.placement import to_host, wait_for_all

RECORD = "data/corpus.json"
DOCUMENTS = "data/documents"


def prepare_documents(run: Run) -> DocumentStore:
    """The documents that the config chooses, from the run directory; they are chosen and stored if they are not there.

    The first of several processes reads the corpus, and the others wait; chats of the target LM are written by all of
    them together. A store that is complete is opened, and needs neither network nor files of the corpus; one that was
    killed on the way is made again.

    Raises:
      FileNotFoundError, ValueError, ModuleNotFoundError: see `corpus_documents`.
      ValueError: a file of the corpus has changed since the documents were stored, and gives others now.
      OSError: the disk is full.
    """
    record = read_record(run.directory)
    if record is not None and record.choice == corpus_digest(run.config):
        check_corpus(run)
    else:
        wait_for_all("documents asked for")
        if jax.process_index() == 0:
            _store_documents(run)
        elif run.config.corpus.has_self_chat:
            for _ in _chosen(run, Counter(), Counter(), None):
                pass
        wait_for_all("documents stored")
    return DocumentStore(run.directory / DOCUMENTS, read_record(run.directory))


def _store_documents(run: Run) -> None:
    """Choose the documents, write them, and note that they are complete."""
    folder, config = run.directory / DOCUMENTS, run.config.corpus
    (run.directory / RECORD).unlink(missing_ok=True)
    remove_folder(folder)
    state, sources, notices = _state(config), Counter(), Counter()
    try:
        with local_folder(folder) as files:
            # What is ordered and remembered on the way lies where there is room for the documents themselves.
            count, digest = write_documents(files, _chosen(run, sources, notices, files))
    except (OSError, sqlite3.OperationalError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if isinstance(error, sqlite3.OperationalError) and "full" not in str(error):
            raise
        remove_folder(folder)
        raise OSError(
            errno.ENOSPC,
            f"the disk became full while the documents of {config.name} were stored in {folder}; they need about three "
            "times the space of their texts on the way: free space, choose fewer with corpus.max_documents, or give "
            "another run directory with --run-dir",
        ) from error
    choice = corpus_digest(run.config)
    record = CorpusRecord(config.name, count, digest, state, choice, dict(sources), dict(notices))
    _warn_of_shared_texts(run, DocumentStore(folder, record))
    save_record(run, record)


def _warn_of_shared_texts(run: Run, store: DocumentStore) -> None:
    """Warn where the same text is in two splits under different ids."""
    config = run.config
    if config.corpus.duplicates != "same_id":
        return
    texts = ((split_of(one.id, config.corpus.fractions, config.seed), one.text) for one in store)
    with tempfile.TemporaryDirectory() as folder:
        shared = shared_between(texts, folder=Path(folder), duplicates="exact")
    if shared:
        counts = ", ".join(f"{number} of {pair}" for pair, number in shared.items())
        warn(
            f"{store.record.corpus}: texts that differ in nothing but case, punctuation and white space are in two "
            f"splits ({counts}), so that figures may be of texts that were trained on; leave repetitions out with "
            "--corpus.duplicates exact, or near for nearly equal texts as well"
        )


def _chosen(
    run: Run, sources: Counter[str], notices: Counter[str], folder: Path | None
) -> Iterator[Document]:
    """The documents that the config chooses; see `corpus_documents` for the counters and the folder."""
    return corpus_documents(
        run.config.corpus,
        seed=run.config.seed,
        self_documents=functools.partial(_self_documents, run),
        sources=sources,
        notices=notices,
        folder=folder,
    )


def _self_documents(run: Run, source: str) -> Iterator[Document]:
    from nla_jax.pipeline.self_chat import self_documents

    return self_documents(run, source)


def _is_built_in(record: CorpusRecord) -> bool:
    """Whether all documents come with installed packages, so that the state of the corpus is their versions."""
    return {*(record.sources or (record.corpus,))} <= {*BUILT_IN}


def _state(config: CorpusConfig) -> dict[str, str] | None:
    """What tells without reading the sources that they may have changed; None if one is not there any more."""
    states = {source: corpus_state(source) for source in config.mixture}
    if None in states.values():
        return None
    if len(states) == 1:
        (state,) = states.values()
        return state
    return {f"{source}: {name}": value for source, state in states.items() for name, value in state.items()}


def check_sources_of(run: Run) -> None:
    """Refuse sources whose packages are not installed, unless the run has its documents already.

    Raises:
      ModuleNotFoundError: see `check_sources`.
    """
    if not run.config.data.is_given and read_record(run.directory) is None:
        check_sources(run.config.corpus)


def load_rows(run: Run) -> tuple[dict[str, StoredDataset], CorpusRecord]:
    """Open the data sets made elsewhere that the config names.

    Raises:
      FileNotFoundError, ValueError: see `adopt`.
    """
    config = run.config
    state = data_state(config.data.paths)
    splits = adopt(config.data.paths, held_out_share=config.corpus.held_out, seed=config.seed)
    documents = set().union(*map(documents_of, splits.values()))
    names = ", ".join(filter(None, config.data.paths.values()))
    return splits, CorpusRecord(names, len(documents), splits_digest(splits), state or {})


def check_processes(record: CorpusRecord) -> None:
    """Compare the documents of all processes, each of which has to call this.

    Raises:
      ValueError: they differ, as where machines have other files or other versions of packages.
    """
    digests = to_host(np.frombuffer(bytes.fromhex(record.digest), np.uint8)[None])
    if len(np.unique(digests, axis=0)) > 1:
        raise ValueError(
            f"the processes of this run find other documents in {record.corpus} (here {record.documents} with the "
            f"digest {record.digest}); give all machines the same files and the same versions of packages"
        )


def check_shards(run: Run, folder: AnyPath, record: CorpusRecord) -> None:
    """Refuse to add to activations of other documents; shards that were written before there were digests pass.

    Args:
      run: the run that goes on.
      folder: of the shards that are there; it need not exist.
      record: of the documents that would be added.

    Raises:
      ValueError: a shard's documents have another digest.
    """
    before, built_in = read_record(run.directory), _is_built_in(record)
    for path in sorted(folder.glob("*.nla_meta.yaml")) if folder.exists() else ():
        found = Sidecar.load(path).extraction
        if found.corpus_digest not in (None, record.digest):
            changes = _changes(before.state, record.state, versions=built_in) if before else ""
            raise ValueError(
                f"{folder} holds activations of other documents: their digest is {found.corpus_digest}, and the "
                f"corpus {record.corpus} now gives {record.documents} documents with the digest {record.digest}"
                f"{changes}. Bring the old corpus back, use another run directory, or delete {folder} to extract again"
            )


def save_record(run: Run, record: CorpusRecord) -> None:
    """Write what tells the documents of the run from others."""
    (run.directory / RECORD).parent.mkdir(parents=True, exist_ok=True)
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
    is_given = run.config.data.is_given
    state = data_state(run.config.data.paths) if is_given else _state(run.config.corpus)
    if state is None or state == record.state:
        return
    built_in = not is_given and _is_built_in(record)
    changes = _changes(record.state, state, versions=built_in)
    if built_in:
        warn(
            f"the built-in corpus has changed since {run.directory} was made{changes}; the run goes on with its "
            f"own {record.documents} documents (digest {record.digest})"
        )
        return
    try:
        again = _chosen(run, Counter(), Counter(), None)
        found = load_rows(run)[1].digest if is_given else documents_digest(again)
    except (ValueError, FileNotFoundError) as error:
        found = f"none, since {error}"
    if found != record.digest:
        raise ValueError(
            f"{record.corpus} has changed since {run.directory} was made{changes}. Bring the old files back, or use "
            "another run directory for the new ones; to go on with the data that the run has, rename the new ones. "
            f"The digest of the documents was {record.digest} and is now {found}"
        )
    save_record(run, dataclasses.replace(record, state=state))


def _changes(before: Mapping[str, str], now: Mapping[str, str], *, versions: bool) -> str:
    """What differs between two states, in parentheses; empty where nothing does.

    Args:
      before: an earlier state.
      now: a later one.
      versions: whether the values are versions, which are told, and not fingerprints of files.
    """
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))

    def change(name: str) -> str:
        if name not in now or name not in before:
            return f"{name} is {'new' if name in now else 'gone'}"
        return f"{name} {before[name]} is now {now[name]}" if versions else f"{name} has changed"

    shown = [change(name) for name in names[:5]] + [f"{len(names) - 5} more"] * (len(names) > 5)
    return f" ({', '.join(shown)})" if shown else ""
