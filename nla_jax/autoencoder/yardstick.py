"""The yardstick of every FVE: what is kept of the training activations when they themselves are not at hand.

A run writes it beside its data and an export beside its AR, so that neither a run's data nor any background documents
are needed to score an explanation. Shape letters: N activations, D model.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from safetensors import safe_open

from nla_jax.autoencoder import metrics
from nla_jax.files import Place, as_path, local_copy
from nla_jax.lm.files.safetensors_files import save_tensors

FILE_NAME = "yardstick.safetensors"
CHUNK_ROWS = 4096
"""Rows that a statistic of a whole data set looks at together, so that it needs no second copy of all of them."""


def row_chunks(
    rows_ND: Float[np.ndarray, "N D"], size: int = CHUNK_ROWS
) -> Iterator[Float[np.ndarray, "B D"]]:
    """Views of at most `size` rows each, in order."""
    return (rows_ND[start : start + size] for start in range(0, len(rows_ND), size))


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
        cls, activations_ND: Float[np.ndarray, "N D"], source: str = "training activations"
    ) -> "Yardstick":
        """Compute the yardstick of raw activations; see `of_parts`."""
        return cls.of_parts([activations_ND], source)

    @classmethod
    def of_parts(
        cls, parts: Iterable[Float[np.ndarray, "_ D"]], source: str = "training activations"
    ) -> "Yardstick":
        """Compute the yardstick of raw activations that come in parts, which are summed up on the host one by one.

        Raises:
          ValueError: no activations, or activations that are not finite.
        """
        sum_D = normalized_sum_D = mean_squares = np.float64(0)
        norms, count = [], 0
        for rows_BD in (chunk for part in parts for chunk in row_chunks(part)):
            norms.append(np.linalg.norm(rows_BD, axis=1))
            if len(bad := count + np.flatnonzero(~np.isfinite(norms[-1]))):
                raise ValueError(
                    f"{source} hold NaN or infinity (rows {bad[:5].tolist()}); leave these rows out"
                )
            count += len(rows_BD)
            normalized_BD = metrics.normalize(rows_BD)
            sum_D = sum_D + rows_BD.sum(axis=0, dtype=np.float64)
            normalized_sum_D = normalized_sum_D + normalized_BD.sum(axis=0, dtype=np.float64)
            mean_squares += np.square(normalized_BD).sum(dtype=np.float64) / rows_BD.shape[1]
        if not count:
            raise ValueError(f"there are no {source} to take a mean of; give at least one")
        normalized_mean_D = normalized_sum_D / count
        # The mean square about a mean is the mean square less that of the mean.
        spread = mean_squares / count - np.mean(normalized_mean_D**2)
        return cls(
            (sum_D / count).astype(np.float32),
            normalized_mean_D.astype(np.float32),
            max(float(spread), 0.0),
            float(np.percentile(np.concatenate(norms), 75)),
            count,
            source,
        )

    @property
    def description(self) -> str:
        """What an FVE is measured against, for reports."""
        return f"mean of {self.count} {self.source}"

    def fve_nrm(
        self,
        prediction_ND: Float[np.ndarray, "N D"],
        texts: Sequence[str | None],
        activations_ND: Float[np.ndarray, "N D"],
    ) -> float:
        """`fve_nrm` of predictions made from texts; where there is no text, the mean is the prediction."""
        failed_N = np.array([text is None for text in texts])
        filled_ND = metrics.substitute_failed(prediction_ND, failed_N, self.mean_D)
        return float(metrics.fve_nrm(filled_ND, activations_ND, self.normalized_mean_D))

    def save(self, directory: Place) -> None:
        """Write `yardstick.safetensors` into a directory."""
        numbers = {name: repr(getattr(self, name)) for name in ("spread", "norm_p75", "count")}
        means = {"mean": self.mean_D, "normalized_mean": self.normalized_mean_D}
        save_tensors(
            {name: np.asarray(value, np.float32) for name, value in means.items()},
            as_path(directory) / FILE_NAME,
            metadata={**numbers, "source": self.source},
        )

    @classmethod
    def load(cls, directory: Place) -> "Yardstick | None":
        """Read what `save` wrote; None where the directory has none.

        Raises:
          ValueError: a file that is not a yardstick.
        """
        path = as_path(directory) / FILE_NAME
        if not path.is_file():
            return None
        try:
            with local_copy(path) as copy, safe_open(copy, "numpy") as file:
                about = file.metadata()
                return cls(
                    file.get_tensor("mean"),
                    file.get_tensor("normalized_mean"),
                    float(about["spread"]),
                    float(about["norm_p75"]),
                    int(about["count"]),
                    about["source"],
                )
        except Exception as error:  # safetensors raises a class of its own
            raise ValueError(
                f"{path} is not a yardstick of training activations ({error}); copy the file again from where the "
                "model came from, or delete it to do without FVE"
            ) from error
