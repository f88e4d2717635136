"""Parquet shards of activations: how their files are laid out, and what one of their row groups holds.

Vectors are written uncompressed, as one page a row group, so that they end where their column ends and a row group can
be mapped into memory instead of being decoded. In float32 they are lists of numbers, which every reader of parquet
knows; in bfloat16, which parquet has no type for, they are binaries of two little-endian bytes a number. Files of other
writers, which may be compressed and paged in any way, are decoded.
"""

import contextlib
import functools
import hashlib
import io
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Float32, Int64

from nla_jax.autoencoder.yardstick import row_chunks
from nla_jax.data.sidecar import Sidecar, sidecar_path_for
from nla_jax.files import AnyPath, Place, as_path
from nla_jax.process import warn

REQUIRED_COLUMNS = ("activation_vector", "n_raw_tokens", "activation_layer", "doc_id")
GROUP_ROWS = 512
"""Rows of a row group: what is read together, and what shuffles of large data move together."""
PIECE_ROWS = 1024
"""Rows that are decoded together where a file is read from its beginning to its end."""
DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""The dtypes of vectors on disk by their names in sidecars."""
_READ_BYTES = 1 << 20


def write_table(file: Path, columns: Mapping[str, Any], storage: str, width: int) -> None:
    """Write a shard's file.

    Args:
      file: where; replaced if it is there.
      columns: name -> one value a row, with `activation_vector` as a contiguous (N, D) array of the stored dtype.
      storage: name of that dtype, see `DTYPES`.
      width: D.

    Raises:
      OSError: the file cannot be written, for instance because the disk is full.
    """
    vectors_ND = columns["activation_vector"]
    arrays = {name: pa.array(column) for name, column in columns.items() if name != "activation_vector"}
    for name in ("n_raw_tokens", "activation_layer"):
        arrays[name] = arrays[name].cast(pa.int64())
    # Python's floats have twice the digits that a model computes probabilities with.
    probabilities = arrays.get("next_probabilities")
    if probabilities is not None and probabilities.type == pa.list_(pa.float64()):
        arrays["next_probabilities"] = probabilities.cast(pa.list_(pa.float32()))
    if storage == "float32":
        arrays["activation_vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), width)
    else:
        data = pa.py_buffer(vectors_ND.view(np.uint8).ravel())
        kind = pa.binary(vectors_ND.itemsize * width)
        arrays["activation_vector"] = pa.FixedSizeBinaryArray.from_buffers(
            kind, len(vectors_ND), [None, data]
        )
    table = pa.table({name: arrays[name] for name in columns})
    others = [path for path in _leaves(table.schema) if path.split(".")[0] != "activation_vector"]
    # Vectors never repeat, so that a dictionary of them would only take memory, and hardly compress.
    pq.write_table(
        table,
        file,
        row_group_size=GROUP_ROWS,
        data_page_size=1 << 30,
        compression=dict.fromkeys(others, "SNAPPY"),
        use_dictionary=others,
        write_statistics=others,
    )


def _leaves(schema: pa.Schema) -> list[str]:
    """The columns as parquet counts them: nested ones have several."""
    pq.write_table(schema.empty_table(), file := io.BytesIO())
    described = pq.ParquetFile(file).schema
    return [described.column(i).path for i in range(len(described))]


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


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


def sidecar_of(path: AnyPath) -> Sidecar:
    """The sidecar of a shard.

    Raises:
      FileNotFoundError: it has none.
      ValueError: as `Sidecar.load`.
    """
    sidecar_path = sidecar_path_for(path)
    if not sidecar_path.exists():
        raise FileNotFoundError(
            f"shard {path} has no sidecar: expected {sidecar_path}; copy it along, or if the write was "
            "interrupted, write the shard again"
        )
    return Sidecar.load(sidecar_path)


class Shard:
    """A shard that is open for reading, one row group at a time; a file in a bucket is read in place."""

    def __init__(self, path: AnyPath, sidecar: Sidecar):
        """Read the footer of the file and compare it with the sidecar.

        Args:
          path: the parquet file.
          sidecar: of the shard, or of the data set that it is part of: its row count and size, if it tells them, are
            the file's.

        Raises:
          ValueError: the file is truncated, no parquet, or does not fit the sidecar.
        """
        self.path, self.sidecar = path, sidecar
        size = path.stat().st_size if isinstance(path, Path) else path.stat().length
        if sidecar.file_bytes not in (None, size):
            raise ValueError(
                f"shard {path} has {size} bytes, and had {sidecar.file_bytes} when it was written: it is truncated or "
                "was changed; copy or write it again"
            )
        self.metadata, self.names = self._read(lambda file: (file.metadata, file.schema_arrow.names))
        if self.metadata.num_rows != sidecar.row_count:
            raise ValueError(
                f"shard {path} has {self.metadata.num_rows} rows, its sidecar says {sidecar.row_count}"
            )
        if missing := [name for name in REQUIRED_COLUMNS if name not in self.names]:
            raise ValueError(f"shard {path} lacks the columns {missing}")
        leaves = [self.metadata.schema.column(i).path.split(".")[0] for i in range(self.metadata.num_columns)]
        self._vector_column = leaves.index("activation_vector")

    @property
    def group_rows(self) -> list[int]:
        """The number of rows of each row group."""
        return [self.metadata.row_group(group).num_rows for group in range(self.metadata.num_row_groups)]

    def table(self, group: int, names: Sequence[str]) -> pa.Table:
        """Columns of a row group.

        Raises:
          ValueError: the file is damaged.
        """
        return self._read(lambda file: file.read_row_group(group, columns=list(names)))

    def empty_table(self, names: Sequence[str]) -> pa.Table:
        """Columns without rows, of the types of the file's."""
        return self._read(lambda file: file.schema_arrow.empty_table().select(list(names)))

    def vectors(self, group: int) -> np.ndarray:
        """The activations of a row group, (rows, D), of a dtype on disk; where possible a view of the mapped file.

        Raises:
          ValueError: the file is damaged, or holds something else than vectors of the width of the sidecar.
        """
        if self.is_mappable:
            return self._mapped(group)
        column = self.table(group, ["activation_vector"])["activation_vector"].combine_chunks()
        return _vectors(column, self.sidecar, self.path)

    def pieces(self, names: Sequence[str], *, vectors: bool) -> Iterator[tuple[pa.Table, np.ndarray | None]]:
        """All rows in order, at most `PIECE_ROWS` at a time, however large the row groups of the file are.

        Args:
          names: columns beside the vectors.
          vectors: whether to read the vectors too, as `vectors` gives them.

        Raises:
          ValueError: as `vectors`.
        """
        if self.is_mappable:
            for group in range(self.metadata.num_row_groups):
                yield self.table(group, names), self._mapped(group) if vectors else None
            return
        wanted = [*names, *["activation_vector"] * vectors]
        with self._naming(), self.path.open("rb") as file:
            for group in range(self.metadata.num_row_groups):
                # A reader keeps what it has read, so each group gets its own; without a buffer it reads a whole group.
                with pq.ParquetFile(file, metadata=self.metadata, buffer_size=_READ_BYTES) as reader:
                    for batch in reader.iter_batches(PIECE_ROWS, row_groups=[group], columns=wanted):
                        vectors_BD = None
                        if vectors:
                            vectors_BD = _vectors(batch.column("activation_vector"), self.sidecar, self.path)
                        yield pa.Table.from_batches([batch]).select(list(names)), vectors_BD

    @functools.cached_property
    def is_mappable(self) -> bool:
        """Whether the vectors can be mapped into memory: the file lies here, and is as `write_table` wrote it."""
        if (
            not isinstance(self.path, Path)
            or self.sidecar.file_bytes is None
            or not self.metadata.num_row_groups
        ):
            return False
        return self.metadata.row_group(0).column(self._vector_column).compression == "UNCOMPRESSED"

    def _mapped(self, group: int) -> np.ndarray:
        row_group = self.metadata.row_group(group)
        column = row_group.column(self._vector_column)
        end = column.data_page_offset + column.total_compressed_size
        dtype, width = DTYPES[self.sidecar.storage], self.sidecar.extraction.d_model
        count = row_group.num_rows * width
        start = end - count * dtype.itemsize
        # Only whole pages of memory can be mapped.
        first = start - start % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), end - first, access=mmap.ACCESS_READ, offset=first)
        if hasattr(mmap, "MADV_WILLNEED"):
            mapped.madvise(mmap.MADV_WILLNEED)
        return np.frombuffer(mapped, dtype, count, start - first).reshape(-1, width)

    def _read(self, what: Callable[[pq.ParquetFile], Any]) -> Any:
        """What a function of the open file returns."""
        known = getattr(self, "metadata", None)
        with self._naming(), self.path.open("rb") as file, pq.ParquetFile(file, metadata=known) as shard:
            return what(shard)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Put the shard's path and the remedy into errors of reading."""
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"shard {self.path} is truncated or not parquet ({error}); copy or write it again"
            ) from error


def _vectors(column: pa.Array, sidecar: Sidecar, path: AnyPath) -> np.ndarray:
    """Rows of a column of vectors, of the dtype that they are stored in, without a copy where there can be."""
    kind, width = column.type, sidecar.extraction.d_model
    dtype = DTYPES["bfloat16"]
    if sidecar.storage == "bfloat16" and pa.types.is_fixed_size_binary(kind):
        if kind.byte_width != width * dtype.itemsize:
            raise ValueError(
                f"shard {path} holds activations of {kind.byte_width} bytes, its sidecar says d_model {width} in "
                f"bfloat16, which are {width * dtype.itemsize}"
            )
        if column.null_count:
            raise ValueError(f"shard {path} has empty cells in ['activation_vector']")
        start = column.offset * kind.byte_width
        data = np.frombuffer(column.buffers()[1], np.uint8)[start : start + len(column) * kind.byte_width]
        return data.view(dtype).reshape(-1, width)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (is_list or pa.types.is_fixed_size_list(kind)) or not (
        pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)
    ):
        raise ValueError(
            f"shard {path}: the column 'activation_vector' is of type {kind}, expected lists of numbers"
        )
    flat = column.flatten()
    if column.null_count or flat.null_count:
        raise ValueError(f"shard {path} has empty cells in ['activation_vector']")
    lengths = np.unique(pc.list_value_length(column).to_numpy()).tolist()
    if lengths not in ([], [width]):
        raise ValueError(
            f"shard {path} holds activations of length {lengths}, its sidecar says d_model {width}"
        )
    # Row by row, a column of lists becomes millions of Python floats; its flat buffer is the matrix already.
    return flat.to_numpy(zero_copy_only=False).reshape(-1, width)


def whole_numbers(table: pa.Table, name: str, path: AnyPath) -> Int64[np.ndarray, "N"]:
    """A column of whole numbers, of whatever type.

    Raises:
      ValueError: it holds others.
    """
    try:
        return table[name].cast(pa.int64()).to_numpy()
    except pa.ArrowException as error:
        raise ValueError(
            f"shard {path}: the column {name!r} of type {table[name].type} holds something else than whole numbers "
            f"({error})"
        ) from error


def check_layer(layers: Any, sidecar: Sidecar, path: AnyPath) -> None:
    """Refuse activations of another layer than the sidecar's.

    Raises:
      ValueError: naming both.
    """
    expected = sidecar.extraction.layer_index
    if other := sorted({int(layer) for layer in layers} - {expected}):
        raise ValueError(f"shard {path} holds activations of layers {other}, its sidecar says {expected}")


def check_activations(activations_ND: Float32[np.ndarray, "N D"], path: AnyPath) -> None:
    """Refuse activations that are not finite, and warn of those that have no direction.

    Raises:
      ValueError: some are not finite; the message tells how many, and the first.
    """
    if len(rows := rows_where(activations_ND, lambda rows_BD: ~np.isfinite(rows_BD).all(axis=1))):
        raise ValueError(
            f"shard {path}: {len(rows)} of {len(activations_ND)} activations hold NaN, infinity or a number beyond "
            f"float32, the first in row {rows[0]}; leave these rows out, or write the shard again"
        )
    if len(rows := rows_where(activations_ND, lambda rows_BD: ~rows_BD.any(axis=1))):
        warn(
            f"shard {path}: {len(rows)} of {len(activations_ND)} activations are all zeros, the first in row "
            f"{rows[0]}; they have no direction, so whatever is rebuilt has the error 1: leave out what is not meant"
        )


def rows_where(
    activations_ND: Float[np.ndarray, "N D"], test: Callable[[np.ndarray], np.ndarray]
) -> Int64[np.ndarray, "M"]:
    """The rows that a test is true of; it is asked about some of them at a time."""
    return np.flatnonzero(np.concatenate([np.zeros(0, bool), *map(test, row_chunks(activations_ND))]))
