"""Continuations of texts as options of a question: the true one, and distractors cut at the same kind of place.

Only places between two words are asked about. Inside a word, or before a mark, the true continuation would be told from
distractors by its first letters alone.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

OPTION_WORDS = 6
"""Number of words of a continuation."""

# The last word is followed by white space: the end of a stored continuation can lie inside a word.
_WORDS = re.compile(rf"(\s*)(\S+(?:\s+\S+){{{OPTION_WORDS - 1}}})(?=\s)")
_WORD_START = re.compile(r"(?<=\s)\S")


@dataclasses.dataclass(frozen=True)
class Continuation:
    """The next words after a place between two words of a text."""

    blank: str
    """The white space before the first word; empty where the text before the place ends in white space."""
    words: str
    """The next OPTION_WORDS words as they stand in the text, with the white space between them."""
    starts_line: bool
    """Whether a line break stands before the first word."""

    @property
    def line(self) -> str:
        """The words in one line, with single blanks between them."""
        return " ".join(self.words.split())


def continuation(before: str, after: str) -> Continuation | None:
    """What follows a place in a text; None where the place lies inside a word, or too few whole words follow.

    Args:
      before: the text up to the place.
      after: the text from there on, of which the last word may be cut off.
    """
    found = _WORDS.match(after)
    if found is None or not (found[1] or before[-1:].isspace()):
        return None
    between = before[len(before.rstrip()) :] + found[1]
    return Continuation(found[1], found[2], "\n" in between)


def elsewhere(text: str, at: int, rng: np.random.Generator) -> list[Continuation]:
    """What follows other places of a text, in a random order, those before the place `at` last.

    An LM that has read the words before the place likes to repeat them.

    Args:
      text: any text.
      at: index of the character that the true continuation begins with; places less than OPTION_WORDS words away from
        it are left out.
      rng: chooses the order.
    """
    starts = [match.start() for match in _WORD_START.finditer(text)]
    here = sum(start < at for start in starts)
    far = [i for i in range(len(starts)) if abs(i - here) >= OPTION_WORDS]
    order = sorted(far and rng.permutation(far).tolist(), key=lambda i: i < here)
    found = [continuation(text[: starts[i]], text[starts[i] :]) for i in order]
    return [one for one in found if one is not None]


def options(own: Continuation, others: Sequence[Continuation], count: int) -> list[str] | None:
    """The words of the true continuation, then of `count` others of its kind, in their order; None if there are fewer.

    Of one kind are places that begin a line, and places that do not.
    """
    alike = {
        other.line: other.words
        for other in others
        if other.starts_line == own.starts_line and other.line != own.line
    }
    return [own.words, *[*alike.values()][:count]] if len(alike) >= count else None
