"""What the target expects next, and how sure it is."""

from collections.abc import Sequence
from typing import Literal

from nla_jax.data.writers.statements.facts import Facts

Certainty = Literal["certain", "likely", "unsure", "open", "unknown"]

_CERTAIN, _LIKELY, _UNSURE = 0.8, 0.4, 0.12
"""Least probability of the likeliest next word, for which each certainty is named."""

_WORDINGS: dict[Certainty, tuple[str, ...]] = {
    "certain": (
        "Surely {} next.",
        "{} certainly follows.",
        "Next surely {}.",
        "{} next, no doubt.",
        "Certain next: {}.",
    ),
    "likely": ("Probably {} next.", "{} likely.", "Next probably {}.", "{} expected.", "Likely {}."),
    "unsure": (
        "Maybe {} next.",
        "Next perhaps {}.",
        "{} next, perhaps.",
        "Weakly expected {}.",
        "Possibly then {}.",
    ),
    "open": (
        "Open next: {}.",
        "Next anything, say {}.",
        "{} next, among many.",
        "Unclear next: {}.",
        "Then various: {}.",
    ),
    "unknown": ("Next {}.", "Likely {}.", "Then {}.", "{} follows.", "Expected {}."),
}
_ANSWER_WORDINGS: dict[Certainty, tuple[str, ...]] = {
    "certain": ("Surely replies {} next.", "Next reply, surely {}.", "Answer certainly follows: {}."),
    "likely": ("Likely replies {}.", "Reply likely {}.", "Answer expected: {}.", "Next probably answers {}."),
    "unsure": (
        "Perhaps next replies {}.",
        "Reply next, maybe {}.",
        "Answer weakly expected: {}.",
        "Then might answer {}.",
    ),
    "open": (
        "Reply open, next {}.",
        "Answers vary, likely {}.",
        "Next any answer: {}.",
        "Unclear reply follows: {}.",
    ),
    "unknown": ("Reply likely {}.", "Next answers {}.", "Expected reply {}.", "Then answer {}."),
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
    expected, probabilities = list(facts.next_words), list(facts.next_probabilities)
    if not facts.is_inside and len(expected) > 1 and "newline" in expected:
        # A line may nearly always end where something closes; that is told where it is likely.
        index = expected.index("newline")
        if certainty_of(probabilities[index:]) in ("unsure", "open", "unknown"):
            del expected[index], probabilities[index : index + 1]
    certainty = certainty_of(probabilities)
    shown = {"certain": 1, "likely": 2}.get(certainty, facts.listed_words)
    words = list(dict.fromkeys(_MARKS.get(word, word) for word in expected))[: min(shown, facts.listed_words)]
    wordings = (_ANSWER_WORDINGS if facts.place == "answer_start" else _WORDINGS)[certainty]
    listed = ", ".join(words)
    if len(words) > 1 and facts.choose(("or", ","), "next or") == "or":
        listed = f"{', '.join(words[:-1])} or {words[-1]}"
    return facts.choose(wordings, "next").format(listed)


def certainty_of(probabilities: Sequence[float]) -> Certainty:
    """How sure the target is, by its probability of the likeliest word; unknown where there is none."""
    if not probabilities:
        return "unknown"
    bounds = {"certain": _CERTAIN, "likely": _LIKELY, "unsure": _UNSURE}
    return next((name for name, least in bounds.items() if probabilities[0] >= least), "open")
