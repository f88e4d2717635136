"""Data sets as one HTML file: what they hold in tables and plots, and some rows to read.

The file needs nothing but itself, as a run's report: plots are inline SVG, and its content policy forbids scripts and
requests. Whatever the data say is escaped. Same data, same file, byte for byte.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes

from nla_jax.data.splits import hash_fraction
from nla_jax.data.summary import ROWS_SHOWN, RowSample, Summary
from nla_jax.data.summary_tables import summary_tables
from nla_jax.evaluation.report_plots import COLORS, number, svg
from nla_jax.files import AnyPath, Place, as_path, write_text
from nla_jax.html import table as html_table

CONTEXT_SHOWN = 600
"""Characters from the end of a context that are shown."""
_BINS = 40


def write_data_page(
    path: Place, summaries: Sequence[Summary], *, title: str, writers: Mapping[str, Any] | None = None
) -> AnyPath:
    """Write a page about data sets that belong together.

    Args:
      path: the file; its folder is made if it is not there.
      summaries: of the data sets, in the order of the tables' lines.
      title: heading of the page.
      writers: the report of the writer of their texts, where there is one.

    Returns:
      The path.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number,
        as_html=lambda one: html_table(one.columns, one.lines),
        ending=lambda text: text if len(text) <= CONTEXT_SHOWN else f"… {text[-CONTEXT_SHOWN:]}",
    )
    page = environment.get_template("data_page.html").render(
        title=title,
        tables=summary_tables(summaries, writers),
        plots=[_plot(name, summaries, values_of) for name, values_of in _PLOTTED.items()],
        rows=shown_rows(summaries),
    )
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def shown_rows(summaries: Sequence[Summary]) -> list[RowSample]:
    """The rows of all data sets that are shown, those of each data set together; the same key chose each data set's."""
    rows = [row for one in summaries for row in one.samples]

    def key(row: RowSample) -> float:
        return hash_fraction(f"{row.dataset} {row.doc_id} {row.n_raw_tokens}", seed=0, purpose="inspect")

    chosen = {id(row) for row in sorted(rows, key=key)[:ROWS_SHOWN]}
    return [row for row in rows if id(row) in chosen]


_PLOTTED: dict[str, Callable[[Summary], np.ndarray]] = {
    "Norms of the activations": lambda one: one.norms,
    "Tokens of the contexts": lambda one: one.positions,
    "Words of the texts": lambda one: one.text_words,
}
"""Title of a plot -> the values whose distribution it shows."""


def _plot(name: str, summaries: Sequence[Summary], values_of: Callable[[Summary], np.ndarray]) -> str:
    return svg(name, (5.2, 2.9), _draw, name, {one.name: values_of(one) for one in summaries})


def _draw(ax: Axes, title: str, values: Mapping[str, np.ndarray]) -> None:
    """Draw the distribution of each data set's values as a line of shares, without the farthest hundredth."""
    filled = {name: of for name, of in values.items() if len(of)}
    if filled:
        low = min(float(of.min()) for of in filled.values())
        high = max(float(np.quantile(of, 0.99)) for of in filled.values())
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
        for index, (name, of) in enumerate(filled.items()):
            share = np.histogram(of, edges)[0] / len(of)
            ax.stairs(
                share,
                edges,
                label=name,
                color=COLORS[index % len(COLORS)],
                linestyle=("-", "--", ":")[index // len(COLORS) % 3],
            )
        ax.legend(fontsize=8)
    ax.set(title=title, ylabel="share of the rows")
