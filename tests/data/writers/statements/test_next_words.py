"""Expected words, worded by how sure the target is."""

import pytest

from nla_jax.data.writers.statements.facts import Facts
from nla_jax.data.writers.statements.next_words import certainty_of, next_words
from nla_jax.text_analysis import claims, words

WORDS = ("of", "to", "in", "at")


def facts(probabilities=(), place="inside", expected=WORDS, key="key", **fields) -> Facts:
    return Facts(key, 0, "It is", place, next_words=expected, next_probabilities=probabilities, **fields)


@pytest.mark.parametrize(
    ("first", "name"),
    [(0.9, "certain"), (0.8, "certain"), (0.79, "likely"), (0.39, "unsure"), (0.11, "open")],
)
def test_certainty_follows_the_first_probability(first, name):
    assert certainty_of([first, 0.05]) == name and certainty_of(()) == "unknown"


@pytest.mark.parametrize(("first", "count"), [(0.95, 1), (0.5, 2), (0.2, 3), (0.05, 3)])
def test_the_surer_the_fewer_words(first, count):
    for place in ("inside", "answer_start"):
        said = words(next_words(facts((first, 0.01, 0.01, 0.01), place)))
        assert [word for word in WORDS if word in said] == list(WORDS[:count])


def test_every_wording_is_a_claim_about_what_comes_next():
    for place in ("inside", "answer_start"):
        for first in (0.9, 0.5, 0.2, 0.05):
            for key in range(24):
                text = next_words(facts((first,), place, ("zebra",), str(key)))
                assert [claim.kind for claim in claims(text)] == ["expectation"], text


def test_marks_have_names_and_bounds_hold():
    assert "comma" in next_words(facts((0.9,), expected=(",",)))
    assert "to" not in words(next_words(facts(listed_words=1))) and next_words(facts(listed_words=0)) is None
    assert next_words(facts(expected=())) is None


def test_a_line_break_is_told_where_it_is_likely():
    expected = ("newline", "He")
    assert "newline" not in next_words(facts((0.2, 0.1), "sentence_end", expected))
    assert "newline" in next_words(facts((0.9, 0.1), "sentence_end", expected))
    assert "newline" in next_words(facts((0.2, 0.1), "inside", expected))
