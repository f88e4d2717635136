"""How a text ends, and what its last sentence is doing: what is open, and its person, number and tense."""

import re
from collections.abc import Mapping

from nla_jax.data.writers.statements.facts import Facts
from nla_jax.data.writers.statements.kind import is_technical
from nla_jax.data.writers.statements.languages import language_of
from nla_jax.text_analysis import last_words, words

_ENDING = ('Ends "{}".', '"{}" last.', 'Stops at "{}".', 'Last "{}".', 'Up to "{}".', '"{}" so far.')
_ENDING_CHARACTERS = 24
_NO_BLANKS_CHARACTERS = 6
"""Longest ending of a text without blanks between words."""
_NO_ENDING = ("answer_start", "span")
"""Places whose last words say nothing: a template's, and those of an average."""


def ending(facts: Facts) -> str | None:
    """The last words of what is said, quoted."""
    if facts.place in _NO_ENDING or not facts.ending_words:
        return None
    # What a chat template wrote is no ending.
    said = facts.said.rstrip("\ufffd")  # The first half of a character that two tokens make.
    characters = (
        _ENDING_CHARACTERS
        if said[-2:].isascii() or " " in said[-_ENDING_CHARACTERS:]
        else _NO_BLANKS_CHARACTERS
    )
    end = last_words(said, facts.ending_words, characters).replace('"', "'")
    return facts.choose(_ENDING, "ending").format(end) if end else None


_OPENERS = {
    "bracket open": ("([{", ")]}"),
    "quotation open": ("“«", "”»"),
}
_CLAUSE = re.compile(
    r"\b(?:because|although|though|while|unless|whether|whereas|if|when|since|until|after|before)\b", re.I
)
_RELATIVE = re.compile(r"\b(?:which|who|whose|whom)\b", re.I)
_PERSONS = {
    "first person": r"\b(?:i|me|my|i'm|i've|i'd|i'll|mine|myself)\b",
    "first person plural": r"\b(?:we|us|our|ours|we're|we've|we'll|ourselves)\b",
    "second person": r"\b(?:you|your|yours|you're|yourself)\b",
    "about him": r"\b(?:he|him|his|himself)\b",
    "about her": r"\b(?:she|her|hers|herself)\b",
    "about them": r"\b(?:they|them|their|themselves)\b",
}
_PAST = (
    r"was|were|did|had|didn't|wasn't|weren't|said|went|came|made|took|got|saw|knew|thought|felt|gave|told|began|"
    r"became|found|left|kept|stood|ran|sat|brought|wrote"
)
_TENSES = {
    "future": r"\b(?:will|shall|won't|going to|gonna)\b|'ll\b",
    "perfect": r"\b(?:has|have) (?:been|[a-z]+ed|gone|done|made|seen|come|become)\b",
    # A form in -ed is taken for a verb, and not for a participle, after a pronoun or before an object.
    "past": rf"\b(?:{_PAST})\b|\b(?:he|she|it|they|we|i|you|who) [a-z]{{2,}}ed\b"
    r"|\b(?!called|used|named|based)[a-z]{2,}ed (?:the|an?|his|her|their|its|him|them|me|us|my|our|up|out|off)\b",
    "conditional": r"\b(?:would|could|should)\b",
    "present": r"\b(?:is|are|am|does|do|has|have|can|may|isn't|aren't|don't|doesn't)\b|\bi'm\b|'re\b",
}
_PERSON_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _PERSONS.items()}
_TENSE_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _TENSES.items()}
_SYNONYMS = {
    "first person": ("first person", "told as I"),
    "first person plural": ("first person plural", "told by us"),
    "second person": ("second person", "addressing you"),
    "past": ("past tense", "past"),
    "present": ("present tense", "present"),
    "future": ("future", "still ahead"),
    "perfect": ("present perfect", "perfect tense"),
    "conditional": ("conditional", "hypothetical"),
}
_LONG = 30
"""Words of a sentence that is called long."""


def syntax(facts: Facts) -> str | None:
    """What is open inside a sentence, and the tense and person of what is closed; at most two of these."""
    text = facts.closed
    found = open_parts(text) if facts.is_inside else marks(text)
    if facts.is_chat and facts.place != "sentence_end":
        # What a user wants is a statement of its own.
        found = [part for part in found if part != "question"]
    if language_of(facts.said) == "en":
        tense = tense_of(text)
        # Documentation is in the present tense as a rule.
        told = None if tense == "present" and is_technical(facts.said) else tense
        found += [part for part in (told, person_of(text)) if part]
    if not found:
        return None
    said = [facts.choose(_SYNONYMS.get(part, (part,)), part[:16]) for part in found[:2]]
    if facts.choose(("as it is", "turned"), "syntax") == "turned":
        said.reverse()
    listed = ", ".join(said)
    return f"{listed[0].upper()}{listed[1:]}."


def open_parts(sentence: str) -> list[str]:
    """What is open where an unfinished sentence stops: brackets, quotations, code, a clause."""
    found = [
        name for name, (left, right) in _OPENERS.items() if _count(sentence, left) > _count(sentence, right)
    ]
    if sentence.count('"') % 2 and "quotation open" not in found:
        found.append("quotation open")
    if sentence.count("`") % 2:
        found.append("code span open")
    tail = sentence.rpartition(",")[2]
    if match := _CLAUSE.search(tail):
        found.append(f"{match.group().lower()}-clause")
    elif _RELATIVE.search(tail):
        found.append("relative clause")
    elif sentence.count(",") >= 3:
        found.append("enumeration")
    if len(words(sentence)) > _LONG:
        found.append("long sentence")
    return found


def marks(sentence: str) -> list[str]:
    """What the mark says that closes a sentence."""
    end = sentence.rstrip("\"'”’»)] \n")[-1:]
    names = {"?": "question", "？": "question", "!": "exclamation", ":": "colon", "…": "trailing off"}
    return [names[end]] if end in names else []


def tense_of(sentence: str) -> str | None:
    """The tense of an English sentence by its first plain verb form; None where no form tells it."""
    return _first(_TENSE_PATTERNS, sentence)


def person_of(sentence: str) -> str | None:
    """Whom an English sentence is told by or about, by its first personal pronoun; None where it has none."""
    return _first(_PERSON_PATTERNS, sentence)


def _first(patterns: Mapping[str, re.Pattern[str]], text: str) -> str | None:
    """The name of the pattern that matches first in a text."""
    found = {name: match.start() for name, pattern in patterns.items() if (match := pattern.search(text))}
    return min(found, key=found.get) if found else None


def _count(text: str, characters: str) -> int:
    return sum(map(text.count, characters))
