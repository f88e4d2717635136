"""Vectors and texts that were made elsewhere, as data sets with sidecars, divided by document.

Rows are read and written a few thousand at a time. Letters: N rows, D width of the vectors.
"""

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from nla_jax.data.dataset import write_shard
from nla_jax.data.import_files import Part, read_parts, source_files
from nla_jax.data.manifest import FILE_NAME, Manifest
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.data.splits import FEWEST_DOCUMENTS, split_of
from nla_jax.data.stage_texts import holds_a_tag
from nla_jax.files import AnyPath, Place, as_path, fingerprint
from nla_jax.process import warn
from nla_jax.shipped import git_commit

SHARD_ROWS = 16_384
"""Rows of a shard that is written."""
_TAKEN = {"activation_vector", "activation_layer", "prompt", "response", "api_explanation"}
"""Names of further columns that would be taken for something else, and are left out."""


@dataclasses.dataclass(frozen=True)
class ImportColumns:
    """The columns, arrays or fields that rows are made of; None where the source has no such thing."""

    vectors: str = "activation_vector"
    """The activations, raw and as wide as the model's residual stream. A .npy file has no names."""
    text: str | None = None
    """The explanations; a row whose text is null or blank has none."""
    doc: str | None = None
    """The document of each row, a text or a number. Without it every row counts as a document of its own."""
    context: str | None = None
    """The text up to and including the activation's token."""
    position: str | None = None
    """The number of tokens in that text. Without it the rows of a document are numbered, from 1."""

    def named(self) -> dict[str, str]:
        """The names that are given beside that of the vectors, by their meaning."""
        fields = dataclasses.asdict(self)
        return {
            meaning: name for meaning, name in fields.items() if name is not None and meaning != "vectors"
        }


@dataclasses.dataclass
class ImportReport:
    """What an import wrote."""

    rows: Counter[str] = dataclasses.field(default_factory=Counter)
    """Data set -> rows."""
    without_text: int = 0
    """Rows without a text; they are in no data set but `rl`, or in the one that is not divided."""
    paths: dict[str, AnyPath] = dataclasses.field(default_factory=dict)
    """Data set -> its folder."""


def import_dataset(
    source: Place,
    out: Place,
    columns: ImportColumns,
    *,
    base_model: str,
    layer: int,
    width: int | None,
    fractions: Mapping[str, float] | None,
    texts: Place | None = None,
    seed: int = 0,
) -> ImportReport:
    """Make data sets of vectors and texts.

    Args:
      source: a .npz or .npy file, a .parquet file or a folder of them.
      out: folder that is written: a folder of shards for each split, or the shards themselves. What an import that was
        killed left there is written anew.
      columns: where the rows' parts stand.
      base_model: the model that the vectors were read from, as a config names it.
      layer: the block after which they were read, counted from 0.
      width: of that model's residual stream; None where it is not known.
      fractions: split -> share of the documents; None writes one data set that is not divided.
      texts: a .jsonl, .csv or .txt file with a line for each row of a .npz or .npy file, in which the named columns are
        looked for first; a .txt file holds texts alone.
      seed: of the division.

    Raises:
      FileNotFoundError: there is no source.
      ValueError: columns that are missing or of unequal length; vectors that are no floating-point numbers, not finite,
        or of another width; two rows of one document with one position; a text that holds a tag; too few documents for
        the splits; or a folder that holds a finished data set. What was written before has no manifest.
    """
    out = as_path(out)
    if fractions is not None and columns.text is None:
        raise ValueError(
            f"{source}: rows are divided into splits for training, which needs texts; name their column, or write one "
            "data set that is not divided"
        )
    if out.is_dir() and (finished := sorted(out.rglob(FILE_NAME))):
        raise ValueError(f"{finished[0].parent} holds a data set already; give another folder, or delete it")
    writing = _Writing(out, source, columns, base_model, layer, fractions, seed)
    for part in read_parts(source, columns.vectors, columns.named(), texts):
        if width is not None and part.vectors.shape[1] != width:
            raise ValueError(
                f"{source}: the vectors are {part.vectors.shape[1]} wide, and the residual stream of {base_model} is "
                f"{width}. AV and AR are copies of the target, so that all three have the width of the vectors; name "
                "the model that the vectors were read from"
            )
        writing.add(part)
    return writing.finish()


class _Writing:
    """Data sets in the making."""

    def __init__(
        self,
        out: AnyPath,
        source: Place,
        columns: ImportColumns,
        base_model: str,
        layer: int,
        fractions: Mapping[str, float] | None,
        seed: int,
    ):
        self.out, self.source, self.columns = out, str(source), columns
        self.base_model, self.layer, self.fractions, self.seed = base_model, layer, fractions, seed
        prints = {str(file): fingerprint(file) for file in source_files(source)}
        identity = [dataclasses.asdict(columns), base_model, layer, prints]
        self.digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()
        self.waiting: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.shards: Counter[str] = Counter()
        self.documents: dict[str, set[str]] = defaultdict(set)
        self.numbered: Counter[str] = Counter()
        self.seen: set[int] = set()
        self.report = ImportReport()

    def add(self, part: Part) -> None:
        """Put rows to their data sets, and write the shards that are full."""
        rows = self._rows(part)
        for name, chosen in self._divided(rows).items():
            self.waiting[name].append(
                {key: [column[row] for row in chosen] for key, column in rows.items() if key != "vectors"}
                | {"vectors": part.vectors[chosen]}
            )
            if sum(len(piece["doc_id"]) for piece in self.waiting[name]) >= SHARD_ROWS:
                self._write(name)

    def _rows(self, part: Part) -> dict[str, Any]:
        """The columns of rows under the names that data sets have for them."""
        named, count = self.columns.named(), len(part.vectors)
        first = part.first_row
        if "doc" in named:
            docs = [str(doc) for doc in part.column(named["doc"])]
            if blank := [row for row, doc in enumerate(docs) if doc in ("", "None")]:
                raise ValueError(f"{self.source}: row {first + blank[0]} names no document ({named['doc']})")
        else:
            docs = [f"row-{first + row:08d}" for row in range(count)]
        rows: dict[str, Any] = {"vectors": part.vectors, "doc_id": docs, "n_raw_tokens": []}
        if "position" in named:
            rows["n_raw_tokens"] = _whole(part.column(named["position"]), named["position"], self.source)
        else:
            for doc in docs:
                self.numbered[doc] += 1
                rows["n_raw_tokens"].append(self.numbered[doc])
        self._check_unique(rows, first)
        if "context" in named:
            contexts = part.column(named["context"])
            rows["detokenized_text_truncated"] = ["" if text is None else str(text) for text in contexts]
        if "text" in named:
            rows["api_explanation"] = self._texts(part.column(named["text"]), first)
        further = {*part.columns} - {*named.values()} - {*rows} - _TAKEN
        return rows | {name: part.columns[name] for name in sorted(further)}

    def _check_unique(self, rows: Mapping[str, Any], first: int) -> None:
        for row, (doc, position) in enumerate(zip(rows["doc_id"], rows["n_raw_tokens"], strict=True)):
            key = hash((doc, position))
            if key in self.seen:
                raise ValueError(
                    f"{self.source}: row {first + row} is another one of document {doc!r} at position {position}; "
                    "leave repeated rows out, name documents that differ differently, or name the column of positions"
                )
            self.seen.add(key)

    def _texts(self, column: Sequence[Any], first: int) -> list[str | None]:
        texts: list[str | None] = []
        for row, text in enumerate(column):
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"{self.source}: the text of row {first + row} is {text!r} of type {type(text).__name__}; expected "
                    "a string, or null for a row without text"
                )
            text = (text or "").strip()
            if holds_a_tag(text):
                raise ValueError(
                    f"{self.source}: the text of row {first + row} holds an explanation tag: {text[:80]!r}; give what "
                    "stands between the tags alone"
                )
            texts.append(text or None)
        return texts

    def _divided(self, rows: Mapping[str, Any]) -> dict[str, list[int]]:
        """Data set -> the rows that go there."""
        texts = rows.get("api_explanation", [None] * len(rows["doc_id"]))
        self.report.without_text += texts.count(None)
        if self.fractions is None:
            if "text" in self.columns.named() and None in texts:
                raise ValueError(
                    f"{self.source}: some rows have no text, which a data set of texts cannot hold; leave these rows "
                    "out, or have the rows divided: those without a text then go to rl alone"
                )
            return {"": list(range(len(texts)))}
        chosen: dict[str, list[int]] = defaultdict(list)
        for row, (doc, text) in enumerate(zip(rows["doc_id"], texts, strict=True)):
            split = split_of(doc, self.fractions, self.seed)
            if text is not None or split == "rl":
                chosen[split].append(row)
                self.documents[split].add(doc)
        return chosen

    def _write(self, name: str) -> None:
        pieces = self.waiting.pop(name)
        vectors_ND: Float32[np.ndarray, "N D"] = np.concatenate([piece["vectors"] for piece in pieces])
        keys = [key for key in pieces[0] if key != "vectors"]
        table = {key: [value for piece in pieces for value in piece[key]] for key in keys}
        count = len(vectors_ND)
        if name == "rl":
            table.pop("api_explanation")  # Some of these rows have none.
        extraction = Extraction(
            base_model=self.base_model,
            d_model=vectors_ND.shape[1],
            layer_index=self.layer,
            corpus=self.source,
            corpus_slice=CorpusSlice(0, 0),
            positions_per_doc=0,
        )
        sidecar = Sidecar(self.digest, "base", count, extraction, git_commit=git_commit())
        folder = self.out / name if name else self.out
        folder.mkdir(parents=True, exist_ok=True)
        layers = [self.layer] * count
        written = {"activation_vector": vectors_ND, "activation_layer": layers, **table}
        write_shard(folder / f"{name or 'rows'}-{self.shards[name]:05d}.parquet", written, sidecar)
        self.shards[name] += 1
        self.report.rows[name] += count
        self.report.paths[name] = folder

    def finish(self) -> ImportReport:
        """Write what is left, and the manifests.

        Raises:
          ValueError: there are no rows, or a split has too few documents.
        """
        if not (self.waiting or self.shards):
            raise ValueError(f"{self.source} holds no rows that can be used; expected at least one vector")
        if self.fractions is not None:
            counts = {split: len(self.documents[split]) for split in self.fractions}
            if any(counts[split] < fewest for split, fewest in FEWEST_DOCUMENTS.items()):
                raise ValueError(
                    f"{self.source} has too few documents: the splits get {counts}, and every split needs 2, held_out "
                    "4; give more documents, divide them with another --seed, or write one data set with --whole"
                )
            if "doc" not in self.columns.named():
                warn(
                    f"{self.source}: no column of documents is named, so that every row is a document of its own. Rows "
                    "of one text may lie in several splits, and held-out figures then flatter"
                )
        for name in list(self.waiting):
            self._write(name)
        for folder in self.report.paths.values():
            Manifest.of(folder).save(folder)
        return self.report


def _whole(values: Sequence[Any], name: str, source: str) -> list[int]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            raise ValueError(f"{source}: the column {name!r} holds {value!r}; expected numbers of tokens")
    return [int(value) for value in values]
