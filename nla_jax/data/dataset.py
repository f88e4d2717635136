"""Data sets of activations: parquet shards, each with its sidecar, read into memory as numpy columns."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64

from nla_jax.data.manifest import Manifest, check_complete
from nla_jax.data.shards import (
    DTYPES,
    REQUIRED_COLUMNS,
    Shard,
    check_activations,
    check_layer,
    rows_where,
    sha256_of,
    shards_of,
    sidecar_of,
    whole_numbers,
    write_table,
)
from nla_jax.data.sidecar import CorpusSlice, Sidecar, sidecar_path_for
from nla_jax.data.stage_texts import explanations_of
from nla_jax.files import AnyPath, Place, as_path, write_atomically

_KNOWN_COLUMNS = {*REQUIRED_COLUMNS, "detokenized_text_truncated", "api_explanation", "prompt", "response"}


@dataclasses.dataclass(frozen=True)
class ActivationDataset:
    """Rows of a data set as columns in memory."""

    activations: Float32[np.ndarray, "N D"]
    """Raw activations, never normalized."""
    explanations: list[str] | None
    """None for data without texts (`rl`, or `base` before texts are written)."""
    doc_ids: list[str]
    n_raw_tokens: Int64[np.ndarray, "N"]
    """Tokens of the document up to and including the activation's position."""
    contexts: list[str] | None
    """The text of those tokens, where stored."""
    extra: dict[str, list]
    """Further columns by name."""
    sidecar: Sidecar

    def __len__(self) -> int:
        return len(self.doc_ids)

    @property
    def row_ids(self) -> list[str]:
        """Names of the rows: the document, and the number of its tokens that were read."""
        return [f"{doc}@{n}" for doc, n in zip(self.doc_ids, self.n_raw_tokens, strict=True)]

    def take(self, indices: Any) -> "ActivationDataset":
        """Select rows by anything that indexes a numpy axis; those of a slice share their activations with all rows."""
        rows = np.arange(len(self))[indices]

        def pick(column: list | None) -> list | None:
            return None if column is None else [column[row] for row in rows]

        return ActivationDataset(
            activations=self.activations[indices],
            explanations=pick(self.explanations),
            doc_ids=pick(self.doc_ids),
            n_raw_tokens=self.n_raw_tokens[indices],
            contexts=pick(self.contexts),
            extra={name: pick(column) for name, column in self.extra.items()},
            sidecar=dataclasses.replace(self.sidecar, row_count=len(rows)),
        )


def base_columns(data: ActivationDataset) -> dict[str, Any]:
    """The columns of rows as `stage_columns` and `write_shard` take them; those that the rows lack are left out."""
    columns = {
        "activation_vector": data.activations,
        "n_raw_tokens": data.n_raw_tokens,
        "activation_layer": [data.sidecar.extraction.layer_index] * len(data),
        "doc_id": data.doc_ids,
        "detokenized_text_truncated": data.contexts,
        "api_explanation": data.explanations,
        **data.extra,
    }
    return {name: column for name, column in columns.items() if column is not None}


def write_shard(path: Place, columns: Mapping[str, Any], sidecar: Sidecar) -> None:
    """Write one parquet shard and then its sidecar, each atomically.

    Without its sidecar a shard is not loadable, so an interrupted write never passes for a finished one.

    Args:
      path: file to write, ending in `.parquet`.
      columns: name -> one value per row; at least `activation_vector` (N, D), `n_raw_tokens`,
        `activation_layer` and `doc_id`.
      sidecar: its row count, d_model and layer must be those of the columns.

    Raises:
      ValueError: a missing column, columns of unequal length, a shape or layer other than the sidecar's, or
        activations that are not finite.
    """
    path = as_path(path)
    if path.suffix != ".parquet":
        raise ValueError(f"shard {path} must end in .parquet, or the loader will not see it")
    if missing := [name for name in REQUIRED_COLUMNS if name not in columns]:
        raise ValueError(f"{path}: missing columns {missing}")
    if wrong := {name: len(c) for name, c in columns.items() if len(c) != sidecar.row_count}:
        raise ValueError(f"{path}: the sidecar says {sidecar.row_count} rows, the columns have {wrong}")
    width, dtype = sidecar.extraction.d_model, DTYPES[sidecar.storage]
    with np.errstate(over="ignore"):
        activations = np.ascontiguousarray(columns["activation_vector"], dtype)
    if not sidecar.row_count:
        activations = activations.reshape(0, width)
    if activations.shape != (sidecar.row_count, width):
        raise ValueError(
            f"{path}: activation_vector has shape {activations.shape}, the sidecar says "
            f"({sidecar.row_count}, {width})"
        )
    if len(rows := rows_where(activations, lambda rows_BD: ~np.isfinite(rows_BD).all(axis=1))):
        raise ValueError(f"{path}: the activation of row {rows[0]} is not finite; extract in a wider dtype")
    check_layer(columns["activation_layer"], sidecar, path)
    sidecar_path_for(path).unlink(missing_ok=True)  # an old sidecar must not vouch for new rows
    with write_atomically(path) as temporary:
        write_table(temporary, {**columns, "activation_vector": activations}, sidecar.storage, width)
        written = dataclasses.replace(
            sidecar, file_bytes=temporary.stat().st_size, file_sha256=sha256_of(temporary)
        )
        _check_mapping(Shard(temporary, written), activations)
    written.save(sidecar_path_for(path))


def _check_mapping(shard: Shard, activations_ND: np.ndarray) -> None:
    """Make sure that the vectors lie in the file where they will be looked for, whatever version wrote it."""
    if not shard.is_mappable:
        return
    first, last = shard.vectors(0), shard.vectors(shard.metadata.num_row_groups - 1)
    if not (
        np.array_equal(first, activations_ND[: len(first)])
        and np.array_equal(last, activations_ND[len(activations_ND) - len(last) :])
    ):
        raise RuntimeError(
            f"{shard.path}: this version of pyarrow ({pa.__version__}) lays vectors out in another way than expected; "
            "install the version that pyproject.toml names"
        )


def load_dataset(path: Place) -> ActivationDataset:
    """Read a shard, or all shards `*.parquet` of a folder in name order, into memory.

    The result's sidecar is the first shard's, with the rows of all shards counted. `store.open_dataset` opens what is
    too large for that.

    Raises:
      FileNotFoundError: no such path, no shard in the folder, or a shard without its sidecar.
      ValueError: a shard that is unreadable, does not fit its sidecar, differs from the first shard in stage,
        extraction, tokens, templates or columns, or is missing by the manifest of the folder.
    """
    paths = shards_of(path)
    if (manifest := Manifest.load(path)) is not None:
        check_complete(as_path(path), manifest, [shard.name for shard in paths])
    sidecars = [sidecar_of(shard) for shard in paths]
    check_contracts(paths, sidecars)
    counts = [sidecar.row_count for sidecar in sidecars]
    activations_ND = np.empty((sum(counts), sidecars[0].extraction.d_model), np.float32)
    parts = [
        _load_shard(Shard(shard, sidecar), activations_ND[end - count : end])
        for shard, sidecar, count, end in zip(paths, sidecars, counts, np.cumsum(counts), strict=True)
    ]
    filled = [(shard, part) for shard, part in zip(paths, parts, strict=True) if len(part)]
    for shard, part in filled[1:]:
        _check_agreement(filled[0][0], _columns(filled[0][1]), shard, _columns(part))
    return parts[0] if len(parts) == 1 else joined([part for _, part in filled] or parts[:1], activations_ND)


def _load_shard(shard: Shard, activations_ND: Float32[np.ndarray, "N D"]) -> ActivationDataset:
    """Read a shard; its activations are written into `activations_ND`, so that all shards together have one copy."""
    start = 0
    for _, rows_BD in shard.pieces([], vectors=True):
        with np.errstate(over="ignore"):
            activations_ND[start : start + len(rows_BD)] = rows_BD
        start += len(rows_BD)
    check_activations(activations_ND, shard.path)
    names = text_columns(shard)
    tables = [shard.table(group, names) for group in range(shard.metadata.num_row_groups)]
    # Columns of a shard without rows, or of null in all rows of a group, have no type of their own.
    table = pa.concat_tables(tables, promote_options="permissive") if tables else shard.empty_table(names)
    return rows_of(table, activations_ND, shard.sidecar, shard.path)


def text_columns(shard: Shard) -> list[str]:
    """The columns that rows in memory are made of, but the vectors; an AV's prompts are those of the templates."""
    unread = {"activation_vector"} | ({"prompt"} if shard.sidecar.stage != "ar_sft" else set())
    return [name for name in shard.names if name not in unread]


def rows_of(
    table: pa.Table, activations_ND: Float32[np.ndarray, "N D"], sidecar: Sidecar, path: AnyPath
) -> ActivationDataset:
    """Rows in memory from what a shard holds of them.

    Args:
      table: the columns that `text_columns` names, of these rows.
      activations_ND: their activations.
      sidecar: of the shard; its row count becomes the number of these rows.
      path: the shard's, for messages.

    Raises:
      ValueError: cells that are empty or hold something else than their column's meaning.
    """
    if nulls := [name for name in REQUIRED_COLUMNS[1:] if table[name].null_count]:
        raise ValueError(f"shard {path} has empty cells in {nulls}")
    check_layer(whole_numbers(table, "activation_layer", path), sidecar, path)
    text_column = "detokenized_text_truncated"
    return ActivationDataset(
        activations=activations_ND,
        explanations=explanations_of(table, sidecar, path),
        doc_ids=[str(doc_id) for doc_id in table["doc_id"].to_pylist()],
        n_raw_tokens=whole_numbers(table, "n_raw_tokens", path),
        contexts=[text or "" for text in table[text_column].to_pylist()]
        if text_column in table.column_names
        else None,
        extra={name: table[name].to_pylist() for name in table.column_names if name not in _KNOWN_COLUMNS},
        sidecar=dataclasses.replace(sidecar, row_count=len(table)),
    )


def check_contracts(paths: Sequence[AnyPath], sidecars: Sequence[Sidecar]) -> None:
    """Refuse shards that are not of one data set by their sidecars.

    Raises:
      ValueError: two differ in stage, extraction, tokens or templates.
    """
    first = sidecars[0]
    for path, sidecar in zip(paths[1:], sidecars[1:], strict=True):
        _check_agreement(paths[0], _contract(first, sidecar), path, _contract(sidecar, first))


def _contract(sidecar: Sidecar, other: Sidecar) -> dict[str, Any]:
    """What two shards of a data set have in common by their sidecars."""
    # Shards that were written before there were digests fit any.
    digests = [one.extraction.corpus_digest for one in (sidecar, other)]
    unknown = {"corpus_digest": None, "corpus_documents": None} if None in digests else {}
    return {
        "stage": sidecar.stage,
        "extraction": dataclasses.replace(sidecar.extraction, corpus_slice=CorpusSlice(0, 0), **unknown),
        "tokens": sidecar.tokens,
        "prompt_templates": sidecar.prompt_templates,
    }


def _columns(part: ActivationDataset) -> dict[str, Any]:
    """The columns that all shards of a data set have or lack."""
    return {
        "columns": sorted([*part.extra, *["explanation"] * (part.explanations is not None)]),
        "contexts": part.contexts is not None,
    }


def _check_agreement(
    first_path: AnyPath, first: dict[str, Any], path: AnyPath, other: dict[str, Any]
) -> None:
    values = [(name, value, other[name]) for name, value in first.items()]
    if wrong := [
        f"{name}: {value} and {other_value}" for name, value, other_value in values if value != other_value
    ]:
        raise ValueError(f"shards {first_path} and {path} differ in {'; '.join(wrong)}; load them apart")


def joined(
    parts: Sequence[ActivationDataset], activations_ND: Float32[np.ndarray, "N D"]
) -> ActivationDataset:
    """The rows of parts of one data set, one after another, whose activations are given."""
    first = parts[0]

    def join(columns: Sequence[list | None]) -> list | None:
        return None if columns[0] is None else [value for column in columns for value in column]

    slices = [part.sidecar.extraction.corpus_slice for part in parts]
    start = min(s.start for s in slices)
    span = CorpusSlice(start, max(s.start + s.length for s in slices) - start)
    return ActivationDataset(
        activations=activations_ND,
        explanations=join([part.explanations for part in parts]),
        doc_ids=join([part.doc_ids for part in parts]),
        n_raw_tokens=np.concatenate([part.n_raw_tokens for part in parts]),
        contexts=join([part.contexts for part in parts]),
        extra={name: join([part.extra[name] for part in parts]) for name in first.extra},
        sidecar=dataclasses.replace(
            first.sidecar,
            row_count=sum(map(len, parts)),
            extraction=dataclasses.replace(first.sidecar.extraction, corpus_slice=span),
        ),
    )
