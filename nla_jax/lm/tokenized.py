"""A text or a conversation as tokens that know where they stand: characters, role and turn.

A conversation is rendered once through the chat template and then encoded without further special tokens, so that a
template which writes a BOS gets no second one. Where the contents of the messages stand in it is told by a second
rendering with marks in their place, since the template may hold the same words as a message.
"""

import bisect
import dataclasses
import functools
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nla_jax.lm.chat_template import PLACEHOLDER, Message, render_messages

Span = tuple[int, int]
"""Start and end, in characters of a text."""


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
    """Whether a token is part of a message's content, and not of what the template writes around it or of whitespace
    at the content's ends. In plain text every token but a BOS is content."""

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
    text = as_unicode(text)
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = without_second_bos(encoded["input_ids"], tokenizer)
    bos = starts_with_bos(ids, tokenizer)
    if len(ids) == bos:
        raise ValueError(f"the text {text!r} has no tokens; give at least one word")
    tokens, nothing = _decoded(ids, tokenizer), (None,) * len(ids)
    spans = _covering(encoded["offset_mapping"][-len(ids) :], tokens, text)
    content = tuple(end > start and not (bos and i == 0) for i, (start, end) in enumerate(spans))
    return TokenizedText(text, tuple(ids), tokens, spans, bos, nothing, nothing, content)


def tokenize_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> TokenizedText:
    """Encode a conversation through the chat template; after a user's turn the assistant's opening follows.

    Contents are made valid by `as_unicode`.

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
    messages = [
        {name: as_unicode(value) if isinstance(value, str) else value for name, value in message.items()}
        for message in messages
    ]
    opens_answer = messages[-1]["role"] != "assistant"
    text = as_unicode(render_messages(tokenizer, messages, add_generation_prompt=opens_answer))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    tokens = _decoded(ids, tokenizer)
    spans = _covering(encoded["offset_mapping"], tokens, text)
    contents = _contents_in(text, messages, tokenizer, opens_answer)
    ends = _turn_ends(text, messages, tokenizer, contents, [start for start, _ in spans])
    turns = [next((turn for last, turn in ends if start < last), len(messages)) for start, _ in spans]
    roles = [messages[turn]["role"] if turn < len(messages) else "assistant" for turn in turns]
    return TokenizedText(
        text,
        tuple(ids),
        tokens,
        spans,
        bool(ids) and ids[0] == tokenizer.bos_token_id and spans[0][1] <= len(tokenizer.bos_token or ""),
        tuple(roles),
        tuple(turns),
        tuple(any(start < last and first < end for first, last in contents.values()) for start, end in spans),
    )


_MARK = re.compile(f"{PLACEHOLDER}(\\d+){PLACEHOLDER}")
"""What is rendered in place of the content of the message of that number."""


def _words(message: Message) -> str:
    """The content of a message without whitespace around it; empty where it is no text."""
    content = message["content"]
    return content.strip() if isinstance(content, str) else ""


def _marked(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, opens_answer: bool
) -> tuple[list[str], list[int]]:
    """What the template writes around contents, and the message whose content follows each part but the last.

    Messages without words have no content to find. Where the template refuses marks, all that is known is that the
    contents stand in order.
    """
    named = [index for index, message in enumerate(messages) if _words(message)]
    marked = [
        {**message, "content": f"{PLACEHOLDER}{index}{PLACEHOLDER}"} if index in named else message
        for index, message in enumerate(messages)
    ]
    try:
        parts = _MARK.split(render_messages(tokenizer, marked, add_generation_prompt=opens_answer))
    except ValueError:
        return [""] * (len(named) + 1), named
    return parts[::2], [int(index) for index in parts[1::2]]


def _contents_in(
    text: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, opens_answer: bool
) -> dict[int, Span]:
    """The span of each message's content in the rendered text, by the message's number, in their order there.

    Where the template writes something else in place of a content (some drop the thoughts before an answer), the span
    is that of what it writes.
    """
    around, order = _marked(messages, tokenizer, opens_answer)
    spans: dict[int, Span] = {}
    at = 0  # where the part before the next content begins
    for index, before, after in zip(order, around[:-1], around[1:], strict=True):
        content, words = messages[index]["content"], _words(messages[index])
        # What the template writes before a content may depend on it: as much counts as agrees.
        first = at + _agreement(before, text[at:])
        ways = (content, words, content.lstrip(), content.rstrip())
        followed = [way + following for following in (after, after[:1]) for way in ways]
        fitting = [
            way for way, whole in zip(ways * 2, followed, strict=True) if text.startswith(whole, first)
        ]
        if fitting:
            written = fitting[0]
        elif after and (until := text.find(after, first)) >= 0:
            written = text[first:until]
        elif (place := text.find(words, first)) >= 0:
            written = text[first : place + len(words)]
        else:
            written = ""
        if words not in written:
            words = written.strip()
        start = first + written.find(words)
        spans[index] = start, start + len(words)
        at = first + len(written)
    return spans


def _turn_ends(
    text: str,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    contents: dict[int, Span],
    token_starts: Sequence[int],
) -> list[tuple[int, int]]:
    """Where turns end in the rendered text, with their numbers, in their order there.

    A turn ends where the rendering of the messages up to it ends, as far as the text agrees with that rendering. Where
    it differs before the turn's content (some templates write an earlier turn otherwise than a last one), what follows
    the content in that rendering still tells; where the template refuses to stop there, the content's end does.
    """

    def agreeing(rendered: str, at: int) -> int:
        """Where a rendering ceases to agree with the text from `at` on, at the start of a token."""
        last = at + _agreement(rendered, text[at:])
        if last == len(text):
            return last
        return max(token_starts[max(bisect.bisect_right(token_starts, last) - 1, 0)], at)

    ends = []
    for turn in range(len(messages)):
        some = messages[: turn + 1]
        content_end = contents.get(turn, (0, 0))[1]
        try:
            end = agreeing(render_messages(tokenizer, some, add_generation_prompt=False), 0)
            if end < content_end:
                around, order = _marked(some, tokenizer, opens_answer=False)
                after = around[-1] if order[-1:] == [turn] else ""
                end = agreeing(after, content_end)
        except ValueError:  # some templates refuse a conversation that ends there
            end = content_end
        following = [
            contents[later][0] for later in contents if later > turn and contents[later][0] >= content_end
        ]
        ends.append((max(content_end, min([end, *following])), turn))
    return sorted(ends)


def _agreement(left: str, right: str) -> int:
    """How many characters two texts have in common from their beginnings."""
    if right.startswith(left):
        return len(left)
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))


def starts_with_bos(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the first token is a BOS that the tokenizer put before the text."""
    added = tokenizer("")["input_ids"][:1]
    return added == [tokenizer.bos_token_id] and list(tokens[:1]) == added


def without_second_bos(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    """Tokens of a text without the BOS that the tokenizer put before the one that the text spells."""
    return tokens[1:] if starts_with_bos(tokens, tokenizer) and tokens[1:2] == tokens[:1] else tokens


def _decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    alone = [[index] for index in ids]
    return tuple(tokenizer.batch_decode(alone, clean_up_tokenization_spaces=False))


def _covering(offsets: Sequence[Span], tokens: Sequence[str], text: str) -> tuple[Span, ...]:
    """Spans of tokens that leave out no character of the text.

    Tokenizers leave out spaces (`trim_offsets`) and characters that are composed with the one before. A token gets back
    the spaces that it begins with; whatever else is left out belongs to the token before.
    """
    spans: list[Span] = []
    at, holder = 0, None
    for (start, end), token in zip(offsets, tokens, strict=True):
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
        at = max(at, end)
    if holder is not None and at < len(text):
        spans[holder] = spans[holder][0], len(text)
    return tuple(spans)
