import dataclasses

import numpy as np
import pytest

from nla_jax.evaluation.planted import fillers
from nla_jax.evaluation.planted.tasks import tasks
from nla_jax.text_analysis import sentences, words

TASKS = pytest.mark.parametrize("task", tasks(), ids=lambda task: task.name)
LAST_WORDS = 8
"""More than any explanation of the built-in form quotes."""


def contexts(task, count=96, **of):
    return [example.context for example in task.examples(count, 3, **of)]


@TASKS
def test_texts_never_repeat_and_labels_take_turns(task):
    examples = task.examples(96, 3)
    assert len({example.context for example in examples}) == 96
    assert examples == task.examples(96, 3)
    if not task.behavior:
        counts = [sum(e.label == label for e in examples) for label in task.answers]
        assert max(counts) - min(counts) <= 1


def test_texts_of_two_evaluations_have_one_name_only_where_they_are_the_same():
    first, again, other = (
        {example.id: example.context for example in tasks()[1].examples(96, seed)} for seed in (0, 0, 1)
    )
    assert first == again and len(first) == 96
    assert all(first[name] == other[name] for name in first.keys() & other.keys())
    assert len(first.keys() & other.keys()) < 10


def test_a_task_without_enough_fillers_says_so():
    with pytest.raises(ValueError, match="too few fillers.*evaluation.task_examples"):
        dataclasses.replace(tasks()[0], write=lambda draw, label: "same").examples(2, 0)


@TASKS
def test_all_texts_of_a_task_end_in_the_same_words(task):
    texts = contexts(task) + contexts(task, teaching=True)
    assert len({tuple(words(text)[-LAST_WORDS:]) for text in texts}) == 1
    assert len({text[-len(task.closing) :] for text in texts}) == 1


@TASKS
def test_the_length_of_a_text_hardly_tells_its_label(task):
    examples = task.examples(240, 3)
    lengths_N = np.array([len(words(example.context)) for example in examples], float)
    labels_N = np.array([example.label for example in examples])
    between = sum(
        (labels_N == label).sum() * (lengths_N[labels_N == label].mean() - lengths_N.mean()) ** 2
        for label in set(labels_N)
    )
    assert between / ((lengths_N - lengths_N.mean()) ** 2).sum() < 0.1


@TASKS
def test_texts_that_teach_share_no_sentence_with_texts_that_are_asked_about(task):
    asked, taught = (
        {
            sentence
            for text in contexts(task, teaching=teaching)
            for sentence in sentences(text.removesuffix(task.closing))
        }
        for teaching in (False, True)
    )
    assert len(asked) > 10 and len(taught) > 10
    assert asked & taught == set()


def test_both_halves_of_every_list_of_fillers_are_as_long():
    lists = [value for value in vars(fillers).values() if isinstance(value, tuple)]
    named = (fillers.LANGUAGES, fillers.WORK, fillers.WHERE, fillers.MOTIVES)
    lists += [values for by_label in named for values in by_label.values()]
    assert all(len(values) % 2 == 0 and len(set(values)) == len(values) for values in lists)
