"""What "good" means here: the one place where direction MSE, FVE and the RL reward are defined.

Functions of arrays are pure, compute in float32 and may be jitted. What goes over the rows of a whole data set is
computed on the host where it gets numpy arrays: no device has room for all rows.
Errors per row are means over the d coordinates: normalized vectors have a mean square of 1, so the
denominator of `fve_nrm` reads as the share of them that the training mean leaves open.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

Array = jax.Array | np.ndarray
REWARD_KINDS = ("neg_mse", "neg_log_mse")

NORM_EPS = 1e-12
"""Added to the squared norm: far below any activation's, and gradients stay finite at the zero vector."""
MIN_LOG_MSE = 1e-6
"""Floor of the MSE inside the logarithm: a perfect reconstruction earns 13.8 instead of infinity."""
FAILED_REWARD = -2.0
"""Reward of an explanation that could not be extracted: that of a prediction orthogonal to its target."""


def normalize(vector: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Scale each vector to norm √d: `√d · h / √(‖h‖² + ε)`, in float32; the zero vector stays zero."""
    xp = vector.__array_namespace__()
    vector = xp.asarray(vector, dtype=xp.float32)
    squared_norm = xp.sum(vector**2, axis=-1, keepdims=True)
    return vector * xp.sqrt(vector.shape[-1] / (squared_norm + NORM_EPS))


def direction_mse(
    prediction: Float[Array, "*batch D"], target: Float[Array, "*batch D"]
) -> Float[Array, "*batch"]:
    """Mean squared difference of the normalized vectors over d: `2(1 − cos)`, from 0 to 4, one per row."""
    return jnp.mean((normalize(prediction) - normalize(target)) ** 2, axis=-1)


def mean_of_normalized(activation_ND: Float[Array, "N D"]) -> Float[Array, "D"]:
    """`μ_n`: the mean of the normalized (training) activations. Shorter than √d, and it has to stay so."""
    return jnp.mean(normalize(activation_ND), axis=0)


def least_squares_scale(
    prediction_ND: Float[Array, "N D"], target_ND: Float[Array, "N D"]
) -> Float[Array, ""]:
    """The one scalar s that minimizes `Σ‖s·ĥ − h‖²`; 0 where every prediction is zero.

    An AR trained on directions needs it before raw `fve`. Fit it on training data, never on held-out rows.
    """
    prediction_ND = jnp.asarray(prediction_ND, jnp.float32)
    squared_norm = jnp.sum(prediction_ND**2)
    return jnp.sum(prediction_ND * target_ND) / jnp.maximum(squared_norm, jnp.finfo(jnp.float32).tiny)


def substitute_failed(
    prediction_ND: Float[Array, "N D"], failed_N: Bool[Array, "N"], mean_D: Float[Array, "D"]
) -> Float[Array, "N D"]:
    """Put the raw training mean where no explanation could be extracted, so that every row is scored.

    Apply it after any `least_squares_scale`: the mean is on the raw scale already. In `fve` such a row
    explains exactly nothing; in `fve_nrm` it scores like the training mean as a prediction, norm forced.
    """
    return jnp.where(failed_N[:, None], mean_D, prediction_ND)


def fve_terms(
    prediction_ND: Float[Array, "N D"], target_ND: Float[Array, "N D"], mean_D: Float[Array, "D"]
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Numerator `‖ĥ − h‖²/d` and denominator `‖h − μ‖²/d` of `fve` per row, to be summed or bootstrapped."""
    target_ND = jnp.asarray(target_ND, jnp.float32)
    return jnp.mean((prediction_ND - target_ND) ** 2, axis=-1), jnp.mean((target_ND - mean_D) ** 2, axis=-1)


def fve_nrm_terms(
    prediction_ND: Float[Array, "N D"], target_ND: Float[Array, "N D"], normalized_mean_D: Float[Array, "D"]
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Numerator and denominator of `fve_nrm` per row; the mean is `mean_of_normalized`, used as it is."""
    return fve_terms(normalize(prediction_ND), normalize(target_ND), normalized_mean_D)


def fve(
    prediction_ND: Float[Array, "N D"], target_ND: Float[Array, "N D"], mean_D: Float[Array, "D"]
) -> Float[Array, ""]:
    """Fraction of variance explained on raw vectors: `1 − mean‖ĥ − h‖² / mean‖h − μ‖²`.

    1 is perfect, 0 is as good as always answering the training mean. Fraser-Taliente et al. (2026), Eq. 1.
    """
    numerator_N, denominator_N = fve_terms(prediction_ND, target_ND, mean_D)
    return 1 - numerator_N.sum() / denominator_N.sum()


def fve_nrm(
    prediction_ND: Float[Array, "N D"], target_ND: Float[Array, "N D"], normalized_mean_D: Float[Array, "D"]
) -> Float[Array, ""]:
    """Fraction of variance explained on normalized vectors: `1 − mean‖ĥ_n − h_n‖² / mean‖h_n − μ_n‖²`.

    The mean is `mean_of_normalized(training activations)`. Normalizing it again moves it away from the data,
    enlarges the denominator and inflates the result by 8 to 13 points.
    """
    numerator_N, denominator_N = fve_nrm_terms(prediction_ND, target_ND, normalized_mean_D)
    return 1 - numerator_N.sum() / denominator_N.sum()


def reward(
    mse_nrm: Float[Array, "*batch"],
    failed: Bool[Array, "*batch"],
    *,
    kind: str = "neg_mse",
    lengths: Integer[Array, "*batch"] | None = None,
    length_hinge_start: int | None = None,
    length_hinge_slope: float = 0.0,
) -> Float[Array, "*batch"]:
    """RL reward of each explanation, from the direction MSE of its reconstruction.

    `−mse` or `−log mse`, minus `slope · max(0, length − start)`; a failed explanation gets `FAILED_REWARD`
    whatever its length. A readable one scores less only if its prediction points away from the target
    (cos < 0) or the hinge outweighs the rest: choose the slope so that it cannot.

    Args:
      mse_nrm: `direction_mse` per explanation; ignored (may be NaN) where failed.
      failed: no closing tag, or an empty explanation.
      kind: `neg_mse` or `neg_log_mse`.
      lengths: sampled tokens per explanation, padding not counted; needed for the hinge.
      length_hinge_start: tokens that cost nothing; None switches the hinge off.
      length_hinge_slope: cost per further token.

    Raises:
      ValueError: unknown `kind`, or a hinge without lengths.
    """
    if kind not in REWARD_KINDS:
        raise ValueError(f"unknown reward kind {kind!r}; choose one of {', '.join(REWARD_KINDS)}")
    if length_hinge_start is not None and lengths is None:
        raise ValueError(
            f"length_hinge_start={length_hinge_start} needs the explanations' lengths; pass lengths=, "
            "or length_hinge_start=None for no length penalty"
        )
    value = -mse_nrm if kind == "neg_mse" else -jnp.log(jnp.maximum(mse_nrm, MIN_LOG_MSE))
    if length_hinge_start is not None:
        value -= length_hinge_slope * jnp.maximum(0, lengths - length_hinge_start)
    return jnp.where(failed, FAILED_REWARD, value)
