"""Explained texts as one HTML file: the tokens coloured by how much their explanations carry, the explanations beside.

The file needs nothing but itself: its content policy forbids requests and any script but the one in it, known by its
hash. Whatever a text, a token or a model says is escaped. Without the script every text is shown, and a token is a link
to its explanations. Same input, same file, byte for byte.
"""

import base64
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import jinja2
from markupsafe import Markup, escape

from nla_jax.autoencoder.results import NOT_CLOSED, ExplainedRow
from nla_jax.files import AnyPath, Place, as_path, write_text
from nla_jax.html import number, pieces, tint
from nla_jax.lm.activations import Activations
from nla_jax.lm.tokenized import TokenizedText

FVE_SHOWN = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0)
COSINES_SHOWN = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Values whose colours the legend shows."""
NAME_SHOWN = 70
"""Characters of a text that stand for it in the list of texts."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """One text, and the explanations of some of its tokens."""

    source: TokenizedText | Activations
    """The whole text; of activations, the text that they are of."""
    rows: Sequence[ExplainedRow]
    """From `Explanations.rows(scores)`, in any order; rows of the same position are samples of one token."""
    min_position: int | None = None
    """The first position that the NLA was trained at; earlier tokens are marked."""
    measured_against: str = ""
    """`Scores.measured_against`, for the legend."""
    name: str = ""
    """What the text is called in the list of texts; the text's beginning if empty."""

    @property
    def text(self) -> TokenizedText:
        """The whole text."""
        return self.source.source if isinstance(self.source, Activations) else self.source

    @property
    def by_position(self) -> dict[int, list[ExplainedRow]]:
        """The explanations of each explained token, in the order of the text.

        Raises:
          ValueError: a row without a position, or with one outside the text.
        """
        grouped: dict[int, list[ExplainedRow]] = {}
        for row in sorted(self.rows, key=lambda row: -1 if row.position is None else row.position):
            if row.position is None or not 0 <= row.position < len(self.text):
                raise ValueError(
                    f"an explanation of {row.label} has no place in a text of {len(self.text)} tokens; give the rows "
                    "of explanations of this text's activations"
                )
            grouped.setdefault(row.position, []).append(row)
        return grouped


def write_page(
    path: Place, readings: Sequence[Reading], *, title: str = "Explanations", about: str = ""
) -> AnyPath:
    """Write a page of explained texts, which is read in any browser, from disk and without a network.

    Args:
      path: the file; its folder is made if it is not there.
      readings: the texts in the order of the list to choose from.
      title: heading of the page.
      about: a sentence under the heading, such as `nla.description`.

    Returns:
      The path.

    Raises:
      ValueError: no texts, or an explanation that has no place in its text.
    """
    if not readings:
        raise ValueError("there are no texts to show; give at least one Reading")
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, tint=tint, lines=_with_line_ends)
    script = (folder / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    figure = _figure(readings)
    page = environment.get_template("page.html").render(
        title=title,
        about=about,
        figure=figure,
        swatches=[(value, _colour(value, figure)) for value in _shown(figure)],
        against=list(dict.fromkeys(r.measured_against for r in readings if r.measured_against)),
        firsts=sorted({r.min_position for r in readings if r.min_position}),
        sampled=any(len(rows) > 1 for reading in readings for rows in reading.by_position.values()),
        texts=[_text(f"t{index}", reading, figure) for index, reading in enumerate(readings)],
        not_closed=NOT_CLOSED,
        script=Markup(script),
        digest=digest,
    )
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def _figure(readings: Sequence[Reading]) -> str | None:
    """What tokens are coloured by: fve_nrm where any row has it, else cosine, else nothing."""
    rows = [row for reading in readings for row in reading.rows]
    return next((name for name in ("fve_nrm", "cosine") if any(_known([row], name) for row in rows)), None)


def _known(rows: Sequence[ExplainedRow], figure: str | None) -> list[float]:
    values = [None if figure is None else getattr(row, figure) for row in rows]
    return [value for value in values if value is not None and not math.isnan(value)]


def _mean(rows: Sequence[ExplainedRow], figure: str | None) -> float | None:
    values = _known(rows, figure)
    return fmean(values) if values else None


def _shown(figure: str | None) -> tuple[float, ...]:
    return {"fve_nrm": FVE_SHOWN, "cosine": COSINES_SHOWN}.get(figure or "", ())


def _colour(value: float | None, figure: str | None) -> str:
    """The colour of a token; cosines below 0.5, which even an empty text may reach, have none."""
    if value is not None and figure == "cosine":
        value = max(2 * value - 1, 0.0)
    return tint(value)


@dataclasses.dataclass(frozen=True)
class _Token:
    """A token as the page shows it."""

    id: str
    before: str
    shown: str
    label: str
    """Position and token, for a heading."""
    role: str | None
    is_early: bool
    in_template: bool
    """Whether it is part of what a chat template writes around the messages."""
    rows: Sequence[ExplainedRow]
    mean: float | None
    colour: str


@dataclasses.dataclass(frozen=True)
class _Text:
    """A text as the page shows it."""

    id: str
    name: str
    reading: Reading
    turns: Sequence[tuple[str | None, Sequence[_Token]]]
    """Role and tokens of every turn; plain text is one turn without a role."""
    after: str
    mean: float | None

    @property
    def explained(self) -> list[_Token]:
        """The tokens that have explanations."""
        return [token for _, tokens in self.turns for token in tokens if token.rows]


def _text(identity: str, reading: Reading, figure: str | None) -> _Text:
    source = reading.text
    tokens, after = _tokens(identity, reading, figure)
    turns = [
        (source.roles[positions[0]], [tokens[position] for position in positions])
        for positions in _turns(source)
    ]
    name = _name(reading)
    return _Text(identity, name, reading, turns, after, _mean(reading.rows, figure))


def _name(reading: Reading) -> str:
    """The name of a text, or how it begins; of a conversation, how what was said in it begins."""
    source = reading.text
    said = " ".join(
        source.text[source.spans[positions[0]][0] : source.spans[positions[-1]][1]]
        for turn in _turns(source)
        if (positions := [position for position in turn if source.in_content[position]])
    )
    name = " ".join((reading.name or said or source.text).split())
    return name if len(name) <= NAME_SHOWN else f"{name[: NAME_SHOWN - 1]}…"


def _turns(source: TokenizedText) -> Iterator[list[int]]:
    """The positions of each turn."""
    for _, positions in itertools.groupby(range(len(source)), key=source.turns.__getitem__):
        yield list(positions)


def _tokens(identity: str, reading: Reading, figure: str | None) -> tuple[list[_Token], str]:
    source, explained = reading.text, reading.by_position
    cut, after = pieces(source.text, source.spans)
    tokens = []
    for position, (before, own) in enumerate(cut):
        token, rows = source.tokens[position], explained.get(position, [])
        mean = _mean(rows, figure)
        # A BOS that is not in the text is shown by its name; a further token of one character by a box.
        name = token if position == 0 and source.starts_with_bos else "▯"
        tokens.append(
            _Token(
                id=f"{identity}p{position}",
                before=before,
                shown=own or name,
                label=f"{position} {token!r}",
                role=source.roles[position],
                is_early=reading.min_position is not None and position < reading.min_position,
                in_template=source.turns[position] is not None and not source.in_content[position],
                rows=rows,
                mean=mean,
                colour=_colour(mean, figure),
            )
        )
    return tokens, after


def _with_line_ends(text: str) -> Markup:
    """Escaped text in which the end of a line can be seen, and clicked where it is a token of its own."""
    return escape(text).replace("\n", Markup('<i class="end"></i>\n'))
