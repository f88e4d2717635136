"""Data sets that are opened, and not read: any of their rows can be asked for, and none are in memory until then.

Letters: N rows of the data set, B rows that are asked for, G row groups, D model.
"""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64

from nla_jax.data.dataset import ActivationDataset, check_contracts, joined, rows_of, text_columns
from nla_jax.data.manifest import ListedShard, Manifest, check_complete
from nla_jax.data.shards import Shard, check_activations, shards_of, sidecar_of, whole_numbers
from nla_jax.data.sidecar import CorpusSlice, Sidecar
from nla_jax.data.stage_texts import explanations_of
from nla_jax.files import AnyPath, Place, as_path

WINDOW_ROWS = 131_072
"""Rows that a shuffle mixes with each other; all rows where there are no more than that. See `batches`."""
PART_ROWS = 8192
"""Rows that are in memory together where a data set is gone through from its beginning to its end."""
_SHARDS_HELD = 4096
"""Shards whose footers are kept for further rows."""
_ROWS_HELD = 2 * WINDOW_ROWS
"""Rows whose vectors are kept for further rows, or mapped, and rows whose texts are: those of two windows."""


def open_dataset(path: Place) -> "StoredDataset":
    """Open a shard, or all shards of a folder, without reading their rows.

    Raises:
      FileNotFoundError: no such path, no shard in the folder, or a shard without its sidecar.
      ValueError: shards that the manifest of the folder lists are missing; or, where there is no manifest, shards that
        are unreadable or differ from the first in what `load_dataset` compares.
    """
    folder = as_path(path)
    paths = shards_of(folder)
    manifest = Manifest.load(folder) if folder.is_dir() else None
    if manifest is not None:
        check_complete(folder, manifest, [shard.name for shard in paths])
        return StoredDataset(_Groups(paths, manifest.shards, sidecar_of(paths[0])))
    sidecars = [sidecar_of(shard) for shard in paths]
    check_contracts(paths, sidecars)
    listed = [
        ListedShard(
            path.name, tuple(Shard(path, sidecar).group_rows), sidecar.file_bytes, sidecar.file_sha256
        )
        for path, sidecar in zip(paths, sidecars, strict=True)
    ]
    slices = [sidecar.extraction.corpus_slice for sidecar in sidecars]
    start = min(s.start for s in slices)
    span = CorpusSlice(start, max(s.start + s.length for s in slices) - start)
    extraction = dataclasses.replace(sidecars[0].extraction, corpus_slice=span)
    return StoredDataset(_Groups(paths, listed, dataclasses.replace(sidecars[0], extraction=extraction)))


class _Groups:
    """The row groups of all shards, numbered through, and the few of them that were used last."""

    def __init__(self, paths: Sequence[AnyPath], listed: Sequence[ListedShard], sidecar: Sidecar):
        self.paths, self.listed, self.sidecar = paths, listed, sidecar
        rows_G = [rows for shard in listed for rows in shard.group_rows]
        self.first_row_G = np.cumsum([0, *rows_G])
        """The first row of each group, and the number of all rows behind them."""
        self.place_G = [
            (number, group) for number, shard in enumerate(listed) for group in range(len(shard.group_rows))
        ]
        self.shard = functools.lru_cache(maxsize=_SHARDS_HELD)(self._shard)
        self._vectors: OrderedDict[Any, np.ndarray] = OrderedDict()
        self._tables: OrderedDict[Any, pa.Table] = OrderedDict()

    def _shard(self, number: int) -> Shard:
        listed = self.listed[number]
        about = dataclasses.replace(
            self.sidecar, row_count=listed.rows, file_bytes=listed.bytes, file_sha256=listed.sha256
        )
        return Shard(self.paths[number], about)

    def vectors(self, group: int) -> np.ndarray:
        """The activations of a group, as `Shard.vectors`."""
        number, inside = self.place_G[group]
        return _kept(self._vectors, group, lambda: self.shard(number).vectors(inside))

    def table(self, group: int, names: tuple[str, ...]) -> pa.Table:
        """Columns of a group."""
        number, inside = self.place_G[group]
        return _kept(self._tables, (group, names), lambda: self.shard(number).table(inside, names))


def _kept(held: OrderedDict[Any, Any], key: Any, read: Callable[[], Any]) -> Any:
    """What is held under a key, read if it is not; what was asked for longest ago is let go of for it."""
    if key in held:
        held.move_to_end(key)
        return held[key]
    held[key] = value = read()
    while len(held) > 1 and len(held) * len(value) > _ROWS_HELD:
        held.popitem(last=False)
    return value


class StoredDataset:
    """Rows of a data set on disk, in an order of their own; the interface is that of `ActivationDataset`, as far as
    rows are taken by it."""

    def __init__(self, groups: _Groups, rows_N: Int64[np.ndarray, "N"] | None = None):
        """Made by `open_dataset` and `take`.

        Args:
          groups: where the rows lie.
          rows_N: their numbers among all rows of the files; None for all of them in order.
        """
        self._groups = groups
        self._rows_N = np.arange(groups.first_row_G[-1]) if rows_N is None else rows_N

    def __len__(self) -> int:
        return len(self._rows_N)

    @property
    def sidecar(self) -> Sidecar:
        """That of the first shard, with all rows counted."""
        return dataclasses.replace(
            self._groups.sidecar, row_count=len(self), file_bytes=None, file_sha256=None
        )

    @property
    def width(self) -> int:
        """The width of the activations."""
        return self._groups.sidecar.extraction.d_model

    def take(self, indices: Any) -> "StoredDataset":
        """Select rows by anything that indexes a numpy axis; nothing is read."""
        return StoredDataset(self._groups, self._rows_N[indices])

    def activations(self, indices: Any) -> Float32[np.ndarray, "B D"]:
        """The raw activations of some rows."""
        rows_B = self._rows_N[indices]
        activations_BD = np.empty((len(rows_B), self.width), np.float32)
        for group, inside, places in self._by_group(rows_B):
            activations_BD[places] = self._groups.vectors(group)[inside]
        return activations_BD

    def explanations(self, indices: Any) -> list[str]:
        """The explanations of some rows.

        Raises:
          ValueError: the data set holds none.
        """
        rows_B = self._rows_N[indices]
        texts: list[str] = [""] * len(rows_B)
        for group, inside, places in self._by_group(rows_B):
            shard = self._shard_of(group)
            names = tuple(name for name in ("api_explanation", "prompt", "response") if name in shard.names)
            found = explanations_of(self._groups.table(group, names).take(inside), shard.sidecar, shard.path)
            if found is None:
                raise ValueError(f"shard {shard.path} of stage {shard.sidecar.stage!r} holds no explanations")
            for place, text in zip(places.tolist(), found, strict=True):
                texts[place] = text
        return texts

    def read(self, indices: Any = slice(None)) -> ActivationDataset:
        """Read rows into memory, in the order that they are asked for.

        Raises:
          ValueError: as `load_dataset`.
        """
        rows_B = self._rows_N[indices]
        parts, order = [], []
        for group, inside, places in self._by_group(rows_B):
            shard = self._shard_of(group)
            vectors_BD = _as_float32(self._groups.vectors(group)[inside])
            check_activations(vectors_BD, shard.path)
            table = self._groups.table(group, tuple(text_columns(shard))).take(inside)
            parts.append(rows_of(table, vectors_BD, shard.sidecar, shard.path))
            order.append(places)
        if not parts:
            shard = self._groups.shard(0)
            table, vectors_BD = shard.empty_table(text_columns(shard)), np.empty((0, self.width), np.float32)
            parts, order = [rows_of(table, vectors_BD, shard.sidecar, shard.path)], [np.arange(0)]
        whole = joined(parts, np.concatenate([part.activations for part in parts]))
        whole = dataclasses.replace(whole, sidecar=dataclasses.replace(self.sidecar, row_count=len(whole)))
        places = np.concatenate(order)
        return whole if (np.diff(places) > 0).all() else whole.take(np.argsort(places, kind="stable"))

    def parts(self, rows: int = PART_ROWS) -> Iterator[ActivationDataset]:
        """All rows in order, `rows` of them at a time; no row group need fit into memory.

        Raises:
          ValueError: as `load_dataset`; or the rows are not in the order of the files.
        """
        left, held = len(self), []
        activations_BD = np.empty((min(rows, left), self.width), np.float32)
        filled = 0
        for shard, table, vectors_BD in self._pieces(text_columns, vectors=True):
            start = 0
            while start < len(vectors_BD):
                count = min(len(activations_BD) - filled, len(vectors_BD) - start)
                # Each part is filled in place, so that it is the only copy of its rows.
                some_BD = activations_BD[filled : filled + count]
                with np.errstate(over="ignore"):
                    some_BD[:] = vectors_BD[start : start + count]
                check_activations(some_BD, shard.path)
                held.append(rows_of(table.slice(start, count), some_BD, shard.sidecar, shard.path))
                start, filled = start + count, filled + count
                if filled == len(activations_BD):
                    yield self._named(joined(held, activations_BD))
                    left, held, filled = left - filled, [], 0
                    activations_BD = np.empty((min(rows, left), self.width), np.float32)

    def _named(self, part: ActivationDataset) -> ActivationDataset:
        return dataclasses.replace(part, sidecar=dataclasses.replace(self.sidecar, row_count=len(part)))

    def scan(self, *names: str) -> Iterator[tuple[list, ...]]:
        """Columns of all rows in order, a few hundred rows at a time; the vectors are not read.

        Args:
          names: of the file's columns, or `explanation`; of a column that a shard lacks, all rows are None.

        Returns:
          An iterator over a list for each name: documents as text, tokens as whole numbers, and the others as they are
          in the file.

        Raises:
          ValueError: the rows are not in the order of the files.
        """
        texts = ("api_explanation", "prompt", "response")

        def physical(shard: Shard) -> list[str]:
            # A table without a column would not know how many rows it has.
            wanted = {"doc_id", *names, *(texts if "explanation" in names else ())}
            return [name for name in shard.names if name in wanted]

        for shard, table, _ in self._pieces(physical, vectors=False):
            columns = []
            for name in names:
                columns.append(_column(name, table, shard))
            yield tuple([None] * len(table) if column is None else column for column in columns)

    @property
    def doc_ids(self) -> list[str]:
        """The document of each row; all of them are read."""
        return [doc_id for (doc_ids,) in self.scan("doc_id") for doc_id in doc_ids]

    @functools.cached_property
    def holds_explanations(self) -> bool:
        """Whether there is a text for each row; where the stage need not have any, the first rows tell."""
        if self.sidecar.stage in ("av_sft", "ar_sft"):
            return True
        (texts,) = next(self.scan("explanation"), ([],))
        return any(text is not None for text in texts)

    def chunk_sizes(self, kept: Any = slice(None)) -> Int64[np.ndarray, "G"]:
        """How many of the rows (of those kept, in order) lie in each row group, groups without any left out.

        Raises:
          ValueError: the rows are not in the order of the files.
        """
        self._check_order()
        groups_N = np.searchsorted(self._groups.first_row_G, self._rows_N[kept], side="right")
        return np.unique(groups_N, return_counts=True)[1]

    def _shard_of(self, group: int) -> Shard:
        return self._groups.shard(self._groups.place_G[group][0])

    def _by_group(self, rows_B: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each row group that rows lie in: its number, the rows inside it, and their places among those asked."""
        group_B = np.searchsorted(self._groups.first_row_G, rows_B, side="right") - 1
        order_B = np.argsort(group_B, kind="stable")
        groups, starts = np.unique(group_B[order_B], return_index=True)
        if not len(groups):
            return
        for group, places in zip(groups.tolist(), np.split(order_B, starts[1:]), strict=True):
            yield group, rows_B[places] - self._groups.first_row_G[group], places

    def _check_order(self) -> None:
        if len(self) and (np.diff(self._rows_N) <= 0).any():
            raise ValueError("rows can be gone through only in the order of their files; take them in order")

    def _pieces(
        self, names: Callable[[Shard], Sequence[str]], *, vectors: bool
    ) -> Iterator[tuple[Shard, pa.Table, np.ndarray | None]]:
        """The rows of all shards in order, as `Shard.pieces`, without the rows that are not of this data set."""
        self._check_order()
        start = 0
        for number, listed in enumerate(self._groups.listed):
            ends = np.searchsorted(self._rows_N, [start, start + listed.rows])
            if ends[0] == ends[1]:
                start += listed.rows
                continue
            shard = self._groups._shard(number)
            for table, vectors_BD in shard.pieces(names(shard), vectors=vectors):
                rows = len(table) if vectors_BD is None else len(vectors_BD)
                first, last = np.searchsorted(self._rows_N, [start, start + rows])
                inside = self._rows_N[first:last] - start
                start += rows
                if len(inside):
                    yield shard, table.take(inside), None if vectors_BD is None else vectors_BD[inside]


def _column(name: str, table: pa.Table, shard: Shard) -> list | None:
    if name == "explanation":
        return explanations_of(table, shard.sidecar, shard.path)
    if name not in table.column_names:
        return None
    if name == "n_raw_tokens":
        return whole_numbers(table, name, shard.path).tolist()
    values = table[name].to_pylist()
    return [str(value) for value in values] if name == "doc_id" else values


def _as_float32(vectors_BD: np.ndarray) -> Float32[np.ndarray, "B D"]:
    with np.errstate(over="ignore"):
        return vectors_BD.astype(np.float32)
