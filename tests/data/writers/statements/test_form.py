"""Endings and what sentences are doing."""

import pytest

from nla_jax.data.writers.statements.facts import Facts
from nla_jax.data.writers.statements.form import ending, marks, open_parts, person_of, syntax, tense_of


def facts(context, place="inside", **fields) -> Facts:
    return Facts("key", 0, context, place, **fields)


def test_the_last_words_are_quoted():
    assert '"the wall"' in ending(facts("He stood at the wall"))
    assert '"say \'no"' in ending(facts('They say "no'))
    assert '"end. newline"' in ending(facts("It will end.\n", "line_end"))
    assert '"她今天很好。"' in ending(facts("我们说她今天很好。", "sentence_end"))  # Six characters at most.
    assert ending(facts("He stood", "span")) is None and ending(facts("", "inside")) is None
    assert ending(facts("He stood", ending_words=0)) is None
    assert '"Hi there"' in ending(facts("<|im_start|>user\nHi there", role="user"))


@pytest.mark.parametrize(
    ("sentence", "found"),
    [
        ("The mayor (a lawyer", ["bracket open"]),
        ('He said: "I am', ["quotation open"]),
        ("Use `np.mean", ["code span open"]),
        ("He left because it", ["because-clause"]),
        ("If it rains, the man", []),
        ("The man who", ["relative clause"]),
        ("Bread, milk, eggs, salt", ["enumeration"]),
        ("The mayor (a lawyer) of the town", []),
    ],
)
def test_what_is_open(sentence, found):
    assert open_parts(sentence) == found


def test_what_the_last_mark_says():
    assert marks("Is it late?") == ["question"] and marks('He cried "go!"') == ["exclamation"]
    assert marks("These are:") == ["colon"] and marks("It is late.") == [] and marks("") == []


@pytest.mark.parametrize(
    ("sentence", "tense"),
    [
        ("They will come.", "future"),
        ("She has finished the work.", "perfect"),
        ("He walked home.", "past"),
        ("The mayor praised the jury.", "past"),
        ("It would help.", "conditional"),
        ("The array is reshaped and returned.", "present"),
        ("Arguments passed to a function.", None),
        ("I'm told that it was late.", "present"),
    ],
)
def test_tenses(sentence, tense):
    assert tense_of(sentence) == tense


@pytest.mark.parametrize(
    ("sentence", "person"),
    [
        ("I saw her.", "first person"),
        ("We left our house.", "first person plural"),
        ("Take your time.", "second person"),
        ("The dog saw him.", "about him"),
        ("The dog barked.", None),
    ],
)
def test_persons(sentence, person):
    assert person_of(sentence) == person


def test_two_parts_at_most_and_only_english_verbs():
    text = syntax(facts("We were late because the bus (an old one"))
    assert text.count(",") == 1 and "racket open" in text
    assert syntax(facts("The function is called with arguments and returns an array")) is None
    assert syntax(facts("Der Mann war in der Stadt mit dem Hund")) is None
    asked = facts("<|im_start|>user\nWhat was the man doing there?<|im_end|>", "turn_end", role="user")
    assert "uestion" not in syntax(asked)  # What a user wants is another statement.
