"""What an NLA returns: explanations that know their tokens, and scores that say what they are measured against.

Shape letters: N rows, one an explanation; several samples of one activation are adjacent rows.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nla_jax.html import table
from nla_jax.lm.activations import Activations

ROWS_SHOWN = 200
"""Explanations that a notebook shows, at most."""


@dataclasses.dataclass(frozen=True, eq=False)
class Explanations(Sequence):
    """A sequence of texts, None where the AV never closed its answer."""

    texts: tuple[str | None, ...]
    samples: int = 1
    """Explanations of each activation."""
    activations: Activations | None = None
    """The activations that are explained, one for each `samples` texts; None where plain vectors were given."""

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int | slice) -> str | tuple[str | None, ...] | None:
        return self.texts[index]

    def __iter__(self) -> Iterator[str | None]:
        return iter(self.texts)

    def __repr__(self) -> str:
        return "\n".join(f"{row.label}: {row.text or NOT_CLOSED}" for row in self.rows())

    def _repr_html_(self) -> str:
        """For notebooks: a table of the explanations with their tokens."""
        rows = self.rows()[:ROWS_SHOWN]
        columns = ["position", "token", "explanation"]
        cells = [[row.position, repr(row.token), row.text or NOT_CLOSED] for row in rows]
        if self.activations is None:
            columns, cells = ["row", "explanation"], [[row.row, row.text or NOT_CLOSED] for row in rows]
        if self.samples > 1:
            columns.insert(-1, "sample")
            for row, own in zip(rows, cells, strict=True):
                own.insert(-1, row.sample)
        left = len(self) - len(rows)
        return table(columns, cells, f"and {left} more" if left else "")

    def rows(self, scores: "Scores | None" = None) -> list["ExplainedRow"]:
        """One record an explanation, with its scores where they are given."""
        return [self._row(index, scores) for index in range(len(self))]

    def _row(self, index: int, scores: "Scores | None") -> "ExplainedRow":
        row, sample = divmod(index, self.samples)
        place: dict[str, Any] = {}
        if self.activations is not None:
            source, position = self.activations.source, self.activations.positions[row]
            place = {
                "position": position,
                "token": source.tokens[position],
                "role": source.roles[position],
                "span": source.spans[position],
                "positions": len(source),
            }
        if scores is not None:
            place |= {
                "cosine": float(scores.cosine_N[index]),
                "fve_nrm": None if scores.fve_nrm_N is None else float(scores.fve_nrm_N[index]),
                "judges": {
                    name: {
                        "cosine": float(judge.cosine_N[index]),
                        "fve_nrm": None if judge.fve_nrm_N is None else float(judge.fve_nrm_N[index]),
                    }
                    for name, judge in scores.judges.items()
                },
            }
        return ExplainedRow(self.texts[index], row=row, sample=sample, **place)


NOT_CLOSED = "(no closed explanation)"


@dataclasses.dataclass(frozen=True)
class ExplainedRow:
    """One explanation of one activation, with all that is known of it."""

    text: str | None
    """None if the AV never closed its answer."""
    row: int
    """Index of the activation among those that were explained."""
    sample: int = 0
    position: int | None = None
    """Index of the token in its text; None for a plain vector."""
    token: str | None = None
    role: str | None = None
    span: tuple[int, int] | None = None
    """Characters of the token in its text."""
    positions: int | None = None
    """Tokens of the whole text."""
    cosine: float | None = None
    """Between the activation and what the AR rebuilds from the text."""
    fve_nrm: float | None = None
    """See `Scores.fve_nrm_N`."""
    judges: Mapping[str, Mapping[str, float | None]] = dataclasses.field(default_factory=dict)
    """The same two by the name of a judge."""

    @property
    def label(self) -> str:
        """Position and token, or the row's number."""
        return f"row {self.row}" if self.position is None else f"{self.position} {self.token!r}"

    def record(self) -> dict[str, Any]:
        """A plain dictionary, for JSON, without what is not known."""
        fields = dataclasses.asdict(self)
        known = {name: value for name, value in fields.items() if value not in (None, {})}
        known.pop("text", None)
        return {**known, "explanation": self.text}


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """How well an AR rebuilds activations from explanations, row by row."""

    cosine_N: Float[np.ndarray, "N"]
    """Cosine of the activation and its reconstruction; NaN for a failed text where there is no training mean."""
    mse_nrm_N: Float[np.ndarray, "N"]
    """Direction MSE, `2(1 − cos)`, from 0 to 4."""
    fve_nrm_N: Float[np.ndarray, "N"] | None
    """`1 − mse_n / spread`: each row's error against the average spread of the training activations. None where the
    NLA came without a training mean."""
    fve_nrm: float | None
    """Fraction of variance explained of all rows together, `metrics.fve_nrm`; None likewise."""
    measured_against: str
    """Which mean and spread the fve refers to."""
    judges: Mapping[str, "Scores"] = dataclasses.field(default_factory=dict)
    """The same through other ARs, which never saw the AV's texts from joint training."""

    def __repr__(self) -> str:
        fve = "not known" if self.fve_nrm is None else f"{self.fve_nrm:.3f}"
        own = f"cosine {np.mean(self.cosine_N):.3f}, fve_nrm {fve} over {len(self.cosine_N)} rows"
        lines = [f"own AR: {own} ({self.measured_against})"]
        lines += [f"{name}: {judge!r}".replace("own AR: ", "") for name, judge in self.judges.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For notebooks: a line for each AR."""
        columns = ("AR", "rows", "mean cosine", "mean fve_nrm", "fve_nrm of all rows together")
        lines = [("own", self), *self.judges.items()]
        cells = [
            (
                name,
                len(scores.cosine_N),
                float(np.mean(scores.cosine_N)),
                None if scores.fve_nrm_N is None else float(np.mean(scores.fve_nrm_N)),
                scores.fve_nrm,
            )
            for name, scores in lines
        ]
        return table(columns, cells, self.measured_against)
