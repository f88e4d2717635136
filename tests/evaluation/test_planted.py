import dataclasses
from collections import Counter

import numpy as np
import pytest
import yaml
from processes import ROOT

from nla_jax.evaluation.planted import (
    closing_tasks,
    fillers,
    request_fillers,
    request_tasks,
    sentence_fillers,
    sentence_tasks,
)
from nla_jax.evaluation.planted.cheaters import NEUTRAL_WORDS, hides
from nla_jax.evaluation.planted.tasks import tasks
from nla_jax.evaluation.rewrites import edited, keywords
from nla_jax.evaluation.text_probe import text_probe_accuracy
from nla_jax.lm.places import places
from nla_jax.lm.tokenized import tokenize_chat, tokenize_text
from nla_jax.text_analysis import ngrams, sentences, words

LAST_WORDS = 8
"""More than any explanation of the shortest form quotes."""
FILLERS = (fillers, request_fillers, sentence_fillers)


@pytest.fixture(scope="module")
def every(tiny_lm):
    """All tasks, with chats in the template of the tiny model."""
    return tasks(tiny_lm.tokenizer)


def written(task, count=96, **of):
    return [example.written for example in task.examples(count, 3, **of)]


def test_texts_never_repeat_and_labels_take_turns(every):
    for task in every:
        examples = task.examples(96, 3)
        assert len({example.context for example in examples}) == 96, task.name
        assert examples == task.examples(96, 3)
        if not task.behavior:
            counts = [sum(e.label == label for e in examples) for label in task.answers]
            assert max(counts) - min(counts) <= 1, task.name


def test_there_are_enough_fillers_for_many_examples_that_teach(every):
    for task in every:
        assert len(task.examples(240, 3, teaching=True)) == 240


def test_texts_of_two_evaluations_have_one_name_only_where_they_are_the_same():
    first, again, other = (
        {example.id: example.context for example in tasks()[1].examples(96, seed)} for seed in (0, 0, 1)
    )
    assert first == again and len(first) == 96
    assert all(first[name] == other[name] for name in first.keys() & other.keys())
    assert len(first.keys() & other.keys()) < 10


def test_a_task_without_enough_fillers_says_so():
    with pytest.raises(ValueError, match="too few fillers.*evaluation.task_examples, evaluation.task_taught"):
        dataclasses.replace(tasks()[0], write=lambda draw, label: "same").examples(2, 0)


def test_texts_after_a_shared_closing_end_in_the_same_words():
    for task in closing_tasks.tasks():
        contexts = [
            example.context
            for teaching in (False, True)
            for example in task.examples(96, 3, teaching=teaching)
        ]
        assert len({tuple(words(text)[-LAST_WORDS:]) for text in contexts}) == 1, task.name


def test_texts_are_read_where_their_place_says(every, tiny_lm):
    tokenizer = tiny_lm.tokenizer
    for task in every:
        for example in task.examples(12, 3):
            if example.messages is not None:
                source = tokenize_chat(tokenizer, example.messages)
                assert task.place == "answer_start" == places(source)[-1]
                # As the target reads the rendered text.
                assert source.text == example.context
                assert list(source.ids) == tokenizer.encode(example.context)
                assert all(line in example.context for line in example.written.split("\n"))
            elif task.place == "sentence_end":
                assert places(tokenize_text(tokenizer, example.context))[-1] == "sentence_end", task.name
            assert example.document.text == example.context
            assert example.document.messages == example.messages


def test_sentences_of_a_task_end_in_the_same_mark_but_for_questions():
    for task in sentence_tasks.tasks():
        marks = {(example.label, example.context[-1]) for example in task.examples(96, 3)}
        if task.name == "question or statement":
            assert marks == {("question", "?"), ("statement", ".")}
        else:
            assert {mark for _, mark in marks} == {"."}, task.name


def test_chats_are_left_out_without_a_template_and_system_prompts_where_it_takes_none(tiny_lm, monkeypatch):
    names = {task.name for task in tasks(tiny_lm.tokenizer)}
    assert len(names) == len(tasks(tiny_lm.tokenizer)) and "harm" in names

    def refuses(tokenizer, messages):
        if messages[0]["role"] == "system":
            raise ValueError("no system prompts")
        return tokenize_chat(tokenizer, messages)

    monkeypatch.setattr(request_tasks, "tokenize_chat", refuses)
    assert names - {task.name for task in tasks(tiny_lm.tokenizer)} == {"system prompt that refuses"}
    assert {task.place for task in tasks()} == {"shared_closing", "sentence_end"}


def test_the_length_of_a_text_hardly_tells_its_label(every):
    for task in every:
        examples = task.examples(240, 3)
        lengths_N = np.array([len(words(example.context)) for example in examples], float)
        labels_N = np.array([example.label for example in examples])
        between = sum(
            (labels_N == label).sum() * (lengths_N[labels_N == label].mean() - lengths_N.mean()) ** 2
            for label in set(labels_N)
        )
        assert between / ((lengths_N - lengths_N.mean()) ** 2).sum() < 0.1, task.name


def test_texts_that_teach_share_no_sentence_with_texts_that_are_asked_about(every):
    for task in every:
        asked, taught = (
            {sentence for text in written(task, teaching=teaching) for sentence in sentences(text)}
            for teaching in (False, True)
        )
        assert len(asked) > 10 and len(taught) > 10, task.name
        assert asked & taught == set(), task.name


def test_planted_texts_are_no_prompts_of_the_corpus(every):
    """Runs of five words are shared by no template, whatever its fillers."""
    folder = ROOT / "nla_jax" / "data" / "corpora" / "prompts"
    prompts = set()
    for path in folder.glob("*.yaml"):
        for text in strings_of(yaml.safe_load(path.read_text(encoding="utf-8"))):
            prompts |= {
                run for part in text.split("{") for run in ngrams(words(part.partition("}")[2] or part), 5)
            }
    assert len(prompts) > 500
    for task in every:
        runs = {
            run
            for text in written(task, 240) + written(task, 240, teaching=True)
            for run in ngrams(words(text), 5)
        }
        assert len(runs) > 50 and runs & prompts == set(), (task.name, runs & prompts)


def strings_of(value):
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict | list):
        return [
            text
            for part in (value.values() if isinstance(value, dict) else value)
            for text in strings_of(part)
        ]
    return []


def test_both_halves_of_every_list_of_fillers_are_as_long():
    named = [value for module in FILLERS for value in vars(module).values()]
    lists = [value for value in named if isinstance(value, tuple)]
    by_label = [value for name in named if isinstance(name, dict) for value in name.values()]
    lists += [values for values in by_label if isinstance(values, tuple) and len(set(values)) > 2]
    assert len(lists) > 50
    assert all(len(values) % 2 == 0 and len(set(values)) == len(values) for values in lists)


def test_hidden_labels_are_told_by_the_order_of_words_alone():
    labels = ["likes", "dislikes"] * 60
    texts = hides(labels, seed=0)
    of_label = {
        label: [text for text, own in zip(texts, labels, strict=True) if own == label]
        for label in set(labels)
    }
    # No word belongs to one label.
    counts = {
        label: Counter(word for text in some for word in words(text)) for label, some in of_label.items()
    }
    assert {*counts["likes"]} == {*counts["dislikes"]} == {*NEUTRAL_WORDS, "a", "passage", "and"}
    assert not {*words(" ".join(texts))} & {"likes", "dislikes", "writer", "good", "bad"}
    assert text_probe_accuracy(texts[:60], labels[:60], texts[60:], labels[60:]) > 0.95
    reworded = edited(texts, keywords, quotes=False, seed=0)
    assert text_probe_accuracy(reworded[:60], labels[:60], reworded[60:], labels[60:]) < 0.7
    with pytest.raises(ValueError, match="tells one of two labels, and there are a, b, c"):
        hides(["a", "b", "c"], seed=0)
