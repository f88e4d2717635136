"""What a writer of warm-start texts reports: how many rows have a text, and why others have none."""

from collections import Counter
from collections.abc import Sequence
from typing import Any


class Tally:
    """Counts of the rows that a writer has seen."""

    def __init__(self):
        """Begin with no rows."""
        self.rows = self.written = self.asked_again = 0
        self.refused: Counter[str] = Counter()

    def count(self, texts: Sequence[str | None]) -> None:
        """Count rows by their texts; a row whose text is None is left out."""
        self.rows += len(texts)
        self.written += sum(text is not None for text in texts)

    def report(self, **about: Any) -> dict[str, Any]:
        """The counts, after what `about` says of the writer; reasons for missing texts have the commonest first."""
        return {
            **about,
            "rows": self.rows,
            "written": self.written,
            "left_out": self.rows - self.written,
            "asked_again": self.asked_again,
            "refused": dict((+self.refused).most_common()),
        }


def joined(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of several parts of the same rows' texts: numbers are added, and what is said of the writer stays.

    Raises:
      ValueError: the parts were written by different writers; the message names what differs.
    """
    total: dict[str, Any] = {}
    for report in reports:
        for name, value in report.items():
            if isinstance(value, int):
                total[name] = total.get(name, 0) + value
            elif name == "refused":
                total[name] = dict((Counter(total.get(name, {})) + Counter(value)).most_common())
            elif total.setdefault(name, value) != value:
                raise ValueError(
                    f"the texts of some rows have the {name} {total[name]!r}, and those of others {value!r}; write all "
                    "of them anew, or bring the first one back"
                )
    return total


def since(report: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A report of the rows that a writer has seen since an earlier report, whose numbers are taken away."""
    added: dict[str, Any] = {}
    for name, value in report.items():
        if isinstance(value, int):
            added[name] = value - before[name]
        elif name == "refused":
            added[name] = dict((Counter(value) - Counter(before[name])).most_common())
        else:
            added[name] = value
    return added
