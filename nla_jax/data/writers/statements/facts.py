"""What statements are made from: one row's columns, and the parts of its context that matter at its place."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

from nla_jax.data.positions import SPAN_PLACE
from nla_jax.data.splits import hash_fraction
from nla_jax.lm.places import sentence_ends

_MARKER = re.compile(r"<\|[^<>|]{1,40}\|>|</?(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</?s>|<(?:bos|eos)>")
"""What chat templates of the common families write around messages."""
_ROLE_LINE = re.compile(r"\s*(system|user|assistant|model|tool|developer)\s*(?:\n|$)")
_WORDS_A_TOKEN = 0.75
"""English words in a token, with which the words of a span are told from its tokens."""
_LINE_WORDS = 40
"""Most words at the end of a line that count as what the line says."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of one row. Columns that the data lacks are empty, and statements do without them."""

    key: str
    """Names the row; its wording is drawn by it."""
    seed: int
    """Of the wording."""
    context: str
    """The text up to and including the activation's token, with what a chat template wrote."""
    place: str
    """Where the activation was read, one of `lm.places.TOKEN_PLACES` or `data.positions.SPAN_PLACE`."""
    role: str | None = None
    """Whose turn of a chat it is; None in other texts."""
    turn: int | None = None
    """The index of that turn's message."""
    genre: str = ""
    """The kind or origin of the document."""
    next_words: tuple[str, ...] = ()
    """What the target expects next, likeliest first."""
    next_probabilities: tuple[float, ...] = ()
    """The target's probability of each; empty where it is not known."""
    span_tokens: int = 0
    """How many tokens the activation is a mean over; 0 for a single token."""
    rarity: Callable[[str], float] = lambda word: 1.0
    """How rare a word in lower case is in the corpus."""
    topic_words: int = 8
    """Most words of a topic at places that close something."""
    inside_topic_words: int = 2
    """Most words of a topic elsewhere."""
    listed_words: int = 3
    """Most words that are listed of those that the target expects."""
    ending_words: int = 2
    """Last words that are quoted."""

    def choose(self, options: Sequence[str], purpose: str) -> str:
        """One of several wordings, drawn for this row.

        Args:
          options: at least one.
          purpose: at most 16 bytes; the draws of two purposes are independent.
        """
        return options[int(hash_fraction(self.key, seed=self.seed, purpose=purpose) * len(options))]

    @property
    def is_inside(self) -> bool:
        """Whether the activation is of a token that closes nothing."""
        return self.place == "inside"

    @functools.cached_property
    def turns(self) -> list[tuple[str | None, str]]:
        """The role and the text of each turn, as far as the context goes; blank turns are left out.

        The role is None in texts that are no chats, and where the template names none.
        """
        found = []
        for part in _MARKER.split(self.context):
            match = _ROLE_LINE.match(part) if self.is_chat else None
            role, text = (match[1], part[match.end() :]) if match else (None, part)
            if text.strip():
                found.append((role, text))
        return found

    @property
    def is_chat(self) -> bool:
        """Whether the row is of a chat."""
        return self.role is not None

    @functools.cached_property
    def said(self) -> str:
        """The text of the last turn, or the whole context of a text that is no chat."""
        return self.turns[-1][1] if self.turns else ""

    @functools.cached_property
    def before(self) -> str:
        """The text of the turn of the same speaker before the last one; empty for none."""
        role = self.turns[-1][0] if self.turns else None
        return next((text for other, text in reversed(self.turns[:-1]) if other == role), "")

    @functools.cached_property
    def system(self) -> str:
        """The system prompt; empty for none."""
        return next((text.strip() for role, text in self.turns if role == "system"), "")

    @functools.cached_property
    def closed(self) -> str:
        """What the place closes: the sentence, line, turn or span that ends there; inside a sentence its beginning."""
        text = self.said.strip()
        if self.place in ("turn_end", "answer_start"):
            return text
        if self.place == SPAN_PLACE:
            return _last_words(text, max(int(self.span_tokens * _WORDS_A_TOKEN), 1))
        if self.place == "line_end":
            return _last_words(text.rpartition("\n")[2], _LINE_WORDS)
        text = text.rpartition("\n\n")[2]
        ends = [end for end in sentence_ends(text) if end < len(text) or self.is_inside]
        return text[ends[-1] if ends else 0 :].strip()


def place_of(context: str) -> str:
    """The place of a context's last token as far as the text alone tells, for data without the column `place`."""
    if context.endswith("\n"):
        return "line_end"
    return "sentence_end" if sentence_ends(context)[-1:] == [len(context)] else "inside"


def _last_words(text: str, count: int) -> str:
    return " ".join(text.split()[-count:])
