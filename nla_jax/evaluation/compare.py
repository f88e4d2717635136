"""Two evaluated runs side by side, with paired intervals on the rows that they share."""

import dataclasses
from collections.abc import Iterator, Sequence

from nla_jax.evaluation.estimates import SAMPLES, Estimate
from nla_jax.evaluation.report import read_evaluation
from nla_jax.evaluation.tables import paired, read_ratios
from nla_jax.files import AnyPath


@dataclasses.dataclass(frozen=True)
class Difference:
    """One figure that two runs have, on the rows that both have, and the difference between the two."""

    suite: str
    table: str
    row: str
    figure: str
    first: Estimate
    other: Estimate
    difference: Estimate
    """Other minus first; documents are resampled for both at once."""

    @property
    def is_clear(self) -> bool:
        """Whether zero lies outside the interval of the difference."""
        return not self.difference.low <= 0 <= self.difference.high


def compare(first: AnyPath, other: AnyPath, *, samples: int = SAMPLES) -> Iterator[Difference]:
    """All figures that two evaluated run directories have in common, on the held-out rows that they share.

    Raises:
      FileNotFoundError: a run that was not evaluated.
      ValueError: runs without a common figure or row.
    """
    evaluations = [read_evaluation(directory) for directory in (first, other)]
    suites = [suite for suite in evaluations[0]["suites"] if suite in evaluations[1]["suites"]]
    any_shared = False
    for suite in suites:
        of_first, of_other = (
            read_ratios(directory / "evaluation" / f"{suite}.parquet") for directory in (first, other)
        )
        for key in of_first:
            both = paired(of_first[key], of_other[key]) if key in of_other else None
            if both is None or min(ratio.denominator_N.sum() for ratio in both) <= 0:
                continue
            first_ratio, other_ratio = both
            if len(set(first_ratio.doc_ids)) < 2:
                continue
            any_shared = True
            table, row, figure = key
            yield Difference(
                suite=suite,
                table=table,
                row=row,
                figure=figure,
                first=first_ratio.estimate(samples=samples),
                other=other_ratio.estimate(samples=samples),
                difference=other_ratio.over(first_ratio, samples=samples),
            )
    if not any_shared:
        rows = [evaluation["run"].get("held-out rows") for evaluation in evaluations]
        raise ValueError(
            f"{first} and {other} share no figure of the same held-out rows (suites in both: "
            f"{', '.join(suites) or 'none'}; data {rows[0]} and {rows[1]}); evaluate both on the same data with the "
            "same suites"
        )


def rendered(differences: Sequence[Difference], names: tuple[str, str]) -> str:
    """A table for a terminal; a star marks differences whose interval does not contain zero."""
    lines, heading = [], None
    width = max((len(f"{d.row}: {d.figure}") for d in differences), default=0)
    for d in differences:
        if heading != (heading := (d.suite, d.table)):
            title = f"{'':{width}} {names[0]:>10.10} {names[1]:>10.10}  difference"
            lines += ["", f"{d.suite}: {d.table}", title]
        name = f"{d.row}: {d.figure}"
        change = d.difference
        lines.append(
            f"{name:{width}} {d.first.value:10.3f} {d.other.value:10.3f}  {change.value:+.3f} "
            f"[{change.low:+.3f}, {change.high:+.3f}]{' *' if d.is_clear else ''}"
        )
    return "\n".join(lines).lstrip("\n")
