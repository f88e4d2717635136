"""Chats as data sets bring them, in one shape: the shape that chat templates take.

Three shapes are read: `messages` (`role` and `content`, as in most chat data sets and APIs), `conversation` (WildChat,
of the same entries) and `conversations` (ShareGPT, of `from` and `value`).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from nla_jax.lm.tokenized import as_unicode

Message: TypeAlias = dict[str, Any]
"""One turn of a chat: `role` and `content`, and for tools perhaps `tool_calls`, `tool_call_id` and `name`."""

CHAT_FIELDS = ("messages", "conversation", "conversations")
"""Fields that hold a chat, in the order in which they are looked for in rows without the field of the text."""
ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("function", "function_response", "tool_response", "observation", "ipython"), "tool"),
}
"""Role as a data set names it, in small letters -> role as chat templates name it."""
CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT whose value is a call of a tool as JSON."""


class ChatLeftOut(Exception):
    """A chat that is left out and counted; the message is the reason."""


def read_chat(value: Any, where: str) -> tuple[Message, ...]:
    """The messages of a chat in one of the three shapes.

    Args:
      value: a list of mappings, or its JSON.
      where: the place of the row, for messages.

    Returns:
      Messages with a `role` that is system, developer, user, assistant or tool, and a `content` that is a text,
      stripped of white space at its ends, and empty only beside `tool_calls`. `tool_calls` have the shape of OpenAI's
      API, with arguments as a mapping where they are valid JSON.

    Raises:
      ChatLeftOut: there is no turn of the assistant, or a turn is empty or holds something else than text.
      ValueError: the value is no list of messages, or has a role that is not known; the message names the place.
    """
    if isinstance(value, str):
        value = _from_json(value)
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(m, Mapping) for m in value)
    ):
        raise ValueError(
            f"{where}: a chat is a list of messages with 'role' and 'content' (or 'from' and 'value'), and this is "
            f"{_short(value)}; name the field that holds the chat with corpus.field"
        )
    messages = tuple(_message(message, where) for message in value)
    if not any(message["role"] == "assistant" for message in messages):
        raise ChatLeftOut("chats without a turn of the assistant")
    return messages


def render_plain(messages: Sequence[Message]) -> str:
    """A chat as plain text, a line `role: content` for each message: what filters and comparisons of texts read."""
    lines = []
    for message in messages:
        calls = [
            f"{call['function']['name']}({json.dumps(call['function']['arguments'], ensure_ascii=False)})"
            for call in message.get("tool_calls", ())
        ]
        lines.append(f"{message['role']}: {' '.join(filter(None, [message['content'], *calls]))}")
    return "\n".join(lines)


def _message(message: Mapping[str, Any], where: str) -> Message:
    name = message.get("role", message.get("from"))
    role = ROLES.get(str(name).lower())
    if role is None:
        raise ValueError(
            f"{where}: a message has the role {name!r}; the roles that are read are {', '.join(ROLES)}: rename it in "
            "the data"
        )
    content = _text(message.get("content", message.get("value")))
    calls = message.get("tool_calls")
    if calls is None and str(name).lower() in CALLS:
        calls, content = _from_json(content), ""
        calls = calls if isinstance(calls, list) else [calls]
    read: Message = {"role": role, "content": content}
    if calls is not None and len(calls):
        read["tool_calls"] = [_call(call, where) for call in calls]
    for key in ("tool_call_id", "name"):
        if message.get(key):
            read[key] = as_unicode(str(message[key]))
    if not content and "tool_calls" not in read:
        raise ChatLeftOut("chats with an empty turn")
    return read


def _text(content: Any) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        if any(not isinstance(part, Mapping) or part.get("type", "text") != "text" for part in content):
            raise ChatLeftOut("chats with parts that are no text")
        content = "\n".join(part.get("text") or "" for part in content)
    if content is not None and not isinstance(content, str):
        raise ChatLeftOut("chats with parts that are no text")
    return as_unicode(content or "").strip()


def _call(call: Any, where: str) -> dict[str, Any]:
    """One call of a tool in the shape of OpenAI's API."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not function.get("name"):
        raise ValueError(
            f"{where}: a call of a tool is an object with the 'name' of the function and its 'arguments', and this is "
            f"{_short(call)}; correct the row, or leave it out"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(arguments)
    read = {
        "type": "function",
        "function": {"name": str(function["name"]), "arguments": _without_nulls(arguments)},
    }
    return {"id": str(call["id"]), **read} if call.get("id") else read


def _without_nulls(arguments: Any) -> Any:
    """Arguments without those that are null: parquet holds one for each argument that any row has."""
    if isinstance(arguments, Mapping):
        return {key: _without_nulls(value) for key, value in arguments.items() if value is not None}
    return {} if arguments is None else arguments


def _from_json(text: str) -> Any:
    """What a text is as JSON; the text itself where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
