"""Sparse dictionaries: an activation as a few features, each with a strength and a direction of its own.

One class computes the usual architectures, which differ in what makes a feature active: a positive pre-activation
(ReLU), one above the feature's own threshold (JumpReLU), one among the k largest (TopK), or a positive gate that leaves
the strength to another map (gated). Shape letters: N rows, B rows of a chunk, D model, F features.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.special import gammaln

from nla_jax.autoencoder import metrics
from nla_jax.autoencoder.yardstick import row_chunks

Normalization = Literal["none", "constant_norm_rescale", "layer_norm"]
"""What is done to an activation before it is encoded: nothing, a scaling to the norm √d, or that of a layer norm."""
STRENGTHS_AT_ONCE = 1 << 26
"""Most strengths that are held in memory together: of a wide dictionary, few rows are looked at at a time."""
LAYER_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class SparseDictionary:
    """A sparse autoencoder of activations at one layer, for reading."""

    encode_DF: Float[np.ndarray, "D F"]
    encode_bias_F: Float[np.ndarray, "F"]
    decode_FD: Float[np.ndarray, "F D"]
    decode_bias_D: Float[np.ndarray, "D"]
    source: str
    """Where it comes from, for reports and messages."""
    threshold_F: Float[np.ndarray, "F"] | float = 0.0
    """A feature is active where its pre-activation is greater than this."""
    k: int | None = None
    """Number of features that may be active together, the strongest; None sets no limit."""
    gain_F: Float[np.ndarray, "F"] | None = None
    """Factor of a gated feature's strength; None where the strength is the pre-activation itself."""
    gain_bias_F: Float[np.ndarray, "F"] | None = None
    """Bias of a gated feature's strength."""
    is_centered: bool = True
    """Whether the decoder's bias is subtracted from an activation before it is encoded."""
    normalization: Normalization = "none"

    @property
    def features(self) -> int:
        """Number of features."""
        return len(self.decode_FD)

    def strengths(self, activations_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N F"]:
        """The strength of every feature in raw activations; 0 where it is not active."""
        normalized_ND, _, _ = self._normalized(activations_ND)
        inputs_ND = normalized_ND - self.decode_bias_D if self.is_centered else normalized_ND
        before_NF = inputs_ND @ self.encode_DF + self.encode_bias_F
        strength_NF = np.maximum(before_NF, 0)
        if self.gain_F is not None:
            strength_NF = np.maximum((before_NF - self.encode_bias_F) * self.gain_F + self.gain_bias_F, 0)
        strength_NF = np.where(before_NF > self.threshold_F, strength_NF, 0).astype(np.float32)
        return strength_NF if self.k is None else strongest(strength_NF, self.k)

    def in_parts(
        self, activations_ND: Float[np.ndarray, "N D"]
    ) -> Iterator[tuple[slice, Float[np.ndarray, "B F"]]]:
        """The strengths of many rows, some rows at a time, each part with the slice of rows that it is of."""
        start = 0
        for rows_BD in row_chunks(activations_ND, max(STRENGTHS_AT_ONCE // self.features, 1)):
            yield slice(start, start + len(rows_BD)), self.strengths(rows_BD)
            start += len(rows_BD)

    def decode(
        self, strength_NF: Float[np.ndarray, "N F"], activations_ND: Float[np.ndarray, "N D"]
    ) -> Float[np.ndarray, "N D"]:
        """Rebuild activations from strengths.

        Args:
          strength_NF: strengths as `strengths` gives them, or some of them.
          activations_ND: the raw activations, whose norms (or means and deviations) undo the normalization.

        Returns:
          Raw vectors.
        """
        _, shift_N1, scale_N1 = self._normalized(activations_ND)
        decoded_ND = strength_NF @ self.decode_FD + self.decode_bias_D
        return (decoded_ND * scale_N1 + shift_N1).astype(np.float32)

    def _normalized(self, activations_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Activations as the encoder takes them, and the shift and scale that turn them back."""
        zero_N1 = np.zeros((len(activations_ND), 1), np.float32)
        if self.normalization == "none":
            return activations_ND, zero_N1, zero_N1 + 1
        if self.normalization == "constant_norm_rescale":
            norm_N1 = np.linalg.norm(activations_ND, axis=1, keepdims=True)
            return metrics.normalize(activations_ND), zero_N1, norm_N1 / np.sqrt(activations_ND.shape[1])
        mean_N1 = activations_ND.mean(axis=1, keepdims=True)
        deviation_N1 = activations_ND.std(axis=1, keepdims=True, ddof=1)
        return (activations_ND - mean_N1) / (deviation_N1 + LAYER_NORM_EPS), mean_N1, deviation_N1


def strongest(strength_NF: Float[np.ndarray, "N F"], count: int) -> Float[np.ndarray, "N F"]:
    """The `count` greatest strengths of each row, 0 in place of all others; of equal ones the first features'."""
    if count >= strength_NF.shape[1]:
        return strength_NF
    chosen_NC = strongest_features(strength_NF, count)
    kept_NF = np.zeros_like(strength_NF)
    np.put_along_axis(kept_NF, chosen_NC, np.take_along_axis(strength_NF, chosen_NC, axis=1), axis=1)
    return kept_NF


def strongest_features(strength_NF: Float[np.ndarray, "N F"], count: int) -> Int[np.ndarray, "N C"]:
    """The features of the `count` greatest strengths of each row, the strongest first."""
    if 4 * count < strength_NF.shape[1]:
        # Sorting all features of many rows would take most of the time.
        some_NC = np.sort(np.argpartition(-strength_NF, count - 1, axis=1)[:, :count], axis=1)
        order_NC = np.argsort(-np.take_along_axis(strength_NF, some_NC, axis=1), axis=1, kind="stable")
        return np.take_along_axis(some_NC, order_NC, axis=1)
    return np.argsort(-strength_NF, axis=1, kind="stable")[:, :count]


@dataclasses.dataclass(frozen=True)
class StrengthCode:
    """Strengths in a few bits each: every one is rounded to the mean of its bin of equally many training strengths."""

    edges: Float[np.ndarray, "_"]
    levels: Float[np.ndarray, "_"]

    @classmethod
    def fit(cls, strengths: Float[np.ndarray, "S"], bits: int) -> "StrengthCode":
        """Fit bins on positive strengths of training rows, of whatever features.

        Raises:
          ValueError: no strength is positive.
        """
        if not len(strengths):
            raise ValueError(
                "no feature of the dictionary is active on the training rows; is it of this layer?"
            )
        edges = np.quantile(strengths, np.linspace(0, 1, 2**bits + 1)[1:-1])
        bins = np.searchsorted(edges, strengths)
        sums, members = np.bincount(bins, strengths, 2**bits), np.bincount(bins, minlength=2**bits)
        return cls(edges, sums / np.maximum(members, 1))

    def __call__(self, strength_NF: Float[np.ndarray, "N F"]) -> Float[np.ndarray, "N F"]:
        """Round the strengths of active features; the others stay 0."""
        rounded_NF = self.levels[np.searchsorted(self.edges, strength_NF)]
        return np.where(strength_NF > 0, rounded_NF, 0).astype(np.float32)


def code_bits(active_N: Int[np.ndarray, "N"], features: int, strength_bits: int) -> Float[np.ndarray, "N"]:
    """Bits that say how many features are active, which ones (`log2 (F over a)`), and how strong each of them is."""
    which_N = gammaln(features + 1) - gammaln(active_N + 1) - gammaln(features - active_N + 1)
    return np.log2(features + 1) + which_N / np.log(2) + strength_bits * active_N
