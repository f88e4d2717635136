"""A text or a conversation as tokens that know where they stand: characters, role and turn.

A conversation is rendered once through the chat template and then encoded without further special tokens, so that a
template which writes a BOS gets no second one.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nla_jax.lm.chat_template import Message, render_messages


@dataclasses.dataclass(frozen=True)
class TokenizedText:
    """Tokens of one text; the tuples have one entry a token."""

    text: str
    """What was encoded: the text, or the conversation as the template writes it."""
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """What each token decodes to alone."""
    spans: tuple[tuple[int, int], ...]
    """Start and end of each token in `text`; a BOS that the tokenizer adds has an empty span."""
    starts_with_bos: bool
    """Whether the first token is a BOS, whose activation says nothing about the text."""
    roles: tuple[str | None, ...]
    """The role whose turn a token is in; None in plain text."""
    turns: tuple[int | None, ...]
    """The index of the message a token is in, counted from 0; the generation prompt opens one more."""
    in_content: tuple[bool, ...]
    """Whether a token is part of a message's content, and not of what the template writes around it."""

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def default_positions(self) -> tuple[int, ...]:
        """All tokens but a BOS."""
        return tuple(range(int(self.starts_with_bos), len(self)))

    def with_role(self, role: str) -> list[int]:
        """Content tokens of a role; ValueError that names the roles there are where it has none."""
        found = [i for i, own in enumerate(self.roles) if own == role and self.in_content[i]]
        if not found:
            roles = sorted({own for own in self.roles if own}) or ["none: it is plain text"]
            raise ValueError(f"no token has the role {role!r}; the roles of this text are {', '.join(roles)}")
        return found

    def last_of_turns(self) -> list[int]:
        """The last content token of every message; ValueError for plain text."""
        last = {turn: i for i, turn in enumerate(self.turns) if turn is not None and self.in_content[i]}
        if not last:
            raise ValueError("plain text has no turns; give messages, or choose positions in another way")
        return list(last.values())

    def matching(self, pattern: str) -> list[int]:
        """Tokens that overlap a match of a regular expression.

        Raises:
          ValueError: an expression that is none, or that matches nothing.
        """
        try:
            matches = [match.span() for match in re.finditer(pattern, self.text)]
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        found = [
            i
            for i, (start, end) in enumerate(self.spans)
            if any(start < last and first < end for first, last in matches)
        ]
        if not found:
            raise ValueError(f"nothing in the text matches {pattern!r}; the text begins {self.text[:80]!r}")
        return found

    def resolved(self, position: int) -> int:
        """A position counted from 0; negative ones count from the end. ValueError outside the text."""
        if not -len(self) <= position < len(self):
            raise ValueError(
                f"position {position} is outside the text: it has tokens 0 to {len(self) - 1}; negative positions "
                "count from the end"
            )
        return position % len(self)


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenizedText:
    """Encode plain text with the special tokens that the tokenizer adds.

    Raises:
      ValueError: a text without a token.
    """
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    bos = starts_with_bos(ids, tokenizer)
    if len(ids) == bos:
        raise ValueError(f"the text {text!r} has no tokens; give at least one word")
    nothing = (None,) * len(ids)
    spans = tuple(map(tuple, encoded["offset_mapping"]))
    content = tuple(end > start for start, end in spans)
    return TokenizedText(text, tuple(ids), _decoded(ids, tokenizer), spans, bos, nothing, nothing, content)


def tokenize_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> TokenizedText:
    """Encode a conversation through the chat template; after a user's turn the assistant's opening follows.

    Raises:
      ValueError: no messages, a message without role or content, or a template that refuses them.
    """
    for index, message in enumerate(messages):
        if missing := {"role", "content"} - set(message):
            raise ValueError(
                f"message {index} has no {' and no '.join(sorted(missing))}; it holds {sorted(message)}: give "
                '{"role": ..., "content": ...}'
            )
    if not messages:
        raise ValueError("there are no messages; give at least one")
    opens_answer = messages[-1]["role"] != "assistant"
    text = render_messages(tokenizer, messages, add_generation_prompt=opens_answer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], [tuple(span) for span in encoded["offset_mapping"]]
    ends, contents = _turns_in(text, messages, tokenizer)
    turns, in_content = [], []
    for start, end in spans:
        turns.append(next((turn for turn, last in enumerate(ends) if start < last), len(messages)))
        in_content.append(any(start < last and first < end for first, last in contents))
    roles = [messages[turn]["role"] if turn < len(messages) else "assistant" for turn in turns]
    return TokenizedText(
        text,
        tuple(ids),
        _decoded(ids, tokenizer),
        tuple(spans),
        bool(ids) and ids[0] == tokenizer.bos_token_id and spans[0][1] <= len(tokenizer.bos_token or ""),
        tuple(roles),
        tuple(turns),
        tuple(in_content),
    )


def _turns_in(
    text: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[tuple[int, int]]]:
    """Where each message's turn ends in the rendered text, and the span of its content.

    A turn ends where the rendering of the messages up to it ends. Templates that render a beginning differently (some
    drop earlier thoughts) have their turns end with the content.
    """
    ends, contents, at = [], [], 0
    for index, message in enumerate(messages):
        content = str(message["content"] or "").strip()
        start = text.find(content, at) if content else at
        if start < 0:  # the template changed the content
            start = at
            content = ""
        contents.append((start, start + len(content)))
        at = start + len(content)
        try:
            rendered = render_messages(tokenizer, messages[: index + 1], add_generation_prompt=False)
        except ValueError:  # some templates refuse a conversation that ends there
            rendered = ""
        if len(rendered) >= at and text.startswith(rendered):
            at = len(rendered)
        ends.append(at)
    return ends, contents


def starts_with_bos(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the first token is a BOS that the tokenizer put before the text."""
    added = tokenizer("")["input_ids"][:1]
    return added == [tokenizer.bos_token_id] and list(tokens[:1]) == added


def _decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    return tuple(tokenizer.batch_decode([[index] for index in ids]))
