"""Conversations as a tokenizer's chat template writes them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""{"role": ..., "content": ...}, with whatever else the template reads (tool calls, names)."""
PLACEHOLDER = "\ue000"
"""Stands for a text that a chat template is to enclose; a character for private use, in no template."""
_FIXED_DATE = (
    "{% macro strftime_now(format) %}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%d %B %Y': '26 July 2024'}.get(format, '26 Jul 2024') }}{% endmacro %}"
)
"""What chat templates that write the date are told, in three usual forms: a prompt must be the same tomorrow."""


def render_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool
) -> str:
    """The text of a conversation, a BOS included where the template writes one.

    Args:
      tokenizer: with a chat template.
      messages: in order.
      add_generation_prompt: whether what opens the assistant's next turn follows.

    Raises:
      ValueError: no chat template, or one that refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, so messages cannot be rendered; use an instruction-tuned model's "
            "tokenizer, or give plain text"
        )
    # A token that the tokenizer lacks is nothing, and never the word None or an error.
    names: dict[str, Any] = {name: getattr(tokenizer, name) or "" for name in ("bos_token", "eos_token")}
    try:
        template = tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(
            list(messages),
            chat_template=_FIXED_DATE + template if "strftime_now" in template else template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            enable_thinking=False,
            **names,
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"the chat template of the tokenizer cannot render messages with the roles "
            f"{', '.join(str(message.get('role')) for message in messages)} ({error}); give messages that it takes, "
            "or a tokenizer with another template"
        ) from error


def render_chat(tokenizer: PreTrainedTokenizerBase, message: str, answer: str | None = None) -> str:
    """A user message, with the generation prompt or an answer after it, as the chat template writes them.

    Raises:
      ValueError: no chat template, or one that refuses the message.
    """
    chat = [{"role": "user", "content": message}]
    if answer is not None:
        chat.append({"role": "assistant", "content": answer})
    return render_messages(tokenizer, chat, add_generation_prompt=answer is None)


def end_token(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> int:
    """What the chat template writes after an answer if that is a special token, else the tokenizer's EOS.

    For some models (Gemma, Phi-3) the two differ: EOS ends a document, not a turn.

    Raises:
      ValueError: neither is there.
    """
    try:
        text = render_chat(tokenizer, "?", answer=PLACEHOLDER) if chat else ""
    except ValueError:  # a template need not render answers
        text = ""
    *_, after = text.partition(PLACEHOLDER)
    first = tokenizer.encode(after.lstrip(), add_special_tokens=False)[:1]
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    if special.issuperset(first) and first:
        return first[0]
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer names no token that ends a text; set its eos_token")
    return tokenizer.eos_token_id
