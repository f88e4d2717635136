"""Tables of an evaluation: what a suite returns, what is written, and what a report or a comparison reads back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_jax.evaluation.estimates import Estimate, Ratio
from nla_jax.files import AnyPath, local_copy, write_atomically

Figure = Ratio | Estimate | None

PLACE_MEAN = "mean of the same place"
LAST_TOKEN = "mean of the same last token"
LAST_TWO = "mean of the same last two tokens"
NEAREST = "nearest training activation"
LOOKUPS = (LAST_TOKEN, LAST_TWO, NEAREST)
"""Names of the lookups that an NLA has to beat: those of what stands last, and the one that sees the activation."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    figures: Mapping[str, Figure]
    """The figure in each column; a `Ratio` can be compared with another run's, row by row. None is undefined."""
    group: str = "nla"
    """The kind of line: "nla", "gold" (texts or figures that see the context), "control" or "baseline"."""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further values that tell the line apart, such as the AR that measured it."""
    ids: Sequence[str] | None = None
    """Names of the held-out rows behind the entries of each ratio; equal across runs on the same data."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Figures with a heading and a reading aid."""

    name: str
    title: str
    note: str
    rows: Sequence[Row]
    plotted: str | None = None
    """The column that a report draws as bars."""

    def record(self, samples: int) -> dict[str, Any]:
        """The table as plain values for JSON, with intervals from `samples` resamples."""

        def estimate(figure: Figure) -> dict[str, Any] | None:
            if isinstance(figure, Ratio):
                figure = figure.estimate(samples=samples)
            return figure and dataclasses.asdict(figure)

        rows = [
            {
                "name": row.name,
                "group": row.group,
                "labels": dict(row.labels),
                "figures": {name: estimate(figure) for name, figure in row.figures.items()},
            }
            for row in self.rows
        ]
        return {
            "name": self.name,
            "title": self.title,
            "note": self.note,
            "plotted": self.plotted,
            "rows": rows,
        }


_COLUMNS = ("table", "row", "figure", "id", "doc_id", "numerator", "denominator")


def write_ratios(tables: Sequence[Table], path: AnyPath) -> None:
    """Write every entry of every ratio whose row has ids as parquet, for paired comparisons."""
    columns: dict[str, list] = {name: [] for name in _COLUMNS}
    for table in tables:
        for row in table.rows:
            for name, figure in row.figures.items():
                if not isinstance(figure, Ratio) or row.ids is None:
                    continue
                entries = len(row.ids)
                added = {
                    "table": [table.name] * entries,
                    "row": [row_key(row.name, row.labels)] * entries,
                    "figure": [name] * entries,
                    "id": row.ids,
                    "doc_id": figure.doc_ids,
                    "numerator": figure.numerator_N,
                    "denominator": figure.denominator_N,
                }
                for column, values in added.items():
                    columns[column].extend(values)
    with write_atomically(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def read_ratios(path: AnyPath) -> dict[tuple[str, str, str], tuple[list[str], Ratio]]:
    """Read what `write_ratios` wrote: (table, row, figure) -> ids and ratio."""
    with local_copy(path) as file:
        columns = pq.read_table(file).to_pydict()
    lines_of: dict[tuple[str, str, str], list[int]] = {}
    for line, key in enumerate(zip(columns["table"], columns["row"], columns["figure"], strict=True)):
        lines_of.setdefault(key, []).append(line)

    def pick(name: str, lines: list[int]) -> list:
        return [columns[name][line] for line in lines]

    return {
        key: (
            pick("id", lines),
            Ratio.of(pick("numerator", lines), pick("denominator", lines), pick("doc_id", lines)),
        )
        for key, lines in lines_of.items()
    }


def row_key(name: str, labels: Mapping[str, str]) -> str:
    """The name of a line in its table: its own name and its labels."""
    return ", ".join([name, *(f"{label} {value}" for label, value in labels.items())])


def paired(
    first: tuple[Sequence[str], Ratio], other: tuple[Sequence[str], Ratio]
) -> tuple[Ratio, Ratio] | None:
    """Two ratios on the rows that both have, in one order; None if they share none."""
    place = [{id_: index for index, id_ in enumerate(ids)} for ids, _ in (first, other)]
    shared = [id_ for id_ in first[0] if id_ in place[1]]
    if not shared:
        return None
    rows = [np.array([where[id_] for id_ in shared]) for where in place]
    return tuple(
        Ratio(ratio.numerator_N[at], ratio.denominator_N[at], tuple(ratio.doc_ids[i] for i in at))
        for (_, ratio), at in zip((first, other), rows, strict=True)
    )
