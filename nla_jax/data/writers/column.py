"""The writer that writes nothing: texts that the data brings in a column of its own."""

import dataclasses
from typing import Any

from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.stage_texts import holds_a_tag
from nla_jax.data.writers.reports import Tally


@dataclasses.dataclass(frozen=True)
class ColumnConfig:
    """The column that holds the texts."""

    name: str = "api_explanation"
    """Name of the column of the rows; a row whose text is null or blank is left out."""


class ColumnWriter:
    """A writer that reads the texts of rows from one of their columns."""

    def __init__(self, config: ColumnConfig):
        """Take the name of the column."""
        self.config = config
        self.tally = Tally()

    def explain(self, rows: ActivationDataset) -> list[str | None]:
        """The text of each row without blanks around it; None where it is null, blank or holds an explanation tag.

        Raises:
          ValueError: the rows have no such column, or it holds something else than texts.
        """
        name, columns = self.config.name, dict(rows.extra)
        if rows.explanations is not None:
            columns["api_explanation"] = rows.explanations
        if name not in columns:
            raise ValueError(
                f"there is no column {name!r} with texts; the rows have {', '.join(sorted(columns)) or 'none'}: name "
                "the one that holds them with writer.column.name"
            )
        texts = [self._text(value, row) for row, value in enumerate(columns[name])]
        self.tally.count(texts)
        return texts

    def _text(self, value: Any, row: int) -> str | None:
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"the column {self.config.name!r} holds {str(value)[:80]!r} of type {type(value).__name__} in row "
                f"{row}, expected a text; name another column with writer.column.name"
            )
        text = (value or "").strip()
        if not text or holds_a_tag(text):
            self.tally.refused["an explanation tag in the text" if text else "no text in the column"] += 1
            return None
        return text

    def prompts(self, rows: ActivationDataset) -> None:
        """None: no model is asked."""

    def about(self) -> dict[str, Any]:
        """Who writes: this writer, and the column that it reads."""
        return {"writer": "column", "column": self.config.name}

    def report(self) -> dict[str, Any]:
        """How many rows had a text."""
        return self.tally.report(**self.about())
