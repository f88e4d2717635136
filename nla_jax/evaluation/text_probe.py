"""The text probe: what the words of explanations hold about a label, without a reader who has to understand them.

Logistic regression on the words and pairs of neighboring words of some explanations, tested on others. It finds what
is said in plain words and what is hidden in odd ones alike, so it stands beside a reader and not in his place.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from nla_jax.text_analysis import words

FEWEST_EXAMPLES = 4
"""Examples that each of two labels needs at least for a probe to learn from."""
REGULARIZATION = 10.0
"""The inverse strength of the penalty, the same for all texts and tasks, so that no figure is the best of several. Rows
of tf-idf have length 1, so a word of a text of twenty needs a weight of several units to decide; the library's default
of 1 keeps weights below that."""


def teachable(labels: Sequence[str]) -> bool:
    """Whether two labels at least have FEWEST_EXAMPLES examples each."""
    return sum(count >= FEWEST_EXAMPLES for count in Counter(labels).values()) > 1


def predicted_labels(
    texts: Sequence[str | None], taught_texts: Sequence[str | None], taught_labels: Sequence[str]
) -> np.ndarray:
    """The label that the probe gives each text.

    Args:
      texts: explanations that are asked about; None, for one that failed, counts as a text without words.
      taught_texts: explanations that the probe learns from.
      taught_labels: the label of each of those.

    Returns:
      one label for each text.

    Raises:
      ValueError: fewer than two labels with FEWEST_EXAMPLES examples each, or not one label for each text.
    """
    if len(taught_texts) != len(taught_labels):
        raise ValueError(
            f"{len(taught_texts)} texts with {len(taught_labels)} labels teach the text probe; give one label for each"
        )
    if not teachable(taught_labels):
        raise ValueError(
            f"the text probe learns from {dict(Counter(taught_labels))}; it needs two labels with {FEWEST_EXAMPLES} "
            "examples each at least: give more examples, such as with evaluation.task_taught"
        )
    asked, taught = ([text or "" for text in some] for some in (texts, taught_texts))
    if not any(words(text) for text in taught):
        return np.full(len(asked), Counter(taught_labels).most_common(1)[0][0])
    probe = make_pipeline(
        TfidfVectorizer(
            tokenizer=words, token_pattern=None, lowercase=False, ngram_range=(1, 2), sublinear_tf=True
        ),
        LogisticRegression(C=REGULARIZATION, max_iter=500),
    )
    return probe.fit(taught, np.asarray(taught_labels)).predict(asked)


def text_probe_accuracy(
    texts: Sequence[str | None],
    labels: Sequence[str],
    taught_texts: Sequence[str | None],
    taught_labels: Sequence[str],
) -> float:
    """The share of texts that the probe labels rightly; arguments and errors as in `predicted_labels`.

    Args:
      texts: explanations that are asked about.
      labels: the right label of each.
      taught_texts: explanations that the probe learns from.
      taught_labels: the label of each of those.
    """
    if not labels or len(texts) != len(labels):
        raise ValueError(
            f"{len(texts)} texts with {len(labels)} labels are asked about; give one label for each text"
        )
    return float((predicted_labels(texts, taught_texts, taught_labels) == np.asarray(labels)).mean())
