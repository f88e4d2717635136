"""What the target expects next, and how sure it is."""

from typing import Literal

from nla_jax.data.writers.statements.facts import Facts

Certainty = Literal["certain", "likely", "unsure", "open", "unknown"]

_CERTAIN, _LIKELY, _UNSURE = 0.8, 0.4, 0.12
"""Least probability of the likeliest next word, for which each certainty is named."""

_WORDINGS: dict[Certainty, tuple[str, ...]] = {
    "certain": (
        "Almost certainly {} next.",
        "{} surely follows.",
        "Next, no doubt {}.",
        "Bound to go on: {}, likely.",
    ),
    "likely": ("Probably {} next.", "{}, likely.", "Next should be {}.", "Likely {}."),
    "unsure": ("Maybe {} next.", "{}, perhaps, follows.", "Next perhaps {}.", "Expected, weakly: {}."),
    "open": (
        "Next is open: {}.",
        "{} or anything else next.",
        "Hard to tell what follows: {}.",
        "Then {}, who knows.",
    ),
    "unknown": ("Next {}.", "{}, likely.", "Then {}.", "{} next."),
}
_ANSWER_WORDINGS: dict[Certainty, tuple[str, ...]] = {
    "certain": ("Answer surely begins {}, as expected.", "Certain next word {}."),
    "likely": ("Answer likely opens with {}.", "Reply should begin {}, then more.", "Likely opening {}."),
    "unsure": (
        "Reply may begin {}, expected weakly.",
        "Answer opens perhaps {} next.",
        "Likely openings: {}.",
    ),
    "open": ("Open how the reply begins: {}, likely.", "Many answers follow, say {}.", "{} then an answer?"),
    "unknown": ("Answer likely begins {}.", "Reply expected: {}.", "Next the answer: {}."),
}
_MARKS = {
    ",": "comma",
    ".": "full stop",
    ":": "colon",
    ";": "semicolon",
    "?": "question mark",
    "!": "exclamation mark",
    '"': "quote",
    "“": "quote",
    "”": "quote",
    "'": "apostrophe",
    "’": "apostrophe",
    "-": "hyphen",
    "—": "dash",
    "–": "dash",
    "(": "bracket",
    ")": "closing bracket",
    ").": "closing bracket",
    "`": "backtick",
    "/": "slash",
}
"""Marks that would be lost among those of the sentence -> their names."""


def next_words(facts: Facts) -> str | None:
    """The words that the target expects next, fewer where it is sure, worded by its probability of the first."""
    if not facts.next_words or not facts.listed_words:
        return None
    certainty = certainty_of(facts.next_probabilities)
    shown = {"certain": 1, "likely": 2}.get(certainty, facts.listed_words)
    words = list(dict.fromkeys(_MARKS.get(word, word) for word in facts.next_words))[
        : min(shown, facts.listed_words)
    ]
    wordings = (_ANSWER_WORDINGS if facts.place == "answer_start" else _WORDINGS)[certainty]
    listed = ", ".join(words)
    if len(words) > 1 and facts.choose(("or", ","), "next or") == "or":
        listed = f"{', '.join(words[:-1])} or {words[-1]}"
    text = facts.choose(wordings, "next").format(listed)
    return text[0].upper() + text[1:] if listed[0] != text[0] else text


def certainty_of(probabilities: tuple[float, ...]) -> Certainty:
    """How sure the target is, by its probability of the likeliest word; unknown where there is none."""
    if not probabilities:
        return "unknown"
    bounds = {"certain": _CERTAIN, "likely": _LIKELY, "unsure": _UNSURE}
    return next((name for name, least in bounds.items() if probabilities[0] >= least), "open")
