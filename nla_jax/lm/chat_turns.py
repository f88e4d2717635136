"""Where a chat template writes the messages of a conversation: their contents, and the ends of their turns.

Where the contents stand is told by a second rendering with marks in their place, since the template may hold the same
words as a message. Turns end where the rendering of the messages up to them ends. That takes a rendering for every
message, so what lies between two contents is remembered with the place where the turn ends in it: a template writes
the same few things there in all conversations.
"""

import bisect
import re
import weakref
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nla_jax.lm.chat_template import PLACEHOLDER, Message, render_messages

Span = tuple[int, int]
"""Start and end, in characters of a text."""
_MOST_REMEMBERED = 4096
_REMEMBERED: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict] = weakref.WeakKeyDictionary()
"""For each tokenizer: template, roles and what stands between two contents -> characters of it in the first turn."""

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


def contents_in(
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


def turn_ends(
    text: str,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    contents: dict[int, Span],
    token_starts: Sequence[int],
) -> list[tuple[int, int]]:
    """Where turns end in the rendered text, with their numbers, in their order there.

    A turn ends where the rendering of the messages up to it ends, as far as the text agrees with that rendering, at
    the start of a token. Where it differs before the turn's content (some templates write an earlier turn otherwise
    than a last one), what follows the content in that rendering still tells; where the template refuses to stop there,
    the content's end does.
    """
    ends = []
    for turn in range(len(messages)):
        content_end = contents.get(turn, (0, 0))[1]
        end = _agreeing_end(text, messages, turn, tokenizer, contents)
        if end < len(text):
            end = token_starts[max(bisect.bisect_right(token_starts, end) - 1, 0)]
        following = [
            contents[later][0] for later in contents if later > turn and contents[later][0] >= content_end
        ]
        ends.append((max(content_end, min([end, *following])), turn))
    return sorted(ends)


def _agreeing_end(
    text: str,
    messages: Sequence[Message],
    turn: int,
    tokenizer: PreTrainedTokenizerBase,
    contents: dict[int, Span],
) -> int:
    """The character where a turn ends, which may lie inside a token; remembered by what follows the turn's content."""
    is_last = turn == len(messages) - 1
    if turn not in contents or not (is_last or turn + 1 in contents):
        return _rendered_end(text, messages, turn, tokenizer, contents)
    content_end = contents[turn][1]
    stop = len(text) if is_last else contents[turn + 1][0]
    roles = messages[turn]["role"], None if is_last else messages[turn + 1]["role"]
    key = tokenizer.chat_template, *roles, text[content_end:stop]
    remembered = _REMEMBERED.setdefault(tokenizer, {})
    if key not in remembered:
        if len(remembered) == _MOST_REMEMBERED:
            remembered.clear()
        remembered[key] = _rendered_end(text, messages, turn, tokenizer, contents) - content_end
    return content_end + remembered[key]


def _rendered_end(
    text: str,
    messages: Sequence[Message],
    turn: int,
    tokenizer: PreTrainedTokenizerBase,
    contents: dict[int, Span],
) -> int:
    """The character where the rendering of the messages up to a turn ceases to agree with the text."""
    beginning, content_end = messages[: turn + 1], contents.get(turn, (0, 0))[1]
    try:
        end = _agreement(render_messages(tokenizer, beginning, add_generation_prompt=False), text)
        if end >= content_end:
            return end
        around, order = _marked(beginning, tokenizer, opens_answer=False)
        after = around[-1] if order[-1:] == [turn] else ""
        return content_end + _agreement(after, text[content_end:])
    except ValueError:  # some templates refuse a conversation that ends there
        return content_end


def header_end(text: str, messages: Sequence[Message], turn: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The character where what the template writes before an assistant's content ends; the text's end if unknown."""
    try:
        before = render_messages(tokenizer, messages[:turn], add_generation_prompt=True)
    except ValueError:  # some templates refuse a conversation that ends there
        return len(text)
    return _agreement(before, text)


def _agreement(left: str, right: str) -> int:
    """How many characters two texts have in common from their beginnings."""
    if right.startswith(left):
        return len(left)
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))
