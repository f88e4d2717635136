"""Baselines that an explanation competes with: lookups, linear maps, and codes that nobody has to read.

They are fitted on training rows and applied to held-out rows. All vectors go in raw and are compared by direction.
Training rows are looked at a few thousand at a time, on the host, so that nothing needs a copy of all of them. Shape
letters: N held-out rows, M training rows, B rows of a chunk, D model, W words, C components.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import eigh
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

from nla_jax.autoencoder import metrics
from nla_jax.autoencoder.yardstick import CHUNK_ROWS, row_chunks
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.extraction import next_words
from nla_jax.evaluation.target_lm import TargetLM
from nla_jax.lm.layers import Norm
from nla_jax.lm.logits import logits
from nla_jax.sharding.placement import to_host

PRIOR_ROWS = 3
"""Rows that a coarser mean counts for in that of a key: about the ratio of the variance inside of keys to that between
them where a last token explains a quarter of the variance."""
END_CHARACTERS = 64
"""Characters of a context's end that are tokenized to find its last two tokens."""
_WORD_PATTERN = r"(?u)\b\w+\b"
_RIDGE_ALPHAS = (1.0, 10.0, 100.0)


def nearest_by_activation(
    activations_ND: Float[np.ndarray, "N D"], training_MD: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "N D"]:
    """For each activation, the training activation of the nearest direction: a lookup that sees the activation."""
    unit_ND = metrics.normalize(activations_ND)
    return training_MD[_most_similar(unit_ND @ metrics.normalize(rows).T for rows in row_chunks(training_MD))]


def means_by_key(
    keys_N: Sequence[Hashable],
    training_keys_M: Sequence[Hashable],
    training_MD: Float[np.ndarray, "M D"],
    coarser_ND: Float[np.ndarray, "N D"],
) -> Float[np.ndarray, "N D"]:
    """For each row, the mean of the normalized training activations with its key: a lookup that sees the key alone.

    The mean of a few rows is noisy, so the row's coarser mean counts as `PRIOR_ROWS` further rows; it is the
    prediction where no training row has the key.

    Args:
      keys_N: the key of each row, such as its last token.
      training_keys_M: those of the training rows.
      training_MD: raw training activations.
      coarser_ND: for each row, the mean of normalized activations of a key that tells less.
    """
    number_of = {key: number for number, key in enumerate(dict.fromkeys(keys_N))}
    number_M = np.array([number_of.get(key, -1) for key in training_keys_M], int)
    sums_KD, start = np.zeros((len(number_of), training_MD.shape[1])), 0
    for rows_BD in row_chunks(training_MD):
        number_B = number_M[start : start + len(rows_BD)]
        known_B = number_B >= 0
        np.add.at(sums_KD, number_B[known_B], metrics.normalize(rows_BD[known_B]))
        start += len(rows_BD)
    rows_K = np.bincount(number_M[number_M >= 0], minlength=len(number_of))
    number_N = np.array([number_of[key] for key in keys_N], int)
    counted_N1 = rows_K[number_N][:, None]
    means_ND = (sums_KD[number_N] + PRIOR_ROWS * coarser_ND) / (counted_N1 + PRIOR_ROWS)
    return means_ND.astype(np.float32)


def last_tokens(data: ActivationDataset, target: TargetLM | None) -> list[tuple[int, int]] | None:
    """Ids of the token before the last one and of the last one that each row was read at; -1 where there is none.

    Rows that do not carry them as a column have the ends of their contexts tokenized by the target, which is needed for
    nothing else. None without contexts.
    """
    if (stored := data.extra.get("last_token_ids")) is not None:
        return [(before, last) for before, last in stored]
    if data.contexts is None:
        return None
    ends = [context[-END_CHARACTERS:] for context in data.contexts]
    encoded = target.tokenizer(ends, add_special_tokens=False)["input_ids"] if ends else []
    padded = [[-1, -1, *ids][-2:] for ids in encoded]
    return [(before, last) for before, last in padded]


def nearest_by_text(
    texts: Sequence[str], training_texts: Sequence[str], training_MD: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "N D"]:
    """For each text, the activation of the training explanation that is most similar by tf-idf.

    A text without a word of the training explanations is similar to none, and gets the training mean.
    """
    vectorizer = TfidfVectorizer(token_pattern=_WORD_PATTERN)
    training_MV = vectorizer.fit_transform(training_texts)
    texts_NV = vectorizer.transform(texts)
    chunks = (training_MV[start : start + CHUNK_ROWS] for start in range(0, len(training_texts), CHUNK_ROWS))
    nearest_ND = training_MD[_most_similar((texts_NV @ rows_BV.T).toarray() for rows_BV in chunks)]
    has_word_N1 = (texts_NV.getnnz(axis=1) > 0)[:, None]
    return np.where(has_word_N1, nearest_ND, training_MD.mean(axis=0))


def _most_similar(similarities: Iterable[Float[np.ndarray, "N B"]]) -> Int[np.ndarray, "N"]:
    """The training row that is most similar to each row, given all similarities, some training rows at a time."""
    best_N, chosen_N, start = -np.inf, 0, 0
    for similarity_NB in similarities:
        row_N, highest_N = similarity_NB.argmax(axis=1), similarity_NB.max(axis=1)
        chosen_N = np.where(highest_N > best_N, start + row_N, chosen_N)
        best_N, start = np.maximum(best_N, highest_N), start + similarity_NB.shape[1]
    return chosen_N


def ridge_from_words(
    texts: Sequence[str], training_texts: Sequence[str], training_MD: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "N D"]:
    """Directions by ridge regression on the set of words in a text, whatever their order."""
    vectorizer = CountVectorizer(token_pattern=_WORD_PATTERN, binary=True, min_df=2, max_features=1500)
    weights_WD, bias_D = _ridge(vectorizer.fit_transform(training_texts).astype(np.float64), training_MD)
    return (vectorizer.transform(texts) @ weights_WD + bias_D).astype(np.float32)


def _ridge(
    has_word_MW: csr_matrix, training_MD: Float[np.ndarray, "M D"]
) -> tuple[Float[np.ndarray, "W D"], Float[np.ndarray, "D"]]:
    """Weights and bias of the directions on the words, by the normal equations, which add up over the rows.

    The strength is that of `_RIDGE_ALPHAS` with the least generalized cross-validation error, `RSS / (1 − df / M)²`.
    """
    M, W = has_word_MW.shape
    cross_WD, sum_D, squares = np.zeros((W, training_MD.shape[1])), 0.0, 0.0
    for start, rows_BD in zip(range(0, M, CHUNK_ROWS), row_chunks(training_MD), strict=True):
        unit_BD = metrics.normalize(rows_BD).astype(np.float64)
        cross_WD += has_word_MW[start : start + CHUNK_ROWS].T @ unit_BD
        sum_D, squares = sum_D + unit_BD.sum(axis=0), squares + np.square(unit_BD).sum()
    # About the means, so that the bias is not shrunk.
    word_mean_W, mean_D = np.asarray(has_word_MW.mean(axis=0)).ravel(), sum_D / M
    gram_WW = (has_word_MW.T @ has_word_MW).toarray() - M * np.outer(word_mean_W, word_mean_W)
    cross_WD -= M * np.outer(word_mean_W, mean_D)
    total = squares - M * mean_D @ mean_D
    eigenvalue_W, basis_WW = eigh(gram_WW)
    eigenvalue_W = np.maximum(eigenvalue_W, 0)
    rotated_WD = basis_WW.T @ cross_WD
    energy_W = np.square(rotated_WD).sum(axis=1)

    def error(alpha: float) -> float:
        shrunk_W = 1 / (eigenvalue_W + alpha)
        residual = total - energy_W @ (2 * shrunk_W - eigenvalue_W * shrunk_W**2)
        return residual / (1 - (1 + eigenvalue_W @ shrunk_W) / M) ** 2

    alpha = min(_RIDGE_ALPHAS, key=error)
    weights_WD = basis_WW @ (rotated_WD / (eigenvalue_W + alpha)[:, None])
    return weights_WD, mean_D - word_mean_W @ weights_WD


@dataclasses.dataclass(frozen=True)
class PCACode:
    """A code for directions with a given number of bits: principal components, each rounded to a few levels.

    Every bit goes to the component with the largest remaining variance, of which it leaves a quarter; levels are the
    means of equally filled bins of the training rows.
    """

    mean_D: Float[np.ndarray, "D"]
    components_CD: Float[np.ndarray, "C D"]
    """Orthonormal directions, those of the largest variance first."""
    edges: tuple[np.ndarray, ...]
    levels: tuple[np.ndarray, ...]

    @classmethod
    def fit(cls, training_MD: Float[np.ndarray, "M D"], bits: int) -> "PCACode":
        """Fit a code of `bits` bits a vector on training activations."""
        M, D = training_MD.shape
        sum_D, squares_DD = np.zeros(D), np.zeros((D, D))
        for unit_BD in map(metrics.normalize, row_chunks(training_MD)):
            sum_D += unit_BD.sum(axis=0, dtype=np.float64)
            squares_DD += unit_BD.T @ unit_BD
        mean_D, count = sum_D / M, min(bits, M, D)
        covariance_DD = squares_DD / M - np.outer(mean_D, mean_D)
        variance, components_DC = eigh(covariance_DD, subset_by_index=(D - count, D - 1))
        variance, components_CD = variance[::-1].copy(), components_DC.T[::-1].astype(np.float32)
        mean_D, bits_of = mean_D.astype(np.float32), np.zeros(count, int)
        # Levels with fewer than eight training rows each would fit noise.
        most = int(np.log2(max(M // 8, 2)))
        for _ in range(min(bits, most * len(bits_of))):
            best = int(np.where(bits_of < most, variance, -1.0).argmax())
            bits_of[best] += 1
            variance[best] /= 4
        scores_MC = np.concatenate(
            [(metrics.normalize(rows_BD) - mean_D) @ components_CD.T for rows_BD in row_chunks(training_MD)]
        )
        edges, levels = [], []
        for column, count in zip(scores_MC.T, bits_of, strict=True):
            inner = np.quantile(column, np.linspace(0, 1, 2**count + 1)[1:-1])
            bins = np.searchsorted(inner, column)
            sums, members = np.bincount(bins, column, 2**count), np.bincount(bins, minlength=2**count)
            edges.append(inner)
            levels.append(sums / np.maximum(members, 1))
        return cls(mean_D, components_CD, tuple(edges), tuple(levels))

    def __call__(self, activations_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """The directions that are decoded from the codes of activations."""
        scores_NC = (metrics.normalize(activations_ND) - self.mean_D) @ self.components_CD.T
        coded = [
            levels[np.searchsorted(edges, column)]
            for column, edges, levels in zip(scores_NC.T, self.edges, self.levels, strict=True)
        ]
        return (np.stack(coded, axis=1) @ self.components_CD + self.mean_D).astype(np.float32)


def logit_lens_words(target: TargetLM, vectors_ND: Float[np.ndarray, "N D"], count: int) -> list[list[str]]:
    """The words that the target's final norm and LM head give each vector, likeliest first."""

    @jax.jit
    def top(params, vectors):
        final = Norm(target.config).apply({"params": params["final_norm"]}, vectors)
        return jax.lax.top_k(logits(params, target.config, final), 4 * count)[1]

    params = {
        name: target.lm.params[name]
        for name in ("embed", "final_norm", "lm_head")
        if name in target.lm.params
    }
    top_ids = np.concatenate([to_host(top(params, rows)) for rows in row_chunks(vectors_ND, 256)])
    return [next_words(ids, target.tokenizer, count) for ids in top_ids.tolist()]
