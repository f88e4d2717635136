"""What a planted task is: a question about texts that are written so that the right answer is known."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from nla_jax.data.corpora.documents import Document
from nla_jax.lm.chat_template import Message
from nla_jax.lm.tokenized import tokenize_chat

Filler = TypeVar("Filler")
LETTERS = ("A", "B", "C", "D")
"""Names of the options of planted multiple choices."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A text and the label of the property that was planted in it."""

    context: str
    """The text up to the token that is read."""
    label: str
    written: str
    """The part of the text in which the property was planted."""
    messages: tuple[Message, ...] | None = None
    """The chat that the text is a rendering of; None for plain text."""

    @property
    def document(self) -> Document:
        """The text as a document, for whatever reads documents. Its last token is the one that is read."""
        kind = "text" if self.messages is None else "chat"
        return Document(f"planted {self.id}", self.context, kind, self.messages)

    @property
    def id(self) -> str:
        """A short hash of the text: equal in two evaluations only where the text is."""
        return hashlib.blake2b(self.context.encode(), digest_size=4).hexdigest()


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draws of fillers from every other entry of their lists."""

    rng: np.random.Generator
    half: int
    """0 for the first, third and further odd entries of a list, 1 for the others."""

    def some(self, options: Sequence[Filler], least: int, most: int) -> list[Filler]:
        """Between `least` and `most` different options, in a random order."""
        own = options[self.half :: 2]
        count = self.rng.integers(least, most, endpoint=True)
        return [own[i] for i in self.rng.permutation(len(own))[:count]]

    def one(self, options: Sequence[Filler]) -> Filler:
        """One of the options."""
        (option,) = self.some(options, 1, 1)
        return option


def _plain(written: str) -> str:
    return written


@dataclasses.dataclass(frozen=True)
class Task:
    """A question about a text, with one right answer among few."""

    name: str
    question: str
    answers: Mapping[str, str]
    """Label -> the answer as a phrase."""
    write: Callable[[Draw, str], str]
    """Draws a text for a label."""
    place: str
    """Where the text is read: `shared_closing`, or one of the places of tokens (`nla_jax/lm/places.py`)."""
    close: Callable[[str], str] = _plain
    """Adds what all texts of the task end in, which tells nothing of the label."""
    chat: Callable[[str], tuple[Message, ...]] | None = None
    """The messages that what was written stands in; None for plain text."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Whose template renders the chat, up to the start of the answer."""
    behavior: bool = False
    """Whether the right answer depends on the target's next token: whether it answers with the planted option."""

    def examples(self, count: int, seed: int, *, teaching: bool = False) -> list[Example]:
        """Examples with different texts, whose labels take turns.

        Args:
          count: number of examples.
          seed: seed of the draws.
          teaching: whether they teach a probe; those that do share no filler with those that are asked about.

        Raises:
          ValueError: the fillers do not make that many different texts.
        """
        draw = Draw(np.random.default_rng([seed, teaching, *self.name.encode()]), int(teaching))
        labels = list(LETTERS if self.behavior else self.answers)
        by_text: dict[str, Example] = {}
        tries = 0
        while len(by_text) < count:
            label = labels[len(by_text) % len(labels)]
            written = self.write(draw, label)
            if written not in by_text:
                by_text[written] = self._example(label, written)
            tries += 1
            if tries > 100 * count:
                raise ValueError(
                    f"the task {self.name!r} has too few fillers for {count} different texts; ask for fewer "
                    "(evaluation.task_examples, evaluation.task_taught)"
                )
        return list(by_text.values())

    def _example(self, label: str, written: str) -> Example:
        if self.chat is None:
            return Example(self.close(written), label, written)
        messages = self.chat(written)
        return Example(tokenize_chat(self.tokenizer, messages).text, label, written, messages)
