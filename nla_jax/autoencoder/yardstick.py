"""The yardstick of every FVE: means of the training activations."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from nla_jax.autoencoder import metrics


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """Means of the training activations: the yardstick of every FVE."""

    mean_D: np.ndarray
    normalized_mean_D: np.ndarray

    @classmethod
    def of(cls, activations_ND: np.ndarray) -> "Yardstick":
        """Compute both means; the second is not normalized again."""
        return cls(activations_ND.mean(axis=0), np.asarray(metrics.mean_of_normalized(activations_ND)))

    def fve_nrm(
        self, prediction_ND: np.ndarray, texts: Sequence[str | None], activations_ND: np.ndarray
    ) -> float:
        """The figure that training watches; where there is no text, the mean is the prediction."""
        failed_N = np.array([text is None for text in texts])
        filled_ND = metrics.substitute_failed(prediction_ND, failed_N, self.mean_D)
        return float(metrics.fve_nrm(filled_ND, activations_ND, self.normalized_mean_D))
