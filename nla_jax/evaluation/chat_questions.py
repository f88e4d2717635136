"""The questions that a chat model is asked about texts, and how its replies are read; unreadable replies are marked."""

import json
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from nla_jax.chat.models import ChatModel

LETTERS = "ABCDEFGHJKLMNOPQRSTUVWXYZ"
"""Letters that name options; I is left out, because it is a word."""
LETTER_TOKENS, LIST_TOKENS = 16, 384
"""Most tokens of an answer that is one letter, and of one that is a JSON list."""
KINDS = {
    "theme": "what the text is about or what sort of text it is",
    "entity": "a person, place, thing, name or number in it",
    "detail": "its wording, or what exactly it says",
}
"""Kinds of claims that a chat model takes out of an explanation, and what each means."""
VERDICTS = ("supported", "contradicted", "not stated")

_QUESTION = (
    "{question}\n{options}\nAnswer with the letter of one option and nothing else. If you cannot know, guess."
)
_CLAIMS = (
    "These notes are about a text that you do not see:\n{notes}\n\n"
    "List the claims that they make about the text, each so small that it is true or false on its own. Leave out "
    "what they say of how the text might go on. Answer with a JSON list and nothing else; every item is an object "
    'with the keys "kind" and "claim". Kinds: {kinds}. If the notes claim nothing, answer [].'
)
_CHECK = (
    "A text:\n{text}\n\nClaims about it:\n{claims}\n\n"
    "Is each claim supported by the text, contradicted by it, or not stated in it? Answer with a JSON list of "
    '{count} strings in the order of the claims, each "supported", "contradicted" or "not stated", and nothing else.'
)


def choices(
    chat: ChatModel,
    told: Mapping[str, Sequence[str]],
    question: str,
    options: Sequence[Sequence[str]],
    keys: Sequence[str],
    *,
    seed: int,
    desc: str | None = None,
) -> dict[str, Int[np.ndarray, "N"]]:
    """The option that a chat model chooses for each row after each kind of text before the question; -1 for none.

    Args:
      chat: the chat model.
      told: name -> the text that stands before each row's question.
      question: the question, the same for all rows.
      options: each row's options, at most 25; they are shown in an order that depends on the seed and the row's key.
      keys: names of the rows.
      seed: seed of the orders.
      desc: name of the progress bar; None shows none.
    """
    orders = [
        np.random.default_rng([seed, *key.encode()]).permutation(len(row))
        for key, row in zip(keys, options, strict=True)
    ]
    asked = []
    for order, row in zip(orders, options, strict=True):
        lines = "\n".join(f"{letter}) {row[i]}" for letter, i in zip(LETTERS, order, strict=False))
        asked.append(_QUESTION.format(question=question, options=lines))
    prompts = [f"{head}{body}" for heads in told.values() for head, body in zip(heads, asked, strict=True)]
    replies = iter(chat(prompts, max_tokens=LETTER_TOKENS, desc=desc))

    def chosen(reply: str, order: np.ndarray, row: Sequence[str]) -> int:
        place = place_of(reply, [row[i] for i in order])
        return -1 if place is None else int(order[place])

    return {
        name: np.array(
            [chosen(next(replies), order, row) for order, row in zip(orders, options, strict=True)], np.int64
        )
        for name in told
    }


def place_of(reply: str, options: Sequence[str]) -> int | None:
    """The place of the option that a reply names by its letter or its text; None if it names none or several."""
    reply = _said(reply)
    letters, texts = LETTERS[: len(options)], [_bare(option) for option in options]
    # The letter first, with nothing or a mark after it; else after the word answer; else the only one with a bracket.
    if found := re.match(rf"\W*([{letters}])(?=$|[).:,;*\]\n])", reply, re.IGNORECASE):
        place, after = letters.index(found[1].upper()), _bare(reply[found.end() :])
        # A letter beside another option's text names both.
        return None if after in texts and after != texts[place] else place
    if texts.count(_bare(reply)) == 1:
        return texts.index(_bare(reply))
    found = set(re.findall(rf"\b[Aa]nswer(?: is)?\W+([{letters}])\b", reply))
    found = found or set(re.findall(rf"\b([{letters}])\)", reply))
    return letters.index(found.pop()) if len(found) == 1 else None


def claims(chat: ChatModel, texts: Sequence[str | None], desc: str | None = None) -> list[list | None]:
    """The claims (kind, claim) that a chat model finds in each text; None where its reply is no list of claims."""
    kinds = "; ".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items())
    prompts = [_CLAIMS.format(notes=text, kinds=kinds) for text in texts if text]
    claimed = iter(map(claims_of, chat(prompts, max_tokens=LIST_TOKENS, desc=desc)))
    return [next(claimed) if text else [] for text in texts]


def claims_of(reply: str) -> list[tuple[str, str]] | None:
    """The claims that a reply lists, None if it is not a JSON list of claims."""
    items = _json_list(reply)
    if items is None or not all(isinstance(item, dict) for item in items):
        return None
    claimed = [(item.get("kind"), item.get("claim")) for item in items]
    readable = all(kind in [*KINDS] and isinstance(claim, str) and claim.strip() for kind, claim in claimed)
    return claimed if readable else None


def verdicts(
    chat: ChatModel,
    claimed: Sequence[Sequence[tuple[str, str]]],
    texts: Sequence[str],
    desc: str | None = None,
) -> list[list[str | None]]:
    """One of `VERDICTS` for each claim about each text; None where the chat model's reply is no list of verdicts."""
    prompts = []
    for of_text, text in zip(claimed, texts, strict=True):
        lines = "\n".join(f"{i}. {claim}" for i, (_, claim) in enumerate(of_text, 1))
        if of_text:
            prompts.append(_CHECK.format(text=text, claims=lines, count=len(of_text)))
    replies = iter(chat(prompts, max_tokens=LIST_TOKENS, desc=desc))
    return [verdicts_of(next(replies), len(of_text)) if of_text else [] for of_text in claimed]


def verdicts_of(reply: str, count: int) -> list[str | None]:
    """The verdicts that a reply lists; None for every claim unless it lists `count` of `VERDICTS`."""
    items = _json_list(reply)
    readable = items is not None and len(items) == count and all(item in VERDICTS for item in items)
    return items if readable else [None] * count


def _json_list(reply: str) -> list | None:
    """The JSON list in a reply, which may have other text around it; None if there is none."""
    match = re.search(r"\[.*\]", _said(reply), re.DOTALL)
    try:
        return match and json.loads(match[0])
    except ValueError:
        return None


def _bare(text: str) -> str:
    """A text in one case and without the marks around it, for comparison."""
    return text.casefold().strip(" \n\t\"'()[].:,;*")


def _said(reply: str) -> str:
    """A reply without the thoughts that open models put between <think> tags."""
    return re.sub(r"<think>.*?</think>", "", reply, flags=re.DOTALL).strip()
