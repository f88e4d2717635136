"""A text or a conversation as tokens that know where they stand: characters, role and turn.

A conversation is rendered once through the chat template and then encoded without further special tokens, so that a
template which writes a BOS gets no second one.
"""

import bisect
import dataclasses
import functools
import re
import weakref
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nla_jax.lm.chat_template import Message, render_messages
from nla_jax.lm.chat_turns import Span, contents_in, header_end, turn_ends


@dataclasses.dataclass(frozen=True)
class TokenizedText:
    """Tokens of one text; the tuples have one entry a token."""

    text: str
    """What was encoded: the text, or the conversation as the template writes it."""
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """What each token decodes to alone."""
    spans: tuple[Span, ...]
    """Start and end of each token in `text`, its spaces included. A BOS that the tokenizer adds has an empty span, and
    tokens that share a character each have the whole of it."""
    starts_with_bos: bool
    """Whether the first token is a BOS, whose activation says nothing about the text."""
    roles: tuple[str | None, ...]
    """The role whose turn a token is in; None in plain text."""
    turns: tuple[int | None, ...]
    """The index of the message a token is in, counted from 0; the generation prompt opens one more."""
    in_content: tuple[bool, ...]
    """Whether a token is part of a message's content or of its tool calls, and not of what the template writes around
    them or of whitespace at the content's ends. In plain text every token but a BOS is content."""
    opens_answer: bool = False
    """Whether the text ends with what the template writes before an assistant's answer."""

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
        """Tokens that overlap a match of a regular expression; matches of no characters do not count.

        Raises:
          ValueError: an expression that is none, or that matches nothing.
        """
        try:
            matches = [match.span() for match in re.finditer(pattern, self.text) if match.group()]
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


def as_unicode(text: str) -> str:
    """A text that tokenizers and files take: lone halves of surrogate pairs become U+FFFD, and pairs one character.

    JSON escapes that were cut and command lines in other encodings than UTF-8 bring such halves.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenizedText:
    """Encode plain text, made valid by `as_unicode`, with the special tokens that the tokenizer adds.

    A text that spells the BOS itself, as a rendered conversation does, gets no second one.

    Raises:
      ValueError: a text without a token.
    """
    (source,) = tokenize_texts(tokenizer, [text])
    if len(source) == source.starts_with_bos:
        raise ValueError(f"the text {source.text!r} has no tokens; give at least one word")
    return source


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], most_tokens: int | None = None
) -> list[TokenizedText]:
    """Encode plain texts as `tokenize_text` does, each cut after `most_tokens` tokens; a text may have no token."""
    texts = [as_unicode(text) for text in texts]
    # What is not asked for would be copied token by token.
    encoded = tokenizer(
        texts, return_offsets_mapping=True, return_attention_mask=False, return_token_type_ids=False
    )
    return [
        _plain(tokenizer, text, ids, offsets, most_tokens)
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _plain(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    ids: Sequence[int],
    offsets: Sequence[Span],
    most_tokens: int | None,
) -> TokenizedText:
    ids = without_second_bos(ids, tokenizer)
    offsets = offsets[len(offsets) - len(ids) :]
    if most_tokens is not None and len(ids) > most_tokens:
        text, ids, offsets = text[: offsets[most_tokens][0]], ids[:most_tokens], offsets[:most_tokens]
    bos = starts_with_bos(ids, tokenizer)
    tokens, nothing = _decoded(ids, tokenizer), (None,) * len(ids)
    spans = _covering(offsets, tokens, text)
    content = tuple(end > start and not (bos and i == 0) for i, (start, end) in enumerate(spans))
    return TokenizedText(text, tuple(ids), tokens, spans, bos, nothing, nothing, content)


def tokenize_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> TokenizedText:
    """Encode a conversation through the chat template; after a user's turn the assistant's opening follows.

    Contents are made valid by `as_unicode`. A message with tool calls needs no content of its own.

    Raises:
      ValueError: no messages, a message without role or content, or a template that refuses them.
    """
    for index, message in enumerate(messages):
        needed = {"role"} if message.get("tool_calls") else {"role", "content"}
        if missing := needed - set(message):
            raise ValueError(
                f"message {index} has no {' and no '.join(sorted(missing))}; it holds {sorted(message)}: give "
                '{"role": ..., "content": ...}'
            )
    if not messages:
        raise ValueError("there are no messages; give at least one")
    messages = [
        {"content": ""}
        | {name: as_unicode(value) if isinstance(value, str) else value for name, value in message.items()}
        for message in messages
    ]
    opens_answer = messages[-1]["role"] != "assistant"
    text = as_unicode(render_messages(tokenizer, messages, add_generation_prompt=opens_answer))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    tokens = _decoded(ids, tokenizer)
    spans = _covering(encoded["offset_mapping"], tokens, text)
    contents = contents_in(text, messages, tokenizer, opens_answer)
    starts, stops = [start for start, _ in spans], [end for _, end in spans]
    ends = turn_ends(text, messages, tokenizer, contents, starts)
    order = [*(turn for _, turn in ends), len(messages)]
    turns = [order[bisect.bisect_right(ends, (start, len(messages)))] for start in starts]
    roles = [messages[turn]["role"] if turn < len(messages) else "assistant" for turn in turns]
    inside = [False] * len(spans)
    for first, last in contents.values():
        for i in range(bisect.bisect_right(stops, first), bisect.bisect_left(starts, last)):
            inside[i] = True
    for turn, message in enumerate(messages):
        if message.get("tool_calls"):
            first = header_end(text, messages, turn, tokenizer)
            of_turn = [i for i, at in enumerate(turns) if at == turn and spans[i][0] >= first]
            for i in _without_ending(of_turn, ids, tokens, tokenizer):
                inside[i] = True
    return TokenizedText(
        text,
        tuple(ids),
        tokens,
        spans,
        bool(ids) and ids[0] == tokenizer.bos_token_id and spans[0][1] <= len(tokenizer.bos_token or ""),
        tuple(roles),
        tuple(turns),
        tuple(inside),
        opens_answer,
    )


def _without_ending(
    indices: list[int], ids: Sequence[int], tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Tokens of a turn without the special tokens and the whitespace that the template ends it with."""
    special = special_ids(tokenizer)
    while indices and (ids[indices[-1]] in special or not tokens[indices[-1]].strip()):
        indices = indices[:-1]
    return indices


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of tokens that are no part of a text: those with a role, and those that are only declared special."""
    declared = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *declared}


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS before texts."""
    return tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def starts_with_bos(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the first token is a BOS that the tokenizer put before the text."""
    return list(tokens[:1]) == [tokenizer.bos_token_id] and adds_bos(tokenizer)


def without_second_bos(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    """Tokens of a text without the BOS that the tokenizer put before the one that the text spells."""
    return tokens[1:] if starts_with_bos(tokens, tokenizer) and tokens[1:2] == tokens[:1] else tokens


def decode_all(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]]) -> list[str]:
    """The texts of token sequences, as the tokenizer's `decode` gives them, all in one call."""
    if tokenizer.clean_up_tokenization_spaces:
        return tokenizer.batch_decode(sequences)
    # The tokenizer looks at the type of every id before it calls this.
    return tokenizer.backend_tokenizer.decode_batch(sequences, skip_special_tokens=False)


_SPELLED: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, str]] = weakref.WeakKeyDictionary()
"""For each tokenizer: token id -> what it decodes to alone, for the ids that occurred."""


def _decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    spelled = _SPELLED.setdefault(tokenizer, {})
    if missing := [*{*ids}.difference(spelled)]:
        alone = tokenizer.batch_decode([[index] for index in missing], clean_up_tokenization_spaces=False)
        spelled.update(zip(missing, alone, strict=True))
    return tuple(map(spelled.__getitem__, ids))


def _covering(offsets: Sequence[Span], tokens: Sequence[str], text: str) -> tuple[Span, ...]:
    """Spans of tokens that leave out no character of the text.

    Tokenizers leave out spaces (`trim_offsets`) and characters that are composed with the one before. A token gets back
    the spaces that it begins with; whatever else is left out belongs to the token before.
    """
    spans: list[Span] = []
    at, holder = 0, None
    for (start, end), token in zip(offsets, tokens, strict=True):
        if start == at < end:  # nothing is left out
            holder, at = len(spans), end
            spans.append((start, end))
            continue
        if token.startswith(" "):
            between = text[at:start]
            leading, spaces = len(token) - len(token.lstrip(" ")), len(between) - len(between.rstrip(" "))
            start -= min(leading, spaces)
        if start > at and holder is not None:
            spans[holder] = spans[holder][0], start
        elif start > at:
            start = at
        if start < end or not token.strip(" "):  # a BOS that was added holds nothing
            holder = len(spans)
        spans.append((start, end))
        at = end if end > at else at
    if holder is not None and at < len(text):
        spans[holder] = spans[holder][0], len(text)
    return tuple(spans)
