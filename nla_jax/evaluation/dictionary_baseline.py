"""A sparse dictionary beside an NLA: its code of an activation as a vector, and the names of its features as a text.

A feature has two names. One says what its direction unembeds to, the other which words end the contexts in which the
feature is strongest among training rows. The AR reads the texts that are made of either, on training rows that gave no
name, and those names are taken through which it explains more. Shape letters: N rows, D model, F features, C named
features of a row.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from nla_jax.autoencoder import metrics
from nla_jax.data.dataset import ActivationDataset
from nla_jax.evaluation.baselines import logit_lens_words
from nla_jax.evaluation.dictionaries import (
    SparseDictionary,
    StrengthCode,
    code_bits,
    strongest,
    strongest_features,
)
from nla_jax.evaluation.dictionary_files import read_dictionary
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.subject import Prediction, Subject
from nla_jax.evaluation.tables import Row, Table

NAMED = 4
"""Features that a text names, the strongest ones."""
NAME_WORDS = 3
"""Words of a feature's name."""
NAMING_ROWS = 12
"""Training rows whose last words may name a feature: those in which it is strongest."""
STRENGTH_BITS = 4
WORDS = "sparse dictionary words"
CODE = "sparse dictionary code"
NAMED_CODE = f"sparse dictionary code of the {NAMED} strongest features"

Names = Mapping[int, Sequence[str]]
"""The words that name each feature, by its index."""


def open_dictionary(subject: Subject) -> SparseDictionary | None:
    """The dictionary that the config names, checked against the data; None where it names none.

    Raises:
      FileNotFoundError, ValueError: as `read_dictionary`.
    """
    if subject.config.dictionary is None:
        return None
    extraction = subject.data.sidecar.extraction
    return read_dictionary(
        subject.config.dictionary, layer=extraction.layer_index, d_model=extraction.d_model
    )


def dictionary_predictions(subject: Subject) -> list[Prediction]:
    """What a dictionary's words and codes predict of the held-out rows; nothing where the config names none."""
    baseline = _baseline(subject)
    if baseline is None:
        return []
    read = [subject.read(WORDS, baseline.best_texts, "baseline", ar=ar) for ar in subject.pair]
    return read + baseline.codes()


def dictionary_tables(subject: Subject) -> list[Table]:
    """A table of everything that was measured of the dictionary; none where the config names no dictionary."""
    baseline = _baseline(subject)
    if baseline is None:
        return []
    dictionary, judge = baseline.dictionary, subject.judge
    lines = [subject.line(prediction) for prediction in [baseline.whole(), *baseline.codes()]]
    for name, texts in baseline.texts.items():
        figures = dict(subject.text_figures(judge, texts))
        if name in baseline.naming_figures:
            figures["on training rows"] = baseline.naming_figures[name].estimate()
        lines.append(Row(f"words: {name}", figures, group="baseline", labels={"AR": judge}, ids=subject.ids))
    return [
        Table(
            name="dictionary",
            title="Sparse dictionary",
            note=f"{dictionary.source}, {dictionary.features:,} features. Features: how many are active. Bits: what it "
            f"takes to say how many are active, which ones, and how strong each is in {STRENGTH_BITS} bits. Words: the "
            f"names of the {NAMED} strongest features as a text, by what their directions unembed to, and by the last "
            "words of the training rows in which they are strongest. On training rows: the fve_nrm by which the better "
            "names are chosen, on rows that named nothing.",
            rows=lines,
        )
    ]


@functools.lru_cache(maxsize=1)
def _baseline(subject: Subject) -> "DictionaryBaseline | None":
    """The baseline of a subject, made once."""
    dictionary = open_dictionary(subject)
    return None if dictionary is None else DictionaryBaseline(subject, dictionary)


@dataclasses.dataclass(eq=False)
class DictionaryBaseline:
    """A dictionary that is measured on the rows of a subject."""

    subject: Subject
    dictionary: SparseDictionary

    @functools.cached_property
    def strength_NF(self) -> Float[np.ndarray, "N F"]:
        """The strengths of all features in the held-out rows."""
        return self.dictionary.strengths(self.subject.data.activations)

    @functools.cached_property
    def chosen_by(self) -> ActivationDataset | None:
        """The training rows that choose among names; the others give the names."""
        training = self.subject.training
        return None if training is None else training.take(slice(0, self._choosing))

    @property
    def _choosing(self) -> int:
        return min(self.subject.config.rows, len(self.subject.training) // 2)

    def whole(self) -> Prediction:
        """What is rebuilt from the strengths as they are: more than can be written down in bits."""
        strength_NF = self.strength_NF
        return self._prediction("sparse dictionary, all active features", strength_NF, strength_NF)

    def codes(self) -> list[Prediction]:
        """What is rebuilt from rounded strengths, of all active features and of those that a text names."""
        training = self.subject.training
        if training is None:
            return []
        part = training.take(slice(0, self.subject.config.rows))
        strengths_S = self.dictionary.strengths(part.activations)
        code = StrengthCode.fit(strengths_S[strengths_S > 0], STRENGTH_BITS)
        kept = {CODE: self.strength_NF, NAMED_CODE: strongest(self.strength_NF, NAMED)}
        return [self._prediction(name, code(kept_NF), kept_NF, bits=True) for name, kept_NF in kept.items()]

    def _prediction(
        self, name: str, decoded_NF: np.ndarray, active_NF: np.ndarray, *, bits: bool = False
    ) -> Prediction:
        data, dictionary = self.subject.data, self.dictionary
        active_N = (active_NF > 0).sum(axis=1)
        further = {"features": Ratio.mean(active_N, data.doc_ids)}
        if bits:
            bits_N = code_bits(active_N, dictionary.features, STRENGTH_BITS)
            further["bits"] = Ratio.mean(bits_N, data.doc_ids)
        # Where activations are normalized, their norms are no part of the code, and raw vectors are not rebuilt.
        scale = 1.0 if dictionary.normalization == "none" else None
        vectors_ND = dictionary.decode(decoded_NF, data.activations)
        return Prediction(name, vectors_ND, "baseline", scale=scale, further=further)

    @functools.cached_property
    def texts(self) -> dict[str, list[str]]:
        """A text about each held-out row, by each kind of names."""
        return self._texts_of(self.strength_NF)

    @functools.cached_property
    def naming_figures(self) -> dict[str, Ratio]:
        """What the judge explains through each kind of names, on training rows that gave none."""
        chosen_by, subject = self.chosen_by, self.subject
        if chosen_by is None or not len(chosen_by):
            return {}
        texts_by = self._texts_of(self.dictionary.strengths(chosen_by.activations))
        figures = {}
        for name, texts in texts_by.items():
            rebuilt_ND = subject.rebuilt(subject.judge, texts)
            terms = metrics.fve_nrm_terms(
                rebuilt_ND, chosen_by.activations, subject.yardstick.normalized_mean_D
            )
            figures[name] = Ratio.explained(*terms, chosen_by.doc_ids)
        return figures

    @property
    def best_texts(self) -> list[str]:
        """The texts of the names through which the judge explains more of training rows."""
        explained = {
            name: figure.numerator_N.sum() / figure.denominator_N.sum()
            for name, figure in self.naming_figures.items()
        }
        return self.texts[max(self.texts, key=lambda name: explained.get(name, -np.inf))]

    def _texts_of(self, strength_NF: Float[np.ndarray, "N F"]) -> dict[str, list[str]]:
        feature_NC = strongest_features(strength_NF, NAMED)
        is_active_NC = np.take_along_axis(strength_NF, feature_NC, axis=1) > 0
        used = np.unique(feature_NC)
        names = {"what features unembed to": self._unembedded(used)}
        if self.subject.training is not None and self.subject.training.contexts is not None:
            names["where features are strongest"] = self._ended(used)
        named = [row[active].tolist() for row, active in zip(feature_NC, is_active_NC, strict=True)]
        return {kind: [_text(features, of_kind) for features in named] for kind, of_kind in names.items()}

    def _unembedded(self, features: np.ndarray) -> Names:
        words = logit_lens_words(self.subject.target, self.dictionary.decode_FD[features], NAME_WORDS)
        return dict(zip(features.tolist(), words, strict=True))

    def _ended(self, features: np.ndarray) -> Names:
        training = self.subject.training
        naming = training.take(slice(self._choosing, None))
        row_of = strongest_rows(self.dictionary, naming.activations, features, NAMING_ROWS)
        return {
            feature: _commonest(last_word(naming.contexts[row]) for row in rows)
            for feature, rows in row_of.items()
        }


def _commonest(words: Iterable[str]) -> list[str]:
    return [word for word, _ in Counter(filter(None, words)).most_common(NAME_WORDS)]


def strongest_rows(
    dictionary: SparseDictionary,
    activations_ND: Float[np.ndarray, "N D"],
    features: Int[np.ndarray, "C"],
    count: int,
) -> dict[int, list[int]]:
    """For each of some features, the rows in which it is strongest, at most `count`, the strongest first."""
    best_RC, row_RC = np.zeros((0, len(features)), np.float32), np.zeros((0, len(features)), int)
    for part, strength_BF in dictionary.in_parts(activations_ND):
        strength_BC = strength_BF[:, features]
        row_BC = np.broadcast_to(np.arange(part.start, part.stop)[:, None], strength_BC.shape)
        best_RC, row_RC = np.concatenate([best_RC, strength_BC]), np.concatenate([row_RC, row_BC])
        order_RC = np.argsort(-best_RC, axis=0, kind="stable")[:count]
        best_RC, row_RC = (np.take_along_axis(of_RC, order_RC, axis=0) for of_RC in (best_RC, row_RC))
    return {int(feature): row_RC[best_RC[:, at] > 0, at].tolist() for at, feature in enumerate(features)}


def last_word(context: str) -> str:
    """The last word of a context, or the signs that it ends with; empty where it is blank."""
    found = re.findall(r"\w+|[^\w\s]+", context[-80:])
    return found[-1] if found else ""


def _text(features: Sequence[int], names: Names) -> str:
    """The names of features in a row; those that have none are left out."""
    named = [", ".join(names[feature]) for feature in features]
    return "; ".join(name for name in named if name) + "."
