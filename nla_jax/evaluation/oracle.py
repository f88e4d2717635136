"""An activation oracle beside an NLA: a model of the same size that answers questions about an activation.

It is the supervised end of what can be made of activations: it learns answers that rules give from a row's context and
columns, and has no reader that rebuilds anything. Its answers to all questions, joined, make a text that the AR reads.
Shape letters: N activations, G options of a question, D model.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.splits import hash_fraction
from nla_jax.data.writers.descriptive import DescriptiveWriter
from nla_jax.data.writers.statements import STATEMENTS
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.subject import Oracle, Prediction, Subject

QUESTIONS = {
    "topic": ("What is it about?", "Which things are mentioned?", "What was said?"),
    "next": ("What comes next?", "How will it go on?", "Which words are expected?"),
    "ending": ("How does it end?", "What is the last word?", "Which words came last?"),
    "kind": ("What kind of writing is this?", "Where could it come from?", "What form does it have?"),
    "language": (
        "Which language is used?",
        "How is it written, and in what tongue?",
        "In what language is it?",
    ),
    "speakers": ("Who speaks to whom?", "Whose turn is it?", "Who is talking?"),
    "tone": ("What is the tone?", "How does it sound?", "What mood is it in?"),
    "syntax": ("What is left open?", "What is the last sentence doing?", "What has to be closed?"),
}
"""A statement of data/writers/statements -> the questions that it answers, in several wordings."""
ASKED = ("topic", "next", "ending", "kind")
"""The questions whose answers make the oracle's text about an activation."""
ANSWERS = "activation oracle's answers"


def answered_questions(rows: ActivationDataset, writer: DescriptiveWriter) -> list[tuple[int, str, str]]:
    """Every question about rows that has an answer: the row's index, the question in one of its wordings, the answer.

    Raises:
      ValueError: the rows lack their contexts.
    """
    if rows.contexts is None:
        raise ValueError(
            "an activation oracle learns from the contexts of rows, the column detokenized_text_truncated, which this "
            "data does not carry; leave the oracle out (evaluation.oracle_steps 0)"
        )
    found = []
    for row in range(len(rows)):
        facts = writer.facts(rows, row)
        for name, wordings in QUESTIONS.items():
            answer = STATEMENTS[name](facts)
            if answer is not None:
                at = hash_fraction(facts.key, seed=writer.seed, purpose=f"ask {name}")
                found.append((row, wordings[int(at * len(wordings))], answer))
    return found


def oracle_scores(
    oracle: Oracle | None, activations_ND: np.ndarray, question: str, options: Sequence[str]
) -> Float[np.ndarray, "N G"] | None:
    """`Oracle.scores`; None where there is no oracle."""
    return None if oracle is None else oracle.scores(activations_ND, question, options, desc="oracle")


def oracle_texts(oracle: Oracle, activations_ND: np.ndarray) -> list[str | None]:
    """The answers to the questions of `ASKED` about each activation as one text; None where no answer ended."""
    answers = [oracle.answers(activations_ND, QUESTIONS[name][0], desc=f"oracle: {name}") for name in ASKED]
    return [" ".join(filter(None, told)) or None for told in zip(*answers, strict=True)]


def oracle_predictions(subject: Subject) -> list[Prediction]:
    """What the ARs rebuild from the oracle's answers about held-out rows; nothing where there is no oracle."""
    if subject.oracle is None:
        return []
    data, encode = subject.data, subject.target.continuation
    texts = oracle_texts(subject.oracle, data.activations)
    tokens = Ratio.mean([len(encode(text or "")) for text in texts], data.doc_ids)
    read = [subject.read(ANSWERS, texts, "baseline", ar=ar) for ar in subject.pair]
    return [dataclasses.replace(prediction, further={"tokens": tokens}) for prediction in read]
