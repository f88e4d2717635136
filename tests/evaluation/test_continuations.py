import re

import numpy as np
import pytest

from nla_jax.evaluation.continuations import OPTION_WORDS, Continuation, continuation, elsewhere, options

TEXT = (
    "Ships came, and went; un-\ntil the harbor (old as it was) froze.\n\n"
    "Nobody had seen  such ice before that winter, said Anna, who kept the lighthouse.\n    "
    "She counted the days on a wall and burned what wood there was in the old stove."
)


@pytest.mark.parametrize("at", range(1, len(TEXT)))
def test_the_true_words_are_joined_as_they_stand_in_the_text(at):
    before, after = TEXT[:at], TEXT[at:]
    found = continuation(before, after)
    inside = not (before[-1].isspace() or after[0].isspace())
    if inside or len(after.split()) <= OPTION_WORDS:
        assert found is None
    else:
        assert TEXT.startswith(before + found.blank + found.words)
        assert not found.words[0].isspace()
        assert found.line.split() == after.split()[:OPTION_WORDS]
        assert found.starts_line == ("\n" in re.search(r"\s*$", before)[0] + found.blank)


def test_a_last_word_that_may_be_cut_off_is_none_of_the_words():
    assert continuation("Then", " one two three four five si") is None
    assert continuation("Then", " one two three four five six ").words == "one two three four five six"


def test_other_places_are_six_words_away_and_those_that_were_read_come_last():
    starts = [match.start() for match in re.finditer(r"(?<=\s)\S", TEXT)]
    at = TEXT.index("such ice")
    here = starts.index(at)
    found = elsewhere(TEXT, at, np.random.default_rng(0))
    # Words are told apart by their first occurrence, which is their only one in this text.
    places = [starts.index(re.search(rf"(?<=\s){re.escape(one.words)}\s", TEXT).start()) for one in found]
    assert len(set(places)) == len(places) == len(starts) - (2 * OPTION_WORDS - 1) - OPTION_WORDS
    assert all(abs(place - here) >= OPTION_WORDS for place in places)
    read = [place < here for place in places]
    assert read == sorted(read) and len(set(read)) == 2
    assert elsewhere("Too short.", 4, np.random.default_rng(0)) == []


def test_a_distractor_begins_a_line_only_where_the_true_one_does():
    def place(words, starts_line):
        return Continuation(" ", words, starts_line)

    others = [place("a b", False), place("c d", True), place("own  words", False), place("e f", False)]
    assert options(place("own words", False), others, 2) == ["own words", "a b", "e f"]
    assert options(place("own words", True), others, 1) == ["own words", "c d"]
    assert options(place("own words", False), [*others, place("a  b", False)], 3) is None
