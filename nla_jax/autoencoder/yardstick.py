"""The yardstick of every FVE: what is kept of the training activations when they themselves are not at hand.

A run writes it beside its data and an export beside its AR, so that neither a run's data nor any background documents
are needed to score an explanation. Shape letters: N activations, D model.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import safe_open

from nla_jax.autoencoder import metrics
from nla_jax.files import Place, as_path, local_copy
from nla_jax.lm.files.safetensors_files import save_tensors

FILE_NAME = "yardstick.safetensors"
CHUNK_ROWS = 4096
"""Rows that a statistic of a whole data set looks at together, so that it needs no second copy of all of them."""
FEWEST_ROWS, FEWEST_DOCUMENTS = 20, 2
"""Activations of a place, and documents that they are of, without which it has no yardstick of its own."""
MOST_PLACES = 32
"""A column `place` with more different values is about something else than places, and is not looked at."""


def row_chunks(
    rows_ND: Float[np.ndarray, "N D"], size: int = CHUNK_ROWS
) -> Iterator[Float[np.ndarray, "B D"]]:
    """Views of at most `size` rows each, in order."""
    return (rows_ND[start : start + size] for start in range(0, len(rows_ND), size))


class Part(NamedTuple):
    """Some of the rows that a yardstick is computed from."""

    activations_ND: Float[np.ndarray, "N D"]
    places: Sequence[Any] | None = None
    """The place of each row; whatever is no text is no place."""
    doc_ids: Sequence[str] | None = None
    """The document of each row; each row counts as a document of its own where they are not known."""

    def take(self, rows: slice | list[int]) -> "Part":
        """Some of the rows."""

        def pick(column: Sequence | None) -> Sequence | None:
            if column is None or isinstance(rows, slice):
                return column if column is None else column[rows]
            return [column[row] for row in rows]

        return Part(self.activations_ND[rows], pick(self.places), pick(self.doc_ids))

    def chunks(self) -> Iterator["Part"]:
        """The rows in order, at most `CHUNK_ROWS` at a time."""
        starts = range(0, len(self.activations_ND), CHUNK_ROWS)
        return (self.take(slice(start, start + CHUNK_ROWS)) for start in starts)

    def by_place(self) -> Iterator[tuple[str, "Part"]]:
        """The rows of each place."""
        rows_of: dict[str, list[int]] = {}
        for row, place in enumerate(self.places or ()):
            if isinstance(place, str):
                rows_of.setdefault(place, []).append(row)
        return ((place, self.take(rows)) for place, rows in rows_of.items())


@dataclasses.dataclass(frozen=True, eq=False)
class Yardstick:
    """Means, spread and size of the training activations."""

    mean_D: Float[np.ndarray, "D"]
    """Mean of the raw activations: the prediction of `fve` that explains nothing."""
    normalized_mean_D: Float[np.ndarray, "D"]
    """Mean of the normalized activations, which is not normalized again."""
    spread: float
    """Mean over rows of the denominator of `fve_nrm`: what a single row's error is measured against."""
    norm_p75: float
    """75th percentile of the norms: the default norm of an injected activation."""
    count: int
    """Number of activations that all of this was computed from."""
    source: str
    """Where they come from, in words that complete "the mean of N ..."."""
    places: Mapping[str, "Yardstick"] = dataclasses.field(default_factory=dict)
    """The yardsticks of single places of `lm.places` and of spans; empty where they are not known."""

    def at(self, place: str | None) -> "Yardstick":
        """The yardstick of the activations of one place; this one where that place has none."""
        return self.places.get(place, self)

    @classmethod
    def of(
        cls,
        activations_ND: Float[np.ndarray, "N D"],
        source: str = "training activations",
        *,
        places: Sequence[Any] | None = None,
        doc_ids: Sequence[str] | None = None,
    ) -> "Yardstick":
        """Compute the yardstick of raw activations; see `Part` and `of_parts`."""
        return cls.of_parts([Part(activations_ND, places, doc_ids)], source)

    @classmethod
    def of_parts(cls, parts: Iterable[Part], source: str = "training activations") -> "Yardstick":
        """Compute the yardstick of raw activations that come in parts, which are summed up on the host one by one.

        A place has a yardstick of its own from `FEWEST_ROWS` rows of `FEWEST_DOCUMENTS` documents on.

        Raises:
          ValueError: no activations, or activations that are not finite.
        """
        of_all, of_places = _Sums(), dict[str, _Sums]()
        for part in (chunk for whole in parts for chunk in whole.chunks()):
            of_all.add(part, source)
            for place, rows in part.by_place():
                if place in of_places or len(of_places) <= MOST_PLACES:
                    of_places.setdefault(place, _Sums()).add(rows, source)
        if not of_all.count:
            raise ValueError(f"there are no {source} to take a mean of; give at least one")
        if len(of_places) > MOST_PLACES:
            of_places.clear()
        measured = {
            place: sums.yardstick(f"{source} at the place {place}")
            for place, sums in sorted(of_places.items())
            if sums.are_enough
        }
        return of_all.yardstick(source, measured)

    @property
    def description(self) -> str:
        """What an FVE is measured against, for reports."""
        return f"mean of {self.count} {self.source}"

    def fve_nrm(
        self,
        prediction_ND: Float[np.ndarray, "N D"],
        texts: Sequence[str | None],
        activations_ND: Float[np.ndarray, "N D"],
        places: Sequence[str | None] | None = None,
    ) -> float:
        """`fve_nrm` of predictions made from texts; where there is no text, the mean of all is the prediction.

        With the place of each row, variance is measured around the mean of the row's place in place of that of all. A
        text that failed tells no place, so its prediction stays the mean of all.
        """
        failed_N = np.array([text is None for text in texts])
        filled_ND = metrics.substitute_failed(prediction_ND, failed_N, self.mean_D)
        error_N, variance_N = metrics.fve_nrm_terms(filled_ND, activations_ND, self.normalized_mean_D)
        if places is not None:
            means_ND = np.stack([self.at(place).normalized_mean_D for place in places])
            variance_N = np.square(metrics.normalize(activations_ND) - means_ND).mean(axis=1)
        return float(1 - error_N.sum() / variance_N.sum())

    def save(self, directory: Place) -> None:
        """Write `yardstick.safetensors` into a directory."""
        tensors, metadata = self._stored()
        for place, yardstick in self.places.items():
            own_tensors, own_metadata = yardstick._stored()
            tensors |= {f"{_OF_PLACE}{place}/{name}": value for name, value in own_tensors.items()}
            metadata |= {f"{_OF_PLACE}{place}/{name}": value for name, value in own_metadata.items()}
        save_tensors(tensors, as_path(directory) / FILE_NAME, metadata=metadata)

    def _stored(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """The tensors and the metadata of a file, without those of places."""
        means = {"mean": self.mean_D, "normalized_mean": self.normalized_mean_D}
        numbers = {name: repr(getattr(self, name)) for name in ("spread", "norm_p75", "count")}
        tensors = {name: np.asarray(value, np.float32) for name, value in means.items()}
        return tensors, {**numbers, "source": self.source}

    @classmethod
    def load(cls, directory: Place) -> "Yardstick | None":
        """Read what `save` wrote; None where the directory has none. Files of earlier versions know no places.

        Raises:
          ValueError: a file that is not a yardstick.
        """
        path = as_path(directory) / FILE_NAME
        if not path.is_file():
            return None
        try:
            with local_copy(path) as copy, safe_open(copy, "numpy") as file:
                about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            places = [
                name.removeprefix(_OF_PLACE).removesuffix("/count")
                for name in about
                if name.startswith(_OF_PLACE) and name.endswith("/count")
            ]
            return _read(
                tensors,
                about,
                "",
                {place: _read(tensors, about, f"{_OF_PLACE}{place}/", {}) for place in places},
            )
        except Exception as error:  # safetensors raises a class of its own
            raise ValueError(
                f"{path} is not a yardstick of training activations ({error}); copy the file again from where the "
                "model came from, or delete it to do without FVE"
            ) from error


_OF_PLACE = "places/"
"""Names of tensors and metadata of a place begin with this, and then have the place and a slash."""


def _read(
    tensors: Mapping[str, np.ndarray], about: Mapping[str, str], prefix: str, places: Mapping[str, Yardstick]
) -> Yardstick:
    """The yardstick whose names in a file begin with a prefix."""
    return Yardstick(
        tensors[f"{prefix}mean"],
        tensors[f"{prefix}normalized_mean"],
        float(about[f"{prefix}spread"]),
        float(about[f"{prefix}norm_p75"]),
        int(about[f"{prefix}count"]),
        about[f"{prefix}source"],
        places,
    )


class _Sums:
    """Sums over rows that make a yardstick."""

    def __init__(self):
        self.count, self._documents = 0, set[str]()
        self._sum_D = self._normalized_sum_D = self._mean_squares = np.float64(0)
        self._norms: list[np.ndarray] = []

    def add(self, part: Part, source: str) -> None:
        """Add rows; ValueError, which names where they are from, if they are not finite."""
        rows_BD = part.activations_ND
        self._norms.append(np.linalg.norm(rows_BD, axis=1))
        if len(bad := self.count + np.flatnonzero(~np.isfinite(self._norms[-1]))):
            raise ValueError(f"{source} hold NaN or infinity (rows {bad[:5].tolist()}); leave these rows out")
        self.count += len(rows_BD)
        if len(self._documents) < FEWEST_DOCUMENTS:
            numbers = range(self.count - len(rows_BD), self.count)
            self._documents.update(map(str, numbers) if part.doc_ids is None else part.doc_ids)
        normalized_BD = metrics.normalize(rows_BD)
        self._sum_D = self._sum_D + rows_BD.sum(axis=0, dtype=np.float64)
        self._normalized_sum_D = self._normalized_sum_D + normalized_BD.sum(axis=0, dtype=np.float64)
        self._mean_squares += np.square(normalized_BD).sum(dtype=np.float64) / rows_BD.shape[1]

    @property
    def are_enough(self) -> bool:
        """Whether the rows are as many, and of as many documents, as a place needs."""
        return self.count >= FEWEST_ROWS and len(self._documents) >= FEWEST_DOCUMENTS

    def yardstick(self, source: str, places: Mapping[str, Yardstick] | None = None) -> Yardstick:
        """The yardstick of all rows that were added."""
        normalized_mean_D = self._normalized_sum_D / self.count
        # The mean square about a mean is the mean square less that of the mean.
        spread = self._mean_squares / self.count - np.mean(normalized_mean_D**2)
        return Yardstick(
            (self._sum_D / self.count).astype(np.float32),
            normalized_mean_D.astype(np.float32),
            max(float(spread), 0.0),
            float(np.percentile(np.concatenate(self._norms), 75)),
            self.count,
            source,
            places or {},
        )
