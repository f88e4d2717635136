"""The documents of a run: recorded beside its data, and compared when the run goes on.

A config names a corpus, or data sets made elsewhere, and not what they hold. Files are edited and packages get other
versions, so the documents are identified by a digest, which every data set that is made of them carries in its sidecar.
"""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np

from nla_jax.data.adoption import adopt, data_state, splits_digest
from nla_jax.data.corpus import corpus_state, load_corpus
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.documents import Document, documents_digest
from nla_jax.data.sidecar import Sidecar
from nla_jax.files import AnyPath
from nla_jax.pipeline.run import Run
from nla_jax.process import warn
from nla_jax.sharding.placement import to_host

RECORD = "data/corpus.json"


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


def load_documents(run: Run) -> tuple[list[Document], CorpusRecord]:
    """Load the documents that the config chooses.

    Raises:
      FileNotFoundError, ValueError, ModuleNotFoundError: see `load_corpus`.
    """
    state = corpus_state(run.config.corpus.source)
    corpus = run.config.corpus
    documents = load_corpus(
        corpus.source, field=corpus.field, max_documents=corpus.max_documents, seed=run.config.seed
    )
    return documents, CorpusRecord(corpus.source, len(documents), documents_digest(documents), state or {})


def load_rows(run: Run) -> tuple[dict[str, ActivationDataset], CorpusRecord]:
    """Load the data sets made elsewhere that the config names.

    Raises:
      FileNotFoundError, ValueError: see `adopt`.
    """
    config = run.config
    state = data_state(config.data.paths)
    splits = adopt(config.data.paths, held_out_share=config.corpus.held_out, seed=config.seed)
    documents = {doc_id for part in splits.values() for doc_id in part.doc_ids}
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
    before, built_in = read_record(run.directory), record.corpus == "docstrings"
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
    state = data_state(run.config.data.paths) if is_given else corpus_state(record.corpus)
    if state is None or state == record.state:
        return
    built_in = not is_given and record.corpus == "docstrings"
    changes = _changes(record.state, state, versions=built_in)
    if built_in:
        warn(
            f"the built-in corpus has changed since {run.directory} was made{changes}; the run goes on with its "
            f"own {record.documents} documents (digest {record.digest})"
        )
        return
    try:
        found = (load_rows if is_given else load_documents)(run)[1].digest
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
