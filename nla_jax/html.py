"""Small pieces of HTML that notebooks and pages share: escaped text, tables, numbers and colours.

Everything here turns plain values into markup that is safe to show: whatever comes in as text is escaped. Styles stand
in attributes, because notebooks drop style sheets of outputs that they do not trust.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

BETTER, WORSE = "56, 132, 220", "226, 120, 36"
"""Red, green and blue of values above and below zero."""
STRONGEST = 0.75
"""Opacity at 1 and at -1, under which text stays readable on a light and on a dark ground."""
MARKED = "background-color: rgba(56, 132, 220, 0.3); border-radius: 3px; margin-right: 1px"
"""Style of a token that is chosen."""


def number(value: float | None, digits: int = 3) -> str:
    """A figure for a table, with a true minus sign; a dash where it is None or not a number."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def tint(value: float | None) -> str:
    """The CSS colour of a value from -1 to 1: clear at 0, blue above, orange below; transparent for None and NaN."""
    if value is None or math.isnan(value):
        return "transparent"
    opacity = STRONGEST * min(abs(value), 1)
    return f"rgba({BETTER if value >= 0 else WORSE}, {opacity:.3f})"


def pieces(text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[tuple[str, str]], str]:
    """Cut a text into what its tokens show.

    Args:
      text: the whole text.
      spans: start and end of each token in the text, in order. Several tokens of one character share its span.

    Returns:
      For each token the text before it that belongs to no token, and its own text, which is empty where an earlier
      token shows it; and the text after the last token. All of them in order give the text.
    """
    cut, at = [], 0
    for start, end in spans:
        start, end = max(start, at), max(end, at)
        if end == start:
            cut.append(("", ""))
            continue
        cut.append((text[at:start], text[start:end]))
        at = end
    return cut, text[at:]


def marked_text(text: str, spans: Sequence[tuple[int, int]], chosen: set[int]) -> Markup:
    """A text with its line breaks, in which the tokens with the chosen indices are marked."""
    cut, after = pieces(text, spans)
    parts = []
    for index, (before, own) in enumerate(cut):
        shown = Markup('<span style="{}">{}</span>').format(MARKED, own) if index in chosen else escape(own)
        parts.append(escape(before) + shown)
    return Markup(
        '<div style="white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6">{}</div>'
    ).format(Markup("").join(parts) + escape(after))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> Markup:
    """A table with a note under it. Numbers are aligned to the right; line breaks in cells are kept."""
    head = Markup("").join(Markup('<th style="text-align: left">{}</th>').format(name) for name in columns)
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(_cell(value) for value in row)) for row in rows
    )
    html = Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, body)
    return html + (Markup("<p>{}</p>").format(note) if note else Markup(""))


def _cell(value: object) -> Markup:
    is_number = isinstance(value, int | float) or value is None
    shown = number(value) if isinstance(value, float) or value is None else str(value)
    style = "text-align: right" if is_number else "text-align: left; white-space: pre-wrap"
    return Markup('<td style="{}">{}</td>').format(style, shown)
