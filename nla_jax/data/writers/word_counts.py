"""In how many texts of a corpus each word occurs, which tells the words that mark a topic."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable

_LONG_WORD = re.compile(r"[A-Za-z][a-z]{3,}")

Split = Callable[[str], Iterable[str]]
"""Gives the words of a text, as they are counted and looked up."""


def long_words(text: str) -> list[str]:
    """The words of four letters or more of a text, in lower case."""
    return [word.lower() for word in _LONG_WORD.findall(text)]


class WordCounts:
    """In how many texts each word occurs, counted text by text: rare words mark a topic."""

    def __init__(self, texts: Iterable[str] = (), split: Split = long_words):
        """Count the given texts; `add` counts more of them, with the same result as all at once."""
        self.texts = 0
        self.frequency: Counter[str] = Counter()
        self._split = split
        self.add(texts)

    def add(self, texts: Iterable[str]) -> None:
        """Count further texts."""
        for text in texts:
            self.texts += 1
            self.frequency.update(set(self._split(text)))

    def rarity(self, word: str) -> float:
        """The inverse document frequency: log((texts + 1) / (texts with the word + 1))."""
        return math.log((self.texts + 1) / (self.frequency[word] + 1))
