"""Baselines that an explanation competes with: lookups, linear maps, and codes that nobody has to read.

They are fitted on training rows and applied to held-out rows. All vectors go in raw and are compared by direction.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import RidgeCV

from nla_jax.autoencoder import metrics
from nla_jax.data.extraction import next_words
from nla_jax.evaluation.target_lm import TargetLM
from nla_jax.lm.layers import Norm
from nla_jax.lm.logits import logits
from nla_jax.sharding.placement import to_host

_WORD_PATTERN = r"(?u)\b\w+\b"


def nearest_by_activation(
    activations_ND: Float[np.ndarray, "N D"], training_MD: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "N D"]:
    """For each activation, the training activation of the nearest direction: a lookup that sees the activation."""
    unit_ND, unit_MD = (
        np.asarray(metrics.normalize(activations_ND)),
        np.asarray(metrics.normalize(training_MD)),
    )
    return training_MD[(unit_ND @ unit_MD.T).argmax(axis=1)]


def nearest_by_text(
    texts: Sequence[str], training_texts: Sequence[str], training_MD: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "N D"]:
    """For each text, the activation of the training explanation that is most similar by tf-idf."""
    vectorizer = TfidfVectorizer(token_pattern=_WORD_PATTERN)
    training_tfidf = vectorizer.fit_transform(training_texts)
    similarity_NM = np.asarray((vectorizer.transform(texts) @ training_tfidf.T).todense())
    return training_MD[similarity_NM.argmax(axis=1)]


def ridge_from_words(
    texts: Sequence[str], training_texts: Sequence[str], training_MD: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "N D"]:
    """Directions by ridge regression on the set of words in a text, whatever their order."""
    vectorizer = CountVectorizer(token_pattern=_WORD_PATTERN, binary=True, min_df=2, max_features=1500)
    has_word_MW = vectorizer.fit_transform(training_texts).toarray().astype(np.float32)
    model = RidgeCV(alphas=(1.0, 10.0, 100.0)).fit(has_word_MW, np.asarray(metrics.normalize(training_MD)))
    return model.predict(vectorizer.transform(texts).toarray().astype(np.float32)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class PCACode:
    """A code for directions with a given number of bits: principal components, each rounded to a few levels.

    Every bit goes to the component with the largest remaining variance, of which it leaves a quarter; levels are the
    means of equally filled bins of the training rows.
    """

    pca: PCA
    edges: tuple[np.ndarray, ...]
    levels: tuple[np.ndarray, ...]

    @classmethod
    def fit(cls, training_MD: Float[np.ndarray, "M D"], bits: int) -> "PCACode":
        """Fit a code of `bits` bits a vector on training activations."""
        unit_MD = np.asarray(metrics.normalize(training_MD))
        pca = PCA(n_components=min(bits, *unit_MD.shape), random_state=0).fit(unit_MD)
        variance, bits_of = pca.explained_variance_.copy(), np.zeros(pca.n_components_, int)
        # Levels with fewer than eight training rows each would fit noise.
        most = int(np.log2(max(len(unit_MD) // 8, 2)))
        for _ in range(min(bits, most * len(bits_of))):
            best = int(np.where(bits_of < most, variance, -1.0).argmax())
            bits_of[best] += 1
            variance[best] /= 4
        scores_MC = pca.transform(unit_MD)
        edges, levels = [], []
        for column, count in zip(scores_MC.T, bits_of, strict=True):
            inner = np.quantile(column, np.linspace(0, 1, 2**count + 1)[1:-1])
            bins = np.searchsorted(inner, column)
            sums, members = np.bincount(bins, column, 2**count), np.bincount(bins, minlength=2**count)
            edges.append(inner)
            levels.append(sums / np.maximum(members, 1))
        return cls(pca, tuple(edges), tuple(levels))

    def __call__(self, activations_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """The directions that are decoded from the codes of activations."""
        scores_NC = self.pca.transform(np.asarray(metrics.normalize(activations_ND)))
        coded = [
            levels[np.searchsorted(edges, column)]
            for column, edges, levels in zip(scores_NC.T, self.edges, self.levels, strict=True)
        ]
        return self.pca.inverse_transform(np.stack(coded, axis=1)).astype(np.float32)


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
    top_ids = np.concatenate([to_host(top(params, v)) for v in _chunks(vectors_ND, 256)])
    return [next_words(ids, target.tokenizer, count) for ids in top_ids.tolist()]


def dictionary_texts(path: str, target: TargetLM, activations_ND: np.ndarray, count: int = 4) -> list[str]:
    """Explanations from a sparse dictionary: the words of the strongest features, named by what they unembed to.

    Args:
      path: safetensors with W_enc (D, F), W_dec (F, D), and optionally b_enc (F,) and b_dec (D,).
      target: the LM that names features.
      activations_ND: raw activations.
      count: number of features a text.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a missing or misshapen array.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"the dictionary {path} does not exist; give a safetensors file, or none")
    arrays, D = load_file(path), activations_ND.shape[1]
    if missing := sorted({"W_enc", "W_dec"} - set(arrays)):
        raise ValueError(f"{path} lacks {', '.join(missing)} (it holds {', '.join(sorted(arrays))})")
    encode, decode = arrays["W_enc"], arrays["W_dec"]
    if encode.shape != decode.shape[::-1] or len(encode) != D:
        raise ValueError(
            f"{path}: W_enc has shape {encode.shape} and W_dec {decode.shape}; expected ({D}, F) and (F, {D})"
        )
    centered = activations_ND - arrays.get("b_dec", np.float32(0))
    strength_NF = np.maximum(centered @ encode + arrays.get("b_enc", np.float32(0)), 0)
    top_NC = np.argsort(-strength_NF, axis=1)[:, :count]
    used = np.unique(top_NC)
    named = dict(zip(used, logit_lens_words(target, decode[used], 3), strict=True))
    return ["; ".join(", ".join(named[feature]) for feature in row) + "." for row in top_NC]


def _chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
