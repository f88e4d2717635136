"""Who speaks to whom, and in which tone."""

import functools
import re
from collections.abc import Callable

from nla_jax.data.writers.statements.content import phrases_of
from nla_jax.data.writers.statements.facts import Facts
from nla_jax.data.writers.statements.kind import is_technical
from nla_jax.data.writers.statements.languages import language_of

_POLITE = re.compile(
    r"\b(?:please|thanks|thank you|sorry|would you|could you|kindly|bitte|danke|por favor|gracias|merci|s'il)\b",
    re.I,
)
_DOUBTFUL = re.compile(
    r"\b(?:maybe|perhaps|probably|possibly|might|not sure|seems?|apparently|unsure|i guess)\b", re.I
)
_URGENT = re.compile(r"\b(?:urgent|immediately|right now|asap|hurry|emergency)\b", re.I)
_STRONG = 0.5
"""Least sentiment, from -1 to 1 by VADER, that is told."""
_PERSONA_WORDS = 3


def speakers(facts: Facts) -> str | None:
    """Who speaks in a chat, and what a system prompt asks of the assistant; None in other texts."""
    if not facts.is_chat:
        return None
    if facts.place == "answer_start":
        return _persona(facts) or _later_turn(facts)
    if facts.is_inside and facts.role == "user":
        return None  # Most sentences of chats that are read inside are a user's.
    name = "System prompt" if facts.role == "system" else (facts.role or "").capitalize()
    closings = ("{} ends.", "{} done.", "{} finishes.")
    inside = ("{} speaks.", "{} talking.")
    return facts.choose(closings if facts.place == "turn_end" else inside, "speakers").format(name)


def _persona(facts: Facts) -> str | None:
    """What is special about the system prompt; None for the usual helpful assistant."""
    if not facts.system or "helpful" in facts.system.lower():
        return None
    said = [word for phrase in phrases_of(facts.system, language_of(facts.system)) for word in phrase]
    # Every other word, so that no three words in a row are those of the prompt.
    rare = sorted(set(said), key=lambda word: (-facts.rarity(word.lower()), word))[:_PERSONA_WORDS]
    if not rare:
        return None
    return facts.choose(("System prompt: {}.", "Instructed: {}.", "Persona {}."), "speakers").format(
        ", ".join(rare)
    )


def _later_turn(facts: Facts) -> str | None:
    asked = sum(role == "user" for role, _ in facts.turns)
    return facts.choose(("Follow-up.", "Later turn."), "speakers") if asked > 1 else None


def tone(facts: Facts) -> str | None:
    """Politeness, doubt, urgency and a strong sentiment of what is closed; None where nothing stands out."""
    text = facts.closed
    manners = [
        ("polite", _POLITE.search(text)),
        ("doubtful", _DOUBTFUL.search(text)),
        ("urgent", _URGENT.search(text)),
        ("excited", text.count("!") >= 2),
    ]
    found = [name for name, holds in manners if holds][:1]
    if language_of(facts.said) == "en" and not is_technical(facts.said):
        sentiment = _sentiment()(text)
        if abs(sentiment) >= _STRONG:
            names = ("positive", "favorable", "warm") if sentiment > 0 else ("negative", "critical", "gloomy")
            found.append(facts.choose(names, "sentiment"))
    if not found:
        return None
    return (
        facts.choose(("{} tone.", "Sounds {}.", "Mood {}.", "{}."), "tone")
        .format(" and ".join(found))
        .capitalize()
    )


@functools.cache
def _sentiment() -> Callable[[str], float]:
    """What gives the sentiment of an English text, from -1 to 1: VADER's compound score."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # It is slow to import.

    analyzer = SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]
