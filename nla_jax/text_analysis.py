"""Analysis of texts without a model: copying, repetition, and the claims that an explanation makes.

All functions are pure functions of strings. Words are compared in lower case; stems are those of the Snowball stemmer
for English.
"""

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

import numpy as np
import snowballstemmer

_WORD = re.compile(r"[^\W_]+(?:['’][^\W\d_]+)?")
QUOTE = re.compile(r'"([^"\n]+)"|“([^”\n]+)”|`([^`\n]+)`|«([^»\n]+)»')
"""A quoted span, its marks included."""
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"”»')\]]*\s+")
_EXPECTATION = re.compile(
    r"\b(next|then|likely|likelier|expects?|expected|predicts?|continues?|follows)\b", re.I
)
# A capital inside a sentence, a digit, or a name as programs write them.
_NAME = re.compile(r"(?<=[\w,;:] )[A-Z]\w+|\b\w*\d\w*\b|\b\w+(?:[_.]\w+)+\b|\b[a-z]+[A-Z]\w*\b")

Kind = Literal["theme", "entity", "detail", "expectation"]
KINDS: dict[Kind, str] = {
    "theme": "a sentence about what the text is",
    "entity": "a sentence that names something or counts",
    "detail": "a quoted span",
    "expectation": "a sentence about what comes next",
}


@functools.cache
def _stemmer() -> object:
    return snowballstemmer.stemmer("english")


@functools.lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """The stem of a word: the word without its endings."""
    return _stemmer().stemWord(word)


def words(text: str) -> list[str]:
    """The words and numbers of a text, in lower case; marks and line breaks are not words."""
    return [word.lower() for word in _WORD.findall(text)]


def ngrams(items: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n neighbors, in order."""
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def copied_ngrams(text: str, context: str, n: int = 3) -> tuple[int, int]:
    """Number of a text's runs of n words that also stand in its context, and number of all its runs."""
    runs, seen = ngrams(words(text), n), set(ngrams(words(context), n))
    return sum(run in seen for run in runs), len(runs)


def longest_copied_span(text: str, context: str) -> int:
    """Number of words of the longest run that a text and its context share."""
    matcher = difflib.SequenceMatcher(None, words(text), words(context), autojunk=False)
    return matcher.find_longest_match().size


def repeated_ngrams(text: str, n: int = 2) -> tuple[int, int]:
    """Number of a text's runs of n words that stood in it before, and number of all its runs."""
    runs = ngrams(words(text), n)
    return len(runs) - len(set(runs)), len(runs)


def share(pairs: Iterable[tuple[int, int]]) -> float | None:
    """Hits over totals of (hits, total) pairs; None where there is nothing to count."""
    hits, total = np.array([*pairs, (0, 0)]).sum(axis=0)
    return float(hits / total) if total else None


def boilerplate(texts: Sequence[str], documents: Sequence[str], n: int = 4) -> list[tuple[int, int]]:
    """For each text, the number of its runs of n words that stand in another document's text, and of all its runs."""
    runs_of = [ngrams(words(text), n) for text in texts]
    only_document: dict[tuple[str, ...], str | None] = {}
    for runs, document in zip(runs_of, documents, strict=True):
        for run in runs:
            if only_document.setdefault(run, document) != document:
                only_document[run] = None
    return [(sum(only_document[run] is None for run in runs), len(runs)) for runs in runs_of]


def foreign_letters(text: str) -> tuple[int, int]:
    """Number of letters outside ASCII, and number of all letters."""
    letters = [character for character in text if character.isalpha()]
    return sum(not letter.isascii() for letter in letters), len(letters)


def quotes(text: str) -> list[str]:
    """The quoted spans of a text."""
    return [next(filter(None, match.groups())) for match in QUOTE.finditer(text)]


def sentences(text: str) -> list[str]:
    """The sentences of a text; a full stop inside a quoted span ends none."""
    spans = [match.span() for match in QUOTE.finditer(text)]
    ends = [
        match
        for match in _SENTENCE_END.finditer(text)
        if not any(start < match.start() < end - 1 for start, end in spans)
    ]
    edges = [0, *(match.end() for match in ends), len(text)]
    parts = [text[a:b].strip() for a, b in itertools.pairwise(edges)]
    return [part for part in parts if part]


def last_words(text: str, count: int, characters: int = 80) -> str:
    """The last words of a text with their marks, in one line; a line break counts as the word "newline".

    Args:
      text: any text.
      count: how many words at most.
      characters: a longer ending loses words in front, and a single longer word its beginning.
    """
    end = " ".join(re.sub(r"\s*\n\s*", " newline ", text).split()[-count:]) if count else ""
    tail = end[-characters:]
    return tail if len(end) <= characters or " " not in tail else tail[tail.index(" ") + 1 :]


def without_quotes(text: str) -> str:
    """A text without its quoted spans."""
    return re.sub(r"\s+", " ", QUOTE.sub(" ", text)).strip()


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement of an explanation, small enough to be true or false on its own."""

    kind: Kind
    text: str
    """The quoted span, or the sentence without its quoted spans."""
    rest: str
    """The explanation without this claim."""


def claims(explanation: str, frame: Collection[str] = ()) -> list[Claim]:
    """The claims of an explanation by rule: each quoted span, and each sentence with words of its own.

    Args:
      explanation: any text.
      frame: words that belong to the form and not to the content (see `frame_words`); a sentence of such words alone
        claims nothing.
    """
    found, parts = [], sentences(explanation)
    for index, sentence in enumerate(parts):
        others = [*parts[:index], *parts[index + 1 :]]
        for match in QUOTE.finditer(sentence):
            span = next(filter(None, match.groups()))
            left = (sentence[: match.start()] + sentence[match.end() :]).strip()
            found.append(Claim("detail", span, " ".join([*parts[:index], left, *parts[index + 1 :]])))
        bare = without_quotes(sentence)
        if content_words(bare, frame):
            kind = "expectation" if _EXPECTATION.search(bare) else "entity" if _NAME.search(bare) else "theme"
            found.append(Claim(kind, bare, " ".join(others)))
    return found


def frame_words(texts: Iterable[str], share: float = 0.2) -> set[str]:
    """Words outside quotes that more than the given share of the texts use: the form that the texts have in common."""
    counts: dict[str, int] = {}
    texts = list(texts)
    for text in texts:
        for word in set(words(without_quotes(text))):
            counts[word] = counts.get(word, 0) + 1
    return {word for word, count in counts.items() if count > share * len(texts)}


def content_words(text: str, frame: Collection[str] = ()) -> list[str]:
    """The words of a text that are neither in the frame nor among the commonest of English."""
    return [word for word in words(text) if word not in frame and word not in _COMMON]


def stands_in(span: str, context: str) -> bool:
    """Whether the words of a quoted span stand in the context, in that order."""
    quoted = words(span)
    return bool(quoted) and tuple(quoted) in ngrams(words(context), len(quoted))


def says_exactly(claim: str, context: str, frame: Collection[str] = ()) -> bool:
    """Whether the context contains all content words of a claim, anywhere."""
    content = content_words(claim, frame)
    return bool(content) and set(content) <= set(words(context))


def says_by_stem(claim: str, context: str, frame: Collection[str] = ()) -> bool:
    """Whether the stems of a claim's content words (of all its words if it has none) are all in the context."""
    content = content_words(claim, frame) or words(claim)
    return bool(content) and {stem(word) for word in content} <= {stem(word) for word in words(context)}


_COMMON = frozenset(
    words(
        "a about all also an and any are as at be been but by can could did do does for from had has have he her "
        "his how i if in into is it its like may more most no not of on one only or other our out over she "
        "should so some such than that the their them then there these they this those to up us was we were what "
        "when where which who will with would you your"
    )
)
