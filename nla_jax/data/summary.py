"""What data sets hold, in numbers: counted in one pass, with a few thousand rows in memory at a time.

Beside those, some 40 bytes are kept of each row: its norm, position and lengths, and hashes of its document and texts;
and sums of the activations by group, in bounded memory (`variance.GROUP_BYTES`).
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt64

from nla_jax.data.corpora.filters import language_identifier
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.shards import shards_of
from nla_jax.data.sidecar import Sidecar
from nla_jax.data.splits import SPLITS, hash_fraction, text_start
from nla_jax.data.store import open_dataset
from nla_jax.data.variance import VarianceCounts, VarianceShare, hashes
from nla_jax.files import AnyPath, Place, as_path

ROWS_SHOWN = 20
"""Rows of all data sets together that are shown whole."""
LANGUAGE_DOCUMENTS = 1000
"""Documents of a data set whose language is told."""
COUNTED = ("genre", "role", "turn", "place")
"""The columns whose values are counted."""


@dataclasses.dataclass(frozen=True)
class RowSample:
    """A row to read."""

    dataset: str
    """The name of its data set."""
    doc_id: str
    n_raw_tokens: int
    norm: float
    context: str | None
    text: str | None
    columns: dict[str, Any]
    """The values of the columns that are counted."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What one data set holds."""

    name: str
    sidecar: Sidecar
    norms: Float32[np.ndarray, "N"]
    positions: Int64[np.ndarray, "N"]
    """Tokens of the document up to and including the activation's."""
    context_characters: Int64[np.ndarray, "N"]
    text_words: Int64[np.ndarray, "M"]
    """Of the rows that have a text."""
    documents: UInt64[np.ndarray, "D"]
    """Hashes of the documents' ids, ascending."""
    starts: UInt64[np.ndarray, "S"]
    """Hashes of the contexts' beginnings (`splits.text_start`), ascending."""
    texts: UInt64[np.ndarray, "T"]
    """Hashes of the different texts."""
    commonest: tuple[tuple[str, int], ...]
    """Texts that several rows have, with the number of these rows, the commonest first."""
    counts: dict[str, Counter[str]]
    """Column -> value -> rows, for the columns of `COUNTED` that the data set has."""
    languages: Counter[str] | None
    """Language -> documents, of at most `LANGUAGE_DOCUMENTS`; None where nothing can tell languages."""
    variance: tuple[VarianceShare, ...]
    """The share of the activations' variance between the groups of each grouping that the data tell."""
    samples: tuple[RowSample, ...]

    @property
    def rows(self) -> int:
        """Their number."""
        return len(self.norms)

    @property
    def with_text(self) -> int:
        """The number of rows that have a text."""
        return len(self.text_words)


def datasets_at(path: Place) -> dict[str, AnyPath]:
    """The data sets that a path leads to, by name.

    Args:
      path: a shard, a folder of shards, a folder of such folders, or a run directory. Of a run that is divided into
        splits, the undivided rows of the same layer are left out.

    Raises:
      FileNotFoundError: there are none.
    """
    path = as_path(path)
    root = path / "data" if (path / "data").is_dir() else path
    if not root.is_dir() or any(root.glob("*.parquet")):
        shards_of(root)
        return {root.stem if root.suffix == ".parquet" else root.name: root}
    found = {
        folder.name: folder
        for folder in sorted(root.iterdir(), key=lambda folder: folder.name)
        if folder.is_dir() and any(folder.glob("*.parquet.nla_meta.yaml"))
    }
    divided = {split: found[split] for split in SPLITS if split in found}
    others = {name: folder for name, folder in found.items() if name not in divided}
    if divided:
        others = {
            name: folder for name, folder in others.items() if name not in ("base", "verbalized", "distilled")
        }
    if not (divided or others):
        raise FileNotFoundError(
            f"{path} holds no data set; give a .parquet file, a folder of them, or the directory of a run whose stage "
            "extract has begun"
        )
    return {**divided, **others}


def summarize(name: str, path: Place, *, samples: int = ROWS_SHOWN) -> Summary:
    """Count what a data set holds.

    Args:
      name: what the data set is called.
      path: as `open_dataset` takes it.
      samples: how many rows are shown whole. A key of document and position chooses them, so that they stay the same.

    Raises:
      FileNotFoundError, ValueError: as `open_dataset` and `StoredDataset.parts`.
    """
    counting = _Counting(name, samples)
    dataset = open_dataset(path)
    for part in dataset.parts():
        counting.add(part)
    return counting.summary(dataset.sidecar)


class _Counting:
    """A summary in the making."""

    def __init__(self, name: str, samples: int):
        self.name, self.samples = name, samples
        self.columns: dict[str, list[np.ndarray]] = {
            key: [] for key in ("norms", "positions", "characters", "words", "documents", "starts", "texts")
        }
        self.counts: dict[str, Counter[str]] = {}
        self.variance = VarianceCounts()
        self.repeated: Counter[str] = Counter()
        self.seen_texts: set[int] = set()
        self.language_of = _language_identifier()
        self.told: dict[str, str] = {}
        self.chosen: list[tuple[float, RowSample]] = []

    def add(self, part: ActivationDataset) -> None:
        """Count some rows."""
        norms_N = np.linalg.norm(part.activations, axis=1).astype(np.float32)
        texts = [text for text in part.explanations or () if text]
        contexts = part.contexts or ()
        new = {
            "norms": norms_N,
            "positions": part.n_raw_tokens,
            "characters": np.array([len(text) for text in contexts], np.int64),
            "words": np.array([len(text.split()) for text in texts], np.int64),
            "documents": np.unique(hashes(part.doc_ids)),
            "starts": np.unique(hashes([text_start(text) for text in contexts if text.strip()])),
            "texts": hashes(texts),
        }
        for key, values in new.items():
            self.columns[key].append(values)
        for text, digest in zip(texts, new["texts"].tolist(), strict=True):
            if digest in self.seen_texts:
                self.repeated[text] += 1
            self.seen_texts.add(digest)
        for column in COUNTED:
            if column in part.extra:
                values = ("none" if value is None else str(value) for value in part.extra[column])
                self.counts.setdefault(column, Counter()).update(values)
        self.variance.add(part)
        self._tell_languages(part)
        self._choose(part, norms_N)

    def _tell_languages(self, part: ActivationDataset) -> None:
        if self.language_of is None or part.contexts is None:
            return
        for doc_id, context in zip(part.doc_ids, part.contexts, strict=True):
            if len(self.told) >= LANGUAGE_DOCUMENTS:
                return
            if doc_id not in self.told:
                self.told[doc_id] = self.language_of(context)

    def _choose(self, part: ActivationDataset, norms_N: Float32[np.ndarray, "N"]) -> None:
        """Keep the rows whose keys are the smallest of all."""
        keys = [
            hash_fraction(f"{doc_id} {position}", seed=0, purpose="inspect")
            for doc_id, position in zip(part.doc_ids, part.n_raw_tokens, strict=True)
        ]
        for row in np.argsort(keys, kind="stable")[: self.samples].tolist():
            columns = {name: part.extra[name][row] for name in COUNTED if name in part.extra}
            sample = RowSample(
                self.name,
                part.doc_ids[row],
                int(part.n_raw_tokens[row]),
                float(norms_N[row]),
                None if part.contexts is None else part.contexts[row],
                None if part.explanations is None else part.explanations[row],
                columns,
            )
            self.chosen.append((keys[row], sample))
        self.chosen = sorted(self.chosen, key=lambda pair: pair[0])[: self.samples]

    def summary(self, sidecar: Sidecar) -> Summary:
        """What was counted."""
        dtypes = {"norms": np.float32, "documents": np.uint64, "starts": np.uint64, "texts": np.uint64}
        joined = {
            key: np.concatenate([np.zeros(0, dtypes.get(key, np.int64)), *values])
            for key, values in self.columns.items()
        }
        return Summary(
            name=self.name,
            sidecar=sidecar,
            norms=joined["norms"],
            positions=joined["positions"],
            context_characters=joined["characters"],
            text_words=joined["words"],
            documents=np.unique(joined["documents"]),
            starts=np.unique(joined["starts"]),
            texts=np.unique(joined["texts"]),
            commonest=tuple((text, count + 1) for text, count in self.repeated.most_common(3)),
            counts=self.counts,
            languages=None if self.language_of is None else Counter(self.told.values()),
            variance=self.variance.shares(),
            samples=tuple(sample for _, sample in self.chosen),
        )


def _language_identifier() -> Callable[[str], str] | None:
    """What tells the language of a text, as a code of ISO 639-1; None where the package for it is missing."""
    try:
        return language_identifier()
    except ModuleNotFoundError:
        return None
