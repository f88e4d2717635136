import dataclasses

import numpy as np
import pytest

from nla_jax.data.writers.descriptive import DescriptiveConfig, DescriptiveWriter
from nla_jax.data.writers.statements import STATEMENTS
from nla_jax.data.writers.word_counts import WordCounts
from nla_jax.evaluation import oracle
from nla_jax.evaluation.oracle import ANSWERS, ASKED, QUESTIONS


class Parrot:
    """An oracle that answers with the question's first word, and ends no answer about negative activations."""

    def scores(self, activations_ND, question, options, desc=None):
        return np.array([[len(option) for option in options]] * len(activations_ND), float)

    def answers(self, activations_ND, question, desc=None):
        return [question.split()[0] if h.sum() > 0 else None for h in activations_ND]


@pytest.fixture(scope="module")
def writer(subject):
    return DescriptiveWriter(DescriptiveConfig(), seed=0, words=WordCounts(subject.data.contexts))


def test_every_statement_answers_questions():
    assert QUESTIONS.keys() == STATEMENTS.keys() and set(ASKED) <= QUESTIONS.keys()
    wordings = [wording for of_one in QUESTIONS.values() for wording in of_one]
    assert len(set(wordings)) == len(wordings)


def test_answers_are_the_statements_about_a_row(subject, writer):
    found = oracle.answered_questions(subject.data, writer)
    statement_of = {wording: name for name, wordings in QUESTIONS.items() for wording in wordings}
    for row, question, answer in found[:40]:
        assert answer == STATEMENTS[statement_of[question]](writer.facts(subject.data, row))
    # No question is asked twice of a row, and none that has no answer.
    asked = [(row, statement_of[question]) for row, question, _ in found]
    assert len(set(asked)) == len(asked)
    assert {row for row, _ in asked} == set(range(len(subject.data)))
    # Wordings take turns.
    assert len({question for _, question, _ in found}) > len(set(statement_of[q] for _, q, _ in found))


def test_rows_without_contexts_are_refused(subject, writer):
    bare = dataclasses.replace(subject.data, contexts=None)
    with pytest.raises(ValueError, match="learns from the contexts .* leave the oracle out"):
        oracle.answered_questions(bare, writer)


def test_joined_answers_make_a_text():
    texts = oracle.oracle_texts(Parrot(), np.float32([[1, 2], [-3, 1]]))
    assert texts == [" ".join(QUESTIONS[name][0].split()[0] for name in ASKED), None]


def test_the_text_is_read_like_any_other(subject):
    assert oracle.oracle_predictions(subject) == []
    asked = dataclasses.replace(subject, oracle=Parrot())
    lines = [asked.line(prediction) for prediction in oracle.oracle_predictions(asked)]
    assert [(line.name, line.labels["AR"]) for line in lines] == [(ANSWERS, "own"), (ANSWERS, "judge")]
    failed = lines[0].figures["failed"].estimate().value
    assert failed == np.mean(subject.data.activations.sum(axis=1) <= 0)
    assert lines[0].figures["tokens"].estimate().value > 0


def test_scores_where_there_is_an_oracle():
    assert oracle.oracle_scores(None, np.zeros((2, 3)), "Which?", ["a", "bcd"]) is None
    scores = oracle.oracle_scores(Parrot(), np.zeros((2, 3)), "Which?", ["a", "bcd"])
    np.testing.assert_array_equal(scores, [[1, 3], [1, 3]])
