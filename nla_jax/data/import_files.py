"""The files that vectors and texts are imported from: .npz, .npy and .parquet, with texts in files beside them."""

import csv
import dataclasses
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32

from nla_jax.files import AnyPath, Place, as_path, local_copy

PART_ROWS = 8192
"""Rows that are in memory together."""
TEXT_FILES = (".jsonl", ".ndjson", ".csv", ".txt")
"""The files beside vectors that hold their texts."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Some consecutive rows of a source."""

    vectors: Float32[np.ndarray, "N D"]
    columns: dict[str, list]
    """Everything else by its name, one value a row."""
    first_row: int
    """The number of the first row in the source, for messages."""

    def column(self, name: str) -> list:
        """A column that the source is known to have."""
        return self.columns[name]


def source_files(source: Place) -> list[AnyPath]:
    """The files of a source, in name order.

    Raises:
      FileNotFoundError: there is none.
      ValueError: another kind of file.
    """
    path = as_path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a .npz, .npy or .parquet file, or a folder of .parquet"
        )
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"the folder {path} holds no *.parquet file")
    if path.suffix not in ("", ".npz", ".npy", ".parquet"):
        raise ValueError(f"{path} is a {path.suffix} file; vectors are read from .npz, .npy and .parquet")
    return files


def read_parts(source: Place, vectors: str, named: Mapping[str, str], texts: Place | None) -> Iterator[Part]:
    """Yield the rows of a source, checked, some thousands at a time.

    Args:
      source: a .npz, .npy or .parquet file, or a folder of the last.
      vectors: name of the vectors' array or column.
      named: meaning -> name of every column that the source or the file beside it has to have.
      texts: file beside it with a line for each row.

    Raises:
      FileNotFoundError, ValueError: see `imports.import_dataset`.
    """
    files = source_files(source)
    if files[0].suffix == ".parquet":
        if texts is not None:
            raise ValueError(
                f"{source} is parquet, whose texts are a column; name it, and give no file of texts"
            )
        yield from _parquet_parts(files, vectors, named)
        return
    beside = {} if texts is None else _text_columns(texts, named.get("text", "text"))
    with local_copy(files[0]) as file:
        vectors_ND, columns = _arrays(file, files[0], vectors)
        columns = {**columns, **beside}
        _check_names(source, named, columns)
        if wrong := {name: len(column) for name, column in columns.items() if len(column) != len(vectors_ND)}:
            raise ValueError(
                f"{source} holds {len(vectors_ND)} vectors, and other numbers of {wrong}; give one for each vector"
            )
        for start in range(0, len(vectors_ND), PART_ROWS):
            rows = slice(start, start + PART_ROWS)
            some = {name: _plain(column[rows]) for name, column in columns.items()}
            yield Part(_checked(vectors_ND[rows], source, start), some, start)


def _arrays(file: Path, path: AnyPath, vectors: str) -> tuple[np.ndarray, dict[str, Any]]:
    """The vectors of a file of NumPy's, and its other arrays that have one value a row."""
    try:
        if path.suffix == ".npy":
            return np.load(file, mmap_mode="r"), {}
        with np.load(file) as arrays:
            if vectors not in arrays:
                raise _missing(path, "vectors", vectors, arrays.files)
            others = {name: arrays[name] for name in arrays.files if name != vectors}
            return arrays[vectors], {name: array for name, array in others.items() if array.ndim == 1}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise ValueError(
                f"{path} holds arrays of Python objects, which are not read because they may run code; save texts as "
                "np.array(texts, dtype=str), or put them into a file beside (--texts), and vectors as one float array"
            ) from error
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is no {path.suffix} file, or a part of one ({error})") from error


def _text_columns(texts: Place, text: str) -> dict[str, list]:
    """The columns of a file of texts."""
    path = as_path(texts)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of texts at {path}")
    if path.suffix not in TEXT_FILES:
        raise ValueError(f"{path} is a {path.suffix} file; texts are read from {', '.join(TEXT_FILES)}")
    content = path.read_bytes().decode("utf-8-sig")
    lines = content.removesuffix("\n").split("\n")
    if path.suffix == ".txt":
        return {text: lines}
    if path.suffix == ".csv":
        rows = list(csv.DictReader(content.splitlines(keepends=True)))
    else:
        rows = [_object(path, number, line) for number, line in enumerate(lines, start=1)]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _object(path: AnyPath, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is no JSON ({error}); repair the line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} holds {row!r}; expected an object with a text")
    return row


def _parquet_parts(files: Sequence[AnyPath], vectors: str, named: Mapping[str, str]) -> Iterator[Part]:
    first = 0
    for path in files:
        try:
            with local_copy(path) as file, pq.ParquetFile(file) as reader:
                names = reader.schema_arrow.names
                if vectors not in names:
                    raise _missing(path, "vectors", vectors, names)
                _check_names(path, named, names)
                for batch in reader.iter_batches(PART_ROWS):
                    vectors_ND = _matrix(batch.column(vectors), path, vectors, first)
                    others = {name: batch.column(name).to_pylist() for name in names if name != vectors}
                    yield Part(_checked(vectors_ND, path, first), others, first)
                    first += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path} is truncated or not parquet ({error}); copy or write it again"
            ) from error


def _matrix(column: pa.Array, path: AnyPath, name: str, first: int) -> np.ndarray:
    """A column of lists of numbers as a matrix."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise ValueError(f"{path}: the column {name!r} is of type {kind}, expected lists of numbers")
    if column.null_count:
        empty = column.is_null().to_pylist().index(True)
        raise ValueError(f"{path}: row {first + empty} has no vector in {name!r}; leave such rows out")
    lengths = np.array([len(vector) for vector in column])
    if len(other := np.flatnonzero(lengths != lengths[0])):
        raise ValueError(
            f"{path}: the vector of row {first + other[0]} has {lengths[other[0]]} numbers, the first of these rows "
            f"{lengths[0]}; all have to be as wide as the model's residual stream"
        )
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _checked(vectors_ND: np.ndarray, source: Place, first: int) -> Float32[np.ndarray, "N D"]:
    """Vectors in float32.

    Raises:
      ValueError: no matrix of floating-point numbers, or one with numbers that are not finite.
    """
    if vectors_ND.ndim != 2:
        raise ValueError(f"{source}: the vectors have the shape {vectors_ND.shape}, expected (rows, width)")
    if not np.issubdtype(vectors_ND.dtype, np.floating):
        raise ValueError(
            f"{source}: the vectors are of dtype {vectors_ND.dtype}, expected floating-point numbers; save raw "
            "activations as float16, float32 or float64"
        )
    with np.errstate(over="ignore"):
        narrowed_ND = np.ascontiguousarray(vectors_ND, np.float32)
    if len(wrong := np.flatnonzero(~np.isfinite(narrowed_ND).all(axis=1))):
        raise ValueError(
            f"{source}: the vector of row {first + wrong[0]} holds NaN, infinity or a number beyond float32; leave "
            "such rows out"
        )
    return narrowed_ND


def _check_names(source: Place, named: Mapping[str, str], there: Any) -> None:
    for meaning, name in named.items():
        if name not in there:
            raise _missing(source, meaning, name, there)


def _missing(source: Place, meaning: str, name: str, there: Any) -> ValueError:
    return ValueError(
        f"{source} has no {name!r} for the {meaning}; it has {', '.join(sorted(there)) or 'nothing else'}: name "
        f"another one with --{meaning}-column"
    )


def _plain(values: Any) -> list:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)
