"""Figures with intervals: ratios of sums over rows, and intervals from resampling whole documents.

Activations of one document are alike, so rows are never resampled on their own: intervals would be too narrow.
Everything here is numpy, for finished runs. Shape letters: N rows, S resamples, C columns, D documents.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt16

from nla_jax.data.splits import numbered

SAMPLES = 2000
"""Default number of resamples of an interval."""
LEVEL = 0.95
"""Coverage of an interval."""
COUNTS_AT_ONCE = 1 << 22
"""Most counts of documents in draws that are expanded to float64 together."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with everything that must be reported with it."""

    value: float
    low: float
    high: float
    """Ends of the 95% interval by bootstrap over documents."""
    n: int
    """Number of rows (activations, unless the table says otherwise)."""
    documents: int
    """Number of documents they come from: the units that the bootstrap resamples."""
    denominator: float
    """Mean of the figure's denominator over rows: for an FVE, the variance around the training mean, per coordinate."""


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A figure `Σ numerator / Σ denominator`, kept as its terms row by row, so that it can be resampled and paired."""

    numerator_N: Float[np.ndarray, "N"]
    denominator_N: Float[np.ndarray, "N"]
    doc_ids: tuple[str, ...]

    def __post_init__(self):
        if not len(self.numerator_N) == len(self.denominator_N) == len(self.doc_ids):
            raise ValueError(
                f"{len(self.numerator_N)} numerators, {len(self.denominator_N)} denominators and "
                f"{len(self.doc_ids)} document ids: expected one of each per row"
            )

    @classmethod
    def of(cls, numerator_N, denominator_N, doc_ids: Sequence[str] | np.ndarray) -> "Ratio":
        """A ratio from anything that numpy can turn into arrays."""
        return cls(np.asarray(numerator_N, np.float64), np.asarray(denominator_N, np.float64), tuple(doc_ids))

    @classmethod
    def mean(cls, values_N, doc_ids: Sequence[str] | np.ndarray) -> "Ratio":
        """The mean of one value a row."""
        values_N = np.asarray(values_N, np.float64)
        return cls(values_N, np.ones(len(values_N)), tuple(doc_ids))

    @classmethod
    def explained(cls, error_N, variance_N, doc_ids: Sequence[str] | np.ndarray) -> "Ratio":
        """An FVE from `fve_terms` or `fve_nrm_terms`: `1 − Σ error / Σ variance`."""
        variance_N = np.asarray(variance_N, np.float64)
        return cls(variance_N - np.asarray(error_N, np.float64), variance_N, tuple(doc_ids))

    def take(self, rows: Sequence[int] | np.ndarray) -> "Ratio":
        """The same figure of some of the rows, by their indices."""
        doc_ids = tuple(self.doc_ids[row] for row in rows)
        return Ratio(self.numerator_N[rows], self.denominator_N[rows], doc_ids)

    def estimate(self, *, seed: int = 0, samples: int = SAMPLES, level: float = LEVEL) -> Estimate:
        """The figure and its percentile interval; it depends on the seed and the set of rows, not on their order.

        Raises:
          ValueError: fewer than two documents, or nothing to divide by.
        """
        return _estimate(self.doc_ids, [self], seed, samples, level)

    def over(self, other: "Ratio", *, seed: int = 0, samples: int = SAMPLES) -> Estimate:
        """This figure minus another of the same rows, with the paired interval.

        Documents are resampled for both figures at once, so that the difficulty of a document cancels.

        Raises:
          ValueError: as `estimate`; or the two figures are of different rows.
        """
        if self.doc_ids != other.doc_ids:
            raise ValueError("a paired interval needs two figures of the same rows in the same order")
        return _estimate(self.doc_ids, [self, other], seed, samples, LEVEL)


def _estimate(
    doc_ids: Sequence[str] | np.ndarray, ratios: Sequence[Ratio], seed: int, samples: int, level: float
) -> Estimate:
    columns = [column for ratio in ratios for column in (ratio.numerator_N, ratio.denominator_N)]
    for total in (ratio.denominator_N.sum() for ratio in ratios):
        if not total > 0:
            raise ValueError(
                f"the denominator is {total}: a ratio needs something to divide by (for an FVE, targets that differ "
                "from the training mean); check that the activations are not all equal or NaN"
            )
    sums_SC = resampled_sums(np.stack(columns, axis=1), doc_ids, seed=seed, samples=samples)

    def figure(sums: np.ndarray) -> np.ndarray | np.floating:
        first = sums[..., 0] / sums[..., 1]
        return first - sums[..., 2] / sums[..., 3] if len(ratios) == 2 else first

    with np.errstate(divide="ignore", invalid="ignore"):
        drawn_S = figure(sums_SC)
    # Resamples whose denominator is 0 have no figure and are left out.
    low, high = np.quantile(drawn_S[np.isfinite(drawn_S)], [(1 - level) / 2, (1 + level) / 2])
    value = float(figure(np.stack([column.sum() for column in columns])))
    return Estimate(
        value,
        float(low),
        float(high),
        n=len(doc_ids),
        documents=len(set(doc_ids)),
        denominator=float(columns[1].mean()),
    )


def resampled_sums(
    columns_NC: Float[np.ndarray, "N C"], doc_ids: Sequence[str] | np.ndarray, *, seed: int, samples: int
) -> Float[np.ndarray, "S C"]:
    """Column sums over `samples` draws of as many documents as there are, with replacement.

    Raises:
      ValueError: fewer than two documents.
    """
    document_N, counts_SD = _draws(doc_ids, seed, samples)
    sums_DC = np.stack(
        [np.bincount(document_N, column, counts_SD.shape[1]) for column in columns_NC.T], axis=1
    )
    return np.concatenate([counts_BD.astype(np.float64) @ sums_DC for counts_BD in _parts(counts_SD)])


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    doc_ids: Sequence[str] | np.ndarray,
    *,
    seed: int = 0,
    samples: int = 200,
) -> Estimate:
    """Any figure of weighted rows with its interval; resamples for which it is undefined (NaN) are left out.

    Args:
      statistic: computes the figure from how often each row was drawn (N,).
      doc_ids: document of each row.
      seed: seed of the draws.
      samples: number of draws.

    Raises:
      ValueError: fewer than two documents, or the figure is undefined with every row drawn once.
    """
    document_N, counts_SD = _draws(doc_ids, seed, samples)
    value = statistic(np.ones(len(doc_ids)))
    if not np.isfinite(value):
        raise ValueError(
            f"the figure is {value} for {len(doc_ids)} rows; it needs rows of both kinds, evaluate more"
        )
    drawn = np.array([statistic(counts_D.astype(np.float64)[document_N]) for counts_D in counts_SD])
    low, high = np.quantile(drawn[np.isfinite(drawn)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high), len(doc_ids), counts_SD.shape[1], 1.0)


def _draws(
    doc_ids: Sequence[str] | np.ndarray, seed: int, samples: int
) -> tuple[Int[np.ndarray, "N"], UInt16[np.ndarray, "S D"]]:
    """The document of each row, and how often each document is in each draw."""
    document_N, rows_D = numbered(doc_ids)
    if len(rows_D) < 2:
        raise ValueError(
            f"{len(rows_D)} document(s): an interval over documents needs at least 2; hold out more documents"
        )
    return document_N, _counts(len(rows_D), seed, samples)


@functools.lru_cache(maxsize=2)
def _counts(documents: int, seed: int, samples: int) -> UInt16[np.ndarray, "S D"]:
    """How often each document is in each draw: the same for all figures of as many documents."""
    rng = np.random.default_rng(seed)
    # A count of many documents is small, and one of few documents is at most their number.
    counts_SD = np.zeros((samples, documents), np.uint16)
    for counts_BD in _parts(counts_SD):
        counts_BD[:] = rng.multinomial(documents, np.full(documents, 1 / documents), size=len(counts_BD))
    return counts_SD


def _parts(counts_SD: UInt16[np.ndarray, "S D"]) -> Iterator[UInt16[np.ndarray, "B D"]]:
    """Views of as many draws as are looked at together."""
    size = max(COUNTS_AT_ONCE // counts_SD.shape[1], 1)
    return (counts_SD[start : start + size] for start in range(0, len(counts_SD), size))
