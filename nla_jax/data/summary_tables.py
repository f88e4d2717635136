"""The tables of `nla data inspect`: what the summaries of data sets say, beside each other."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nla_jax.data.summary import COUNTED, LANGUAGE_DOCUMENTS, Summary

VALUES_SHOWN = 12
"""Values of a column that are counted by name; the rarer ones are counted together."""
NORM_QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
"""Shares of the rows whose norm is below the values in the table."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Lines of a summary."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str | int | float, ...], ...]
    note: str = ""


def summary_tables(summaries: Sequence[Summary], writers: Mapping[str, Any] | None = None) -> list[Table]:
    """All that is printed of data sets and shown on their page, but the rows themselves.

    Args:
      summaries: of data sets that belong together, such as the splits of a run.
      writers: the report of the writer of their texts (`Writer.report`), where there is one.
    """
    tables = [_overview(summaries), _norms(summaries), _lengths(summaries), *_values(summaries)]
    tables += [_variance(summaries), _languages(summaries), _overlaps(summaries), _texts(summaries)]
    if writers is not None:
        lines = tuple((str(name), _plain(value)) for name, value in writers.items() if name != "refused")
        lines += tuple((f"refused: {reason}", count) for reason, count in writers.get("refused", {}).items())
        tables.append(Table("Writer of the texts", ("", "what it reports"), lines))
    return [table for table in tables if table.lines]


def _overview(summaries: Sequence[Summary]) -> Table:
    lines = tuple(
        (
            one.name,
            one.sidecar.stage,
            one.rows,
            len(one.documents),
            one.sidecar.extraction.layer_index,
            one.sidecar.extraction.d_model,
            one.sidecar.storage,
            one.with_text,
        )
        for one in summaries
    )
    about = summaries[0].sidecar.extraction
    columns = ("data set", "stage", "rows", "documents", "layer", "d_model", "stored as", "rows with a text")
    return Table("Data sets", columns, lines, f"Activations of {about.base_model}, read from {about.corpus}.")


def _norms(summaries: Sequence[Summary]) -> Table:
    lines = []
    for one in summaries:
        if one.rows:
            quantiles = np.quantile(one.norms, NORM_QUANTILES).tolist()
            zeros = int((one.norms == 0).sum())
            lines.append((one.name, one.sidecar.extraction.layer_index, *quantiles, zeros))
    names = tuple(f"{share:.0%}" for share in NORM_QUANTILES)
    return Table(
        "Norms of the activations",
        ("data set", "layer", *names, "zeros"),
        tuple(lines),
        "Share of the rows with a smaller norm. The value at 75% is a good injection scale (injection.scale).",
    )


def _lengths(summaries: Sequence[Summary]) -> Table:
    kinds = (
        ("context, tokens", lambda one: one.positions),
        ("context, characters", lambda one: one.context_characters),
        ("text, words", lambda one: one.text_words),
    )
    lines = []
    for what, values_of in kinds:
        for one in summaries:
            if len(values := values_of(one)):
                few, half, many = np.quantile(values, (0.05, 0.5, 0.95)).tolist()
                lines.append((what, one.name, int(values.min()), few, half, many, int(values.max())))
    columns = ("length", "data set", "shortest", "5%", "median", "95%", "longest")
    return Table("Lengths of contexts and texts", columns, tuple(lines))


def _values(summaries: Sequence[Summary]) -> list[Table]:
    tables = []
    for column in COUNTED:
        total = sum((one.counts.get(column, Counter()) for one in summaries), Counter())
        if set(total) <= {"none"}:
            continue
        shown = [value for value, _ in total.most_common(VALUES_SHOWN)]
        counted = [one.counts.get(column, Counter()) for one in summaries]
        lines = [(value, *(_share(count[value], count) for count in counted)) for value in shown]
        if others := len(total) - len(shown):
            left = [count.total() - sum(count[value] for value in shown) for count in counted]
            lines.append((f"{others} others", *map(_share, left, counted)))
        names = tuple(one.name for one in summaries)
        tables.append(Table(f"Rows by {column}", (column, *names), tuple(lines)))
    return tables


def _share(count: int, counted: Counter[str]) -> str:
    """A number of rows, with its share of those that were counted."""
    return f"{count} ({count / counted.total():.1%})" if count else "0"


def _variance(summaries: Sequence[Summary]) -> Table:
    lines = tuple(
        (
            one.name,
            share.by,
            share.groups,
            share.rows,
            share.held_in,
            "not known" if share.corrected is None else share.corrected,
        )
        for one in summaries
        for share in one.variance
    )
    note = (
        "Share of the variance of the normalized activations that lies between groups, which is what a lookup by the "
        "group explains: of these rows themselves, where small groups count as explained by chance alone, and "
        "corrected for that (adjusted R²). What is left lies within documents, or among contexts of the same tokens."
    )
    columns = ("data set", "grouped by", "groups", "rows", "of these rows", "corrected")
    return Table("Shares of variance", columns, lines, note)


def _languages(summaries: Sequence[Summary]) -> Table:
    title, names = "Languages", tuple(one.name for one in summaries)
    if any(one.languages is None for one in summaries):
        return Table(title, ("",), (("not told: run `pip install py3langid`",),))
    total = sum((one.languages for one in summaries), Counter())
    lines = tuple(
        (language, *(one.languages[language] for one in summaries))
        for language, _ in total.most_common(VALUES_SHOWN)
    )
    note = f"Documents, of at most {LANGUAGE_DOCUMENTS} of each data set, by the first of their contexts."
    return Table(title, ("language", *names), lines, note)


def _overlaps(summaries: Sequence[Summary]) -> Table:
    lines = []
    for index, one in enumerate(summaries):
        for other in summaries[index + 1 :]:
            if one.sidecar.extraction.layer_index != other.sidecar.extraction.layer_index:
                continue  # The same documents at another layer are meant to be the same.
            documents = len(np.intersect1d(one.documents, other.documents, assume_unique=True))
            starts = len(np.intersect1d(one.starts, other.starts, assume_unique=True))
            texts = len(np.intersect1d(one.texts, other.texts, assume_unique=True))
            lines.append((f"{one.name} and {other.name}", documents, starts, texts))
    note = (
        "What two data sets have in common. Documents that begin with the same 160 characters are often copies of each "
        "other; held-out documents may be in no other split."
    )
    columns = ("data sets", "documents", "beginnings of contexts", "texts")
    return Table("Overlaps", columns, tuple(lines), note)


def _texts(summaries: Sequence[Summary]) -> Table:
    lines = []
    for one in summaries:
        if one.with_text:
            text, count = one.commonest[0] if one.commonest else ("", 1)
            share = one.with_text / one.rows
            lines.append((one.name, share, len(one.texts), one.with_text - len(one.texts), count, text[:80]))
    columns = ("data set", "rows with a text", "different", "repetitions", "rows of the commonest", "it is")
    return Table("Texts", columns, tuple(lines), "A text that many rows have says little about each of them.")


def _plain(value: Any) -> str | int | float:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return value if isinstance(value, int | float) else str(value)
