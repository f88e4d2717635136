"""The yardstick of every FVE: what is kept of the training activations when they themselves are not at hand.

A run writes it beside its data and an export beside its AR, so that neither a run's data nor any background documents
are needed to score an explanation. Shape letters: N activations, D model.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import safe_open

from nla_jax.autoencoder import metrics
from nla_jax.autoencoder.verbalizer import resolve_scale
from nla_jax.lm.files.safetensors_files import save_tensors

FILE_NAME = "yardstick.safetensors"


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

    @classmethod
    def of(
        cls, activations_ND: Float[np.ndarray, "N D"], source: str = "training activations"
    ) -> "Yardstick":
        """Compute the yardstick of raw activations."""
        normalized_mean_D = np.asarray(metrics.mean_of_normalized(activations_ND))
        _, spread_N = metrics.fve_nrm_terms(activations_ND, activations_ND, normalized_mean_D)
        return cls(
            activations_ND.mean(axis=0),
            normalized_mean_D,
            float(np.mean(spread_N)),
            resolve_scale("p75", activations_ND),
            len(activations_ND),
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

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `yardstick.safetensors` into a directory."""
        numbers = {name: repr(getattr(self, name)) for name in ("spread", "norm_p75", "count")}
        means = {"mean": self.mean_D, "normalized_mean": self.normalized_mean_D}
        save_tensors(
            {name: np.asarray(value, np.float32) for name, value in means.items()},
            Path(directory) / FILE_NAME,
            metadata={**numbers, "source": self.source},
        )

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Yardstick | None":
        """Read what `save` wrote; None where the directory has none.

        Raises:
          ValueError: a file that is not a yardstick.
        """
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            return None
        try:
            with safe_open(path, "numpy") as file:
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
