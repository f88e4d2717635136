"""Planted systems whose figures are known: the oracle, the mean, and cheaters that an evaluation must find out."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from nla_jax.autoencoder import metrics
from nla_jax.evaluation.subject import Subject, Texts
from nla_jax.text_analysis import words

CODE_BITS = 64
"""Number of principal directions whose signs the private code writes down."""


def oracle(subject: Subject) -> Subject:
    """An NLA that loses nothing: its texts name the row, and every AR looks the row up."""
    table = {f"row {i}": h for i, h in enumerate(subject.data.activations)}
    names = list(table)

    def write(activations_ND, **_):
        distance = ((activations_ND[:, None] - subject.data.activations[None]) ** 2).sum(axis=-1)
        return [names[i] for i in distance.argmin(axis=1)]

    def read(texts):
        return np.stack([table.get(text or "", subject.yardstick.mean_D) for text in texts])

    return _replaced(subject, write, dict.fromkeys(subject.reconstructors, read), _Raw, training=None)


def mean(subject: Subject) -> Subject:
    """An NLA whose ARs answer the training mean, whatever is written."""

    def read(texts):
        return np.broadcast_to(subject.yardstick.mean_D, (len(texts), len(subject.yardstick.mean_D)))

    readers = dict.fromkeys(subject.reconstructors, read)
    return _replaced(subject, lambda h, **_: ["A text."] * len(h), readers, _Raw, training=None)


def copier(subject: Subject, count: int = 12) -> Subject:
    """An AV that writes down the end of the context, which it should not see; the subject's ARs read it."""
    data = subject.data
    tails = [" ".join(words(context)[-count:]) for context in data.contexts]

    def write(activations_ND, **_):
        distance = ((activations_ND[:, None] - data.activations[None]) ** 2).sum(axis=-1)
        return [tails[i] for i in distance.argmin(axis=1)]

    return _replaced(subject, write, subject.reconstructors)


def private_code(subject: Subject) -> Subject:
    """An AV and its own AR that use made-up words for the signs of principal directions; judges are the subject's."""
    fitted_MD = subject.data.activations if subject.training is None else subject.training.activations
    unit_MD = np.asarray(metrics.normalize(fitted_MD))
    center_D = unit_MD.mean(axis=0)
    _, _, axes_KD = np.linalg.svd(unit_MD - center_D, full_matrices=False)
    axes_KD = axes_KD[:CODE_BITS]
    # A sign stands for the mean absolute score of its direction.
    size_K = np.abs((unit_MD - center_D) @ axes_KD.T).mean(axis=0)
    syllables = [a + b for a in "bdfgklmn" for b in "aeio"][:16] + [
        a + b for a in "prstvwxz" for b in "aeio"
    ][:16]

    def write(activations_ND, **_):
        signs_NK = (np.asarray(metrics.normalize(activations_ND)) - center_D) @ axes_KD.T > 0
        return [
            " ".join(
                "".join(syllables[2 * (i % 8) + bit] for i, bit in enumerate(word.astype(int)))
                for word in np.array_split(row, CODE_BITS // 4)
            )
            for row in signs_NK
        ]

    def read(texts):
        rows = []
        for text in texts:
            bits = [
                syllables.index(part[i : i + 2]) % 2 if part[i : i + 2] in syllables else 0.5
                for part in (text or "").split()
                for i in range(0, len(part), 2)
            ][: len(axes_KD)]
            bits = np.array([*bits, *[0.5] * (len(axes_KD) - len(bits))])
            rows.append(center_D + ((2 * bits - 1) * size_K) @ axes_KD)
        return np.stack(rows).astype(np.float32)

    return _replaced(subject, write, {**subject.reconstructors, "own": read})


NEUTRAL_WORDS = ("calm", "even", "level", "mild", "plain", "quiet", "simple", "steady", "usual")
"""Words that go with anything, in the order of the alphabet."""


def hides(labels: Sequence[str], seed: int) -> Texts:
    """Texts that tell the labels by nothing but the order of words that fit them all.

    Somebody who does not know of the order learns nothing from them, and a probe on pairs of words learns everything.
    The words themselves are drawn without a look at the label.

    Args:
      labels: one of two labels for each text.
      seed: of the words.

    Raises:
      ValueError: more than two labels, which one order cannot tell.
    """
    names, rng = sorted(set(labels)), np.random.default_rng(seed)
    if len(names) > 2:
        raise ValueError(f"an order of words tells one of two labels, and there are {', '.join(names)}")
    texts = []
    for label in labels:
        chosen = sorted(rng.choice(NEUTRAL_WORDS, size=5, replace=False), reverse=names.index(label) == 1)
        texts.append(f"A passage, {', '.join(chosen[:-1])} and {chosen[-1]}.")
    return texts


class _Raw(Subject):
    """A subject whose ARs rebuild vectors of true norms."""

    def scale(self, reconstructor: str) -> float:
        return 1.0


def _replaced(subject: Subject, write, reconstructors, kind: type[Subject] = Subject, **others) -> Subject:
    kept = {field.name: getattr(subject, field.name) for field in dataclasses.fields(subject)}
    changed = {
        "verbalizers": {"planted": write},
        "reconstructors": reconstructors,
        "tokens_of": None,
        "marker": None,
    }
    return kind(**{**kept, **changed, **others})
