"""Data sets of activations: parquet shards, each with its sidecar, read into memory as numpy columns."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from nla_jax.autoencoder.yardstick import CHUNK_ROWS, row_chunks
from nla_jax.data.sidecar import CorpusSlice, Sidecar, sidecar_path_for
from nla_jax.data.stage_texts import explanations_of
from nla_jax.files import AnyPath, Place, as_path, local_copy, write_atomically
from nla_jax.process import warn

_REQUIRED_COLUMNS = ("activation_vector", "n_raw_tokens", "activation_layer", "doc_id")
_READ_BYTES = 1 << 20
_KNOWN_COLUMNS = {*_REQUIRED_COLUMNS, "detokenized_text_truncated", "api_explanation", "prompt", "response"}


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
    if missing := [name for name in _REQUIRED_COLUMNS if name not in columns]:
        raise ValueError(f"{path}: missing columns {missing}")
    if wrong := {name: len(c) for name, c in columns.items() if len(c) != sidecar.row_count}:
        raise ValueError(f"{path}: the sidecar says {sidecar.row_count} rows, the columns have {wrong}")
    activations = np.ascontiguousarray(columns["activation_vector"], np.float32)
    width = sidecar.extraction.d_model
    if activations.shape != (sidecar.row_count, width):
        raise ValueError(
            f"{path}: activation_vector has shape {activations.shape}, the sidecar says "
            f"({sidecar.row_count}, {width})"
        )
    if len(rows := _rows_where(activations, lambda rows_BD: ~np.isfinite(rows_BD).all(axis=1))):
        raise ValueError(f"{path}: the activation of row {rows[0]} is not finite; extract in a wider dtype")
    _check_layer(columns["activation_layer"], sidecar, path)
    table = {name: pa.array(column) for name, column in columns.items() if name != "activation_vector"}
    for name in ("n_raw_tokens", "activation_layer"):
        table[name] = table[name].cast(pa.int64())
    table["activation_vector"] = pa.FixedSizeListArray.from_arrays(pa.array(activations.ravel()), width)

    sidecar_path_for(path).unlink(missing_ok=True)  # an old sidecar must not vouch for new rows
    with write_atomically(path) as temporary:
        # Vectors never repeat, so that a dictionary of them would only take memory; groups are written one at a time.
        pq.write_table(
            pa.table({name: table[name] for name in columns}),
            temporary,
            row_group_size=CHUNK_ROWS,
            use_dictionary=[name for name in columns if name != "activation_vector"],
        )
    sidecar.save(sidecar_path_for(path))


def load_dataset(path: Place) -> ActivationDataset:
    """Read a shard, or all shards `*.parquet` of a folder in name order.

    The result's sidecar is the first shard's, with the rows of all shards counted.

    Raises:
      FileNotFoundError: no such path, no shard in the folder, or a shard without its sidecar.
      ValueError: a shard that is unreadable, does not fit its sidecar, or differs from the first shard in
        stage, extraction, tokens, templates or columns.
    """
    shards = shards_of(path)
    sidecars = [_sidecar_of(shard) for shard in shards]
    for shard, sidecar in zip(shards[1:], sidecars[1:], strict=True):
        _check_agreement(shards[0], _contract(sidecars[0], sidecar), shard, _contract(sidecar, sidecars[0]))
    counts = [sidecar.row_count for sidecar in sidecars]
    activations_ND = np.empty((sum(counts), sidecars[0].extraction.d_model), np.float32)
    parts = [
        _load_shard(shard, sidecar, activations_ND[end - count : end])
        for shard, sidecar, count, end in zip(shards, sidecars, counts, np.cumsum(counts), strict=True)
    ]
    for shard, part in zip(shards[1:], parts[1:], strict=True):
        _check_agreement(shards[0], _columns(parts[0]), shard, _columns(part))
    return parts[0] if len(parts) == 1 else _joined(parts, activations_ND)


def shards_of(path: Place) -> list[AnyPath]:
    """The files of a data set: the file itself, or all `*.parquet` of a folder in name order but hidden ones.

    Raises:
      FileNotFoundError: no such path, or no shard in the folder.
    """
    path = as_path(path)
    if not path.exists():
        raise FileNotFoundError(f"data set {path} does not exist; give a .parquet file or a folder of them")
    if not path.is_dir():
        return [path]
    # Macs leave a ._NAME beside files on other systems' disks.
    if shards := sorted(shard for shard in path.glob("*.parquet") if not shard.name.startswith(".")):
        return shards
    raise FileNotFoundError(f"data set folder {path} holds no *.parquet file")


def _sidecar_of(path: AnyPath) -> Sidecar:
    sidecar_path = sidecar_path_for(path)
    if not sidecar_path.exists():
        raise FileNotFoundError(
            f"shard {path} has no sidecar: expected {sidecar_path}; copy it along, or if the write was "
            "interrupted, write the shard again"
        )
    return Sidecar.load(sidecar_path)


def _load_shard(
    path: AnyPath, sidecar: Sidecar, activations_ND: Float32[np.ndarray, "N D"]
) -> ActivationDataset:
    """Read a shard; its activations are written into `activations_ND`, so that all shards together have one copy."""
    try:
        # Without a buffer, the bytes of a whole row group are read before the first row.
        with local_copy(path) as file, pq.ParquetFile(file, buffer_size=_READ_BYTES) as shard:
            names, rows = shard.schema_arrow.names, shard.metadata.num_rows
            if rows != sidecar.row_count:
                raise ValueError(f"shard {path} has {rows} rows, its sidecar says {sidecar.row_count}")
            if missing := [name for name in _REQUIRED_COLUMNS if name not in names]:
                raise ValueError(f"shard {path} lacks the columns {missing}")
            # The AV's prompts are those of the templates.
            unread = {"activation_vector"} | ({"prompt"} if sidecar.stage != "ar_sft" else set())
            table = shard.read([name for name in names if name not in unread])
            start = 0
            for column in _vector_columns(file, shard.metadata):
                rows_BD = _vectors(column, sidecar, path)
                with np.errstate(over="ignore"):
                    activations_ND[start : start + len(rows_BD)] = rows_BD
                start += len(rows_BD)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"shard {path} is truncated or not parquet ({error}); copy or write it again"
        ) from error
    if nulls := [name for name in _REQUIRED_COLUMNS[1:] if table[name].null_count]:
        raise ValueError(f"shard {path} has empty cells in {nulls}")
    _check_layer(_whole_numbers(table, "activation_layer", path), sidecar, path)
    _check_activations(activations_ND, path)
    text_column = "detokenized_text_truncated"
    return ActivationDataset(
        activations=activations_ND,
        explanations=explanations_of(table, sidecar, path),
        doc_ids=[str(doc_id) for doc_id in table["doc_id"].to_pylist()],
        n_raw_tokens=_whole_numbers(table, "n_raw_tokens", path),
        contexts=[text or "" for text in table[text_column].to_pylist()]
        if text_column in table.column_names
        else None,
        extra={name: table[name].to_pylist() for name in table.column_names if name not in _KNOWN_COLUMNS},
        sidecar=sidecar,
    )


def _vector_columns(file: Path, metadata: pq.FileMetaData) -> Iterator[pa.Array]:
    """The activations of a shard, some rows at a time; a reader keeps what it has read, so each group gets its own."""
    for group in range(metadata.num_row_groups):
        with pq.ParquetFile(file, metadata=metadata, buffer_size=_READ_BYTES) as reader:
            batches = reader.iter_batches(1024, row_groups=[group], columns=["activation_vector"])
            yield from (batch.column(0) for batch in batches)


def _whole_numbers(table: pa.Table, name: str, path: AnyPath) -> Int64[np.ndarray, "N"]:
    try:
        return table[name].cast(pa.int64()).to_numpy()
    except pa.ArrowException as error:
        raise ValueError(
            f"shard {path}: the column {name!r} of type {table[name].type} holds something else than whole numbers "
            f"({error})"
        ) from error


def _check_layer(layers: Any, sidecar: Sidecar, path: AnyPath) -> None:
    expected = sidecar.extraction.layer_index
    if other := sorted({int(layer) for layer in layers} - {expected}):
        raise ValueError(f"shard {path} holds activations of layers {other}, its sidecar says {expected}")


def _vectors(column: pa.Array, sidecar: Sidecar, path: AnyPath) -> np.ndarray:
    """Rows of a column of lists of numbers, of the dtype that they are stored in, without a copy where there can be."""
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not (is_list or pa.types.is_fixed_size_list(column.type)) or not (
        pa.types.is_floating(column.type.value_type) or pa.types.is_integer(column.type.value_type)
    ):
        raise ValueError(
            f"shard {path}: the column 'activation_vector' is of type {column.type}, expected lists of numbers"
        )
    flat = column.flatten()
    if column.null_count or flat.null_count:
        raise ValueError(f"shard {path} has empty cells in ['activation_vector']")
    lengths = np.unique(pc.list_value_length(column).to_numpy()).tolist()
    width = sidecar.extraction.d_model
    if lengths not in ([], [width]):
        raise ValueError(
            f"shard {path} holds activations of length {lengths}, its sidecar says d_model {width}"
        )
    # Row by row, a column of lists becomes millions of Python floats; its flat buffer is the matrix already.
    return flat.to_numpy(zero_copy_only=False).reshape(-1, width)


def _rows_where(
    activations_ND: Float32[np.ndarray, "N D"], test: Callable[[np.ndarray], np.ndarray]
) -> Int64[np.ndarray, "M"]:
    """The rows that a test is true of; it is asked about some of them at a time."""
    return np.flatnonzero(np.concatenate([np.zeros(0, bool), *map(test, row_chunks(activations_ND))]))


def _check_activations(activations_ND: Float32[np.ndarray, "N D"], path: AnyPath) -> None:
    if len(rows := _rows_where(activations_ND, lambda rows_BD: ~np.isfinite(rows_BD).all(axis=1))):
        raise ValueError(
            f"shard {path}: {len(rows)} of {len(activations_ND)} activations hold NaN, infinity or a number beyond "
            f"float32, the first in row {rows[0]}; leave these rows out, or write the shard again"
        )
    if len(rows := _rows_where(activations_ND, lambda rows_BD: ~rows_BD.any(axis=1))):
        warn(
            f"shard {path}: {len(rows)} of {len(activations_ND)} activations are all zeros, the first in row "
            f"{rows[0]}; they have no direction, so whatever is rebuilt has the error 1: leave out what is not meant"
        )


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


def _joined(
    parts: Sequence[ActivationDataset], activations_ND: Float32[np.ndarray, "N D"]
) -> ActivationDataset:
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
