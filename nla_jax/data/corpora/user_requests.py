"""The corpus `requests`: what a user asks in one turn, up to where the assistant's answer begins.

At the start of an answer every chat ends in the same tokens, and the activation there is about what was asked. So
requests differ in task, topic, language, tone and asker: some are combined from the built-in templates, and some are
about a text that an installed package brings, or are the user's turn of a dialogue.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nla_jax.data.corpora.chats import Message, render_plain
from nla_jax.data.corpora.documents import Document
from nla_jax.data.corpora.duplicates import without_repeated_runs
from nla_jax.data.corpora.packages import package_versions, texts_for_requests
from nla_jax.data.corpora.self_prompts import SelfChatConfig, built_in_prompts, built_in_templates, one_of
from nla_jax.data.splits import hash_fraction
from nla_jax.lm.places import sentence_ends

TEMPLATED = 8000
"""How many requests are combined from templates; near repetitions among them are left out."""
LEAST_BYTES, MOST_BYTES = 24, 340
"""Requests are this long in UTF-8: about 6 to 90 tokens, to which a chat template adds its own."""
MOST_OF_TEXT = 220
"""Most bytes of the text that a request is about."""
MAX_PER_KIND = 250
"""Most requests of a kind in a language."""
MAX_ABOUT_KIND = 100
"""Most requests about one kind of text."""
REQUESTS_PER_TEXT = 3
"""Most requests about the parts of one text."""
SYSTEM_SHARE = 0.2
"""Share of the requests about a text that come with a system prompt."""

_FAMILIES = {
    **dict.fromkeys(("interactive sessions", "code"), "code"),
    **dict.fromkeys(
        ("tables", "JSON", "CSV", "rows of numbers", "lists", "settings", "parameter lists"), "data"
    ),
    **dict.fromkeys(("questions", "dialogue"), "said"),
}
"""Kinds of texts that are not prose -> which requests are made about them."""


def request_documents() -> Iterator[Document]:
    """Chats of one user turn, some with a system prompt, that end where the assistant's answer begins.

    A document's genre tells what is asked, and in which language: "request (advice)", "request in German (letter)".
    Near repetitions are left out, see `without_repeated_runs`.

    Raises:
      ModuleNotFoundError: a package of the extra `texts` is not installed.
    """
    found = (request for request in (*_from_templates(), *_about_texts()) if _has_length(request.text))
    for request in without_repeated_runs(found, purpose="requests", limits=_limits):
        yield dataclasses.replace(request, text=render_plain(request.messages))


def request_versions() -> dict[str, str]:
    """The versions of the packages whose texts requests are about, and a digest of the templates."""
    templates = json.dumps(built_in_templates(), sort_keys=True).encode()
    return {
        **package_versions(),
        "templates of requests": hashlib.blake2b(templates, digest_size=4).hexdigest(),
    }


def _limits(request: Document) -> dict[Hashable, int]:
    return {request.genre: MAX_ABOUT_KIND if "(about " in request.genre else MAX_PER_KIND}


def _has_length(text: str) -> bool:
    return LEAST_BYTES <= len(text.encode()) <= MOST_BYTES


def _request(text: str, language: str, kind: str, system: str) -> Document:
    """A request as a document; its text is the user's turn alone, by which repetitions are found."""
    messages: tuple[Message, ...] = ({"role": "user", "content": text},)
    if system:
        messages = ({"role": "system", "content": system}, *messages)
    digest = hashlib.blake2b(json.dumps([system, text]).encode(), digest_size=8).hexdigest()
    tongue = "" if language == "english" else f" in {language.capitalize()}"
    return Document(digest, text, f"request{tongue} ({kind.replace('_', ' ')})", messages)


def _from_templates() -> Iterator[Document]:
    for prompt in built_in_prompts(SelfChatConfig(documents=TEMPLATED, turns=1), seed=0):
        yield _request(prompt.turns[0], prompt.language, prompt.kind, prompt.system)


def _about_texts() -> Iterator[Document]:
    """Requests about parts of texts, in the language of the text or in English, and users' turns as they are."""
    templates = built_in_templates()
    for document in texts_for_requests():
        kind, _, tongue = document.genre.partition(" in ")
        family = _FAMILIES.get(kind, "prose")
        rng = np.random.default_rng(int(hash_fraction(document.id, seed=0, purpose="about") * 2**53))
        if document.messages is not None and family != "said":
            continue
        for part in _parts(document, family)[:REQUESTS_PER_TEXT]:
            own = tongue.lower() if tongue.lower() in templates else "english"
            if family == "said":
                yield _request(part, tongue.lower() or "english", kind, "")
                continue
            language = own if rng.random() < 0.6 else "english"
            request, system = _about(templates[language], family, rng)
            yield _request(request.replace("{text}", part), language, f"about {document.genre}", system)


def _about(templates: Mapping[str, Any], family: str, rng: np.random.Generator) -> tuple[str, str]:
    """A request with {text} in the place of a text, and a system prompt, which is mostly empty."""
    system = one_of(templates["systems"], rng) if rng.random() < SYSTEM_SHARE else ""
    return one_of(templates["about_texts"][family], rng), system


def _parts(document: Document, family: str) -> list[str]:
    """Short parts of a document: users' turns, lines of code and data, or sentences."""
    if document.messages is not None:
        return [message["content"] for message in document.messages if message["role"] == "user"]
    if family == "said":
        return document.text.split("\n")
    if family == "prose":
        ends = [0, *sentence_ends(document.text), len(document.text)]
        return _packed([document.text[a:b] for a, b in itertools.pairwise(ends)], "")
    return _packed(document.text.split("\n"), "\n")[:1]


def _packed(pieces: Sequence[str], separator: str) -> list[str]:
    """Consecutive pieces put together to parts of at most `MOST_OF_TEXT` bytes; longer pieces are left out."""
    parts, held = [], ""
    for piece in (*pieces, None):
        joined = held + separator + piece if piece is not None and held else piece or ""
        if piece is not None and len(joined.encode()) <= MOST_OF_TEXT:
            held = joined
            continue
        if held.strip():
            parts.append(held.strip("\n") if separator else held.strip())
        held = piece if piece is not None and len(piece.encode()) <= MOST_OF_TEXT else ""
    return parts
