"""Tables of an evaluation: what a suite returns, what is written, and what a report or a comparison reads back."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_jax.evaluation.estimates import Estimate, Ratio

Figure = Ratio | Estimate | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    figures: Mapping[str, Figure]
    """By column; a `Ratio` can be compared with another run's, row by row. None where it is not defined."""
    group: str = "nla"
    """What kind of line it is: "nla", "gold" (texts or figures that see the context), or "control"."""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What else tells it apart, such as the AR that measured it."""
    ids: Sequence[str] | None = None
    """Of what its ratios have an entry for each, the same in every run on the same data."""


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
        """As JSON, with intervals from so many resamples."""

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


def write_ratios(tables: Sequence[Table], path: Path) -> None:
    """Write what each row of every ratio with ids adds, for paired comparisons, as parquet."""
    columns: dict[str, list] = {name: [] for name in _COLUMNS}
    for table in tables:
        for row in table.rows:
            for name, figure in row.figures.items():
                if not isinstance(figure, Ratio) or row.ids is None:
                    continue
                n = len(row.ids)
                for column, values in zip(
                    _COLUMNS,
                    (
                        *([value] * n for value in (table.name, row_key(row.name, row.labels), name)),
                        *(row.ids, figure.doc_ids, figure.numerator_N, figure.denominator_N),
                    ),
                    strict=True,
                ):
                    columns[column].extend(values)
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.table(columns), temporary, compression="zstd")
    temporary.replace(path)


def read_ratios(path: Path) -> dict[tuple[str, str, str], tuple[list[str], Ratio]]:
    """(table, row, figure) -> ids and ratio, as `write_ratios` wrote them."""
    columns = pq.read_table(path).to_pydict()
    found: dict[tuple[str, str, str], list[int]] = {}
    for index, key in enumerate(zip(columns["table"], columns["row"], columns["figure"], strict=True)):
        found.setdefault(key, []).append(index)

    def pick(name: str, rows: list[int]) -> list:
        return [columns[name][row] for row in rows]

    return {
        key: (
            pick("id", rows),
            Ratio.of(pick("numerator", rows), pick("denominator", rows), pick("doc_id", rows)),
        )
        for key, rows in found.items()
    }


def row_key(name: str, labels: Mapping[str, str]) -> str:
    """What names a line in its table."""
    return ", ".join([name, *(f"{label} {value}" for label, value in labels.items())])


def paired(
    ours: tuple[Sequence[str], Ratio], theirs: tuple[Sequence[str], Ratio]
) -> tuple[Ratio, Ratio] | None:
    """Two ratios on the rows that both have, in one order; None if they share none."""
    place = [{id_: index for index, id_ in enumerate(ids)} for ids, _ in (ours, theirs)]
    shared = [id_ for id_ in ours[0] if id_ in place[1]]
    if not shared:
        return None
    rows = [np.array([where[id_] for id_ in shared]) for where in place]
    return tuple(
        Ratio(ratio.numerator_N[at], ratio.denominator_N[at], tuple(ratio.doc_ids[i] for i in at))
        for (_, ratio), at in zip((ours, theirs), rows, strict=True)
    )
