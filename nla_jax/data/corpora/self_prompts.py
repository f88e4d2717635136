"""User turns of chats whose answers the target LM writes itself: from a file, or combined from built-in templates."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nla_jax.files import as_path
from nla_jax.lm.tokenized import as_unicode

BUILT_IN = "builtin"
"""The name of the built-in templates in `self:builtin`."""
_FOLDER = Path(__file__).parent / "prompts"
_ATTEMPTS = 20
"""Draws in a row that may give prompts which were drawn before; after them the templates count as used up."""


@dataclasses.dataclass(frozen=True)
class SelfChatConfig:
    """Chats that the target LM writes, where a source of the corpus is self:PROMPTS."""

    documents: int = 2000
    """How many chats are begun. A file with fewer prompts gives one for each; of more, this many are chosen."""
    turns: int = 2
    """Most user turns of a chat. Chats of the built-in templates have from one to this many, drawn for each."""
    max_tokens: int = 256
    """Most tokens of an answer. A chat ends with an answer that is cut there."""
    temperature: float = 0.7
    """Of sampling; 1 draws from the model's own distribution, in which small models lose the thread, and 0 takes the
    likeliest tokens."""
    languages: tuple[str, ...] = ()
    """Languages of the built-in templates, such as english and german: the names of the files in data/corpora/prompts.
    Empty stands for all of them."""
    batch_size: int = 32
    """Chats that are written at a time, and lost at most when the process is killed."""
    model: str = ""
    """Another model that writes the answers, in the forms of model.path; empty for the target LM itself."""

    def __post_init__(self):
        for name in ("documents", "turns", "max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"corpus.self_chat.{name} is {getattr(self, name)}; expected a positive number"
                )
        if self.temperature < 0:
            raise ValueError(
                f"corpus.self_chat.temperature is {self.temperature}; expected 0 (the likeliest tokens) or more"
            )


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """What a chat is begun and continued with."""

    system: str
    """The system prompt; empty for none."""
    turns: tuple[str, ...]
    """The user's turns, one at least."""
    language: str = ""
    """The language of the built-in templates, such as german; empty for prompts of a file."""
    kind: str = ""
    """The kind of the built-in template, such as letter; empty for prompts of a file."""

    @property
    def id(self) -> str:
        """A hash of everything that is said, by which the chat is sampled and put into a split."""
        return hashlib.blake2b(json.dumps([self.system, *self.turns]).encode(), digest_size=8).hexdigest()


def is_self_chat(source: str) -> bool:
    """Whether a source of documents is `self:PROMPTS`."""
    return source.startswith("self:")


def self_prompts(source: str, config: SelfChatConfig, seed: int) -> list[ChatPrompt]:
    """The prompts of `self:PROMPTS`, all different, in an order and a choice that the seed decides.

    Args:
      source: `self:builtin`, or `self:FILE` with a `.txt` file (a user turn in each line) or a `.jsonl` file (in each
        line a text, {"system": ..., "turns": [...]} or {"messages": [...]}, of whose messages the user's and the
        system's are taken).
      config: how many chats, and how many turns in each.
      seed: of the choice.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file of another kind, without prompts, or with a line that is none of these; the line is named; or
        a language without templates.
    """
    name = source.removeprefix("self:")
    if name == BUILT_IN:
        return list(built_in_prompts(config, seed))
    prompts = {prompt.id: prompt for prompt in _of_file(name, config.turns)}
    if not prompts:
        raise ValueError(f"{source}: the file holds no prompts; write a user turn in each line")
    ordered = sorted(prompts.values(), key=lambda prompt: _hash(seed, prompt.id))
    return ordered[: config.documents]


def _hash(*parts: Any) -> int:
    """A number from 0 to 2^64 - 1 that depends on all parts."""
    text = json.dumps(["self chat", *parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _of_file(name: str, turns: int) -> Iterator[ChatPrompt]:
    path = as_path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"corpus 'self:{name}': there is no file {path}; give a .txt or .jsonl file of prompts, or self:{BUILT_IN}"
        )
    if path.suffix.lower() not in (".txt", ".jsonl", ".ndjson"):
        raise ValueError(
            f"corpus 'self:{name}': prompts are read from .txt (a user turn in each line) or .jsonl files, not from "
            f"{path.suffix or 'a file without ending'}"
        )
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix.lower() == ".txt":
            yield ChatPrompt("", (line.strip(),))
        else:
            yield _of_line(line, f"{path}, line {number}", turns)


def _of_line(line: str, where: str, most_turns: int) -> ChatPrompt:
    """The prompt that a line of JSON describes."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: this is not JSON ({error}); write one value a line") from error
    if isinstance(row, str):
        row = {"turns": [row]}
    if isinstance(row, Mapping) and isinstance(messages := row.get("messages"), list):
        said = [m if isinstance(m, Mapping) else {} for m in messages]
        system = next((m.get("content") for m in said if m.get("role") == "system"), "")
        row = {"system": system, "turns": [m.get("content") for m in said if m.get("role") == "user"]}
    turns = row.get("turns") if isinstance(row, Mapping) else None
    system = row.get("system") or "" if isinstance(row, Mapping) else ""
    if (
        not isinstance(turns, list)
        or not turns
        or not isinstance(system, str)
        or not all(isinstance(turn, str) and turn.strip() for turn in turns)
    ):
        raise ValueError(
            f'{where}: expected a text, {{"system": ..., "turns": [...]}} or {{"messages": [...]}} with a turn of the '
            f"user at least, and texts that are not blank; found {line[:80]}"
        )
    return ChatPrompt(as_unicode(system).strip(), tuple(as_unicode(t).strip() for t in turns[:most_turns]))


@functools.cache
def built_in_templates() -> dict[str, dict[str, Any]]:
    """Language -> its built-in templates, in alphabetical order."""
    return {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted(_FOLDER.glob("*.yaml"))}


def built_in_prompts(config: SelfChatConfig, seed: int) -> Iterator[ChatPrompt]:
    """Prompts combined from the built-in templates, all different, which the seed decides; see `self_prompts`."""
    templates = built_in_templates()
    if unknown := set(config.languages) - {*templates}:
        raise ValueError(
            f"corpus.self_chat.languages: there are no templates in {', '.join(sorted(unknown))}; there are some in "
            f"{', '.join(templates)}"
        )
    languages = [name for name in templates if name in config.languages or not config.languages]
    shares = np.array([templates[name]["share"] for name in languages], float)
    seen: set[str] = set()
    index = repeated = 0
    while len(seen) < config.documents and repeated < _ATTEMPTS:
        rng = np.random.default_rng(_hash(seed, index))
        language = languages[rng.choice(len(languages), p=shares / shares.sum())]
        prompt = _drawn(language, templates[language], config.turns, rng)
        index += 1
        if prompt.id in seen:
            repeated += 1
            continue
        repeated = 0
        seen.add(prompt.id)
        yield prompt


def _drawn(
    language: str, templates: Mapping[str, Any], most_turns: int, rng: np.random.Generator
) -> ChatPrompt:
    """One prompt: a template of a kind with its fillers, some with a persona, a style, a system prompt, more turns."""
    kind = one_of(list(templates["kinds"]), rng)
    template = one_of(templates["kinds"][kind], rng)
    parts = re.split(r"\{(\w+)\}", template)  # Every second one is the name of a filler.
    text = "".join(one_of(templates["fillers"][part], rng) if i % 2 else part for i, part in enumerate(parts))
    text = text[:1].upper() + text[1:]
    persona = one_of(templates["personas"], rng) if rng.random() < 0.2 else ""
    style = one_of(templates["styles"], rng) if rng.random() < 0.25 else ""
    first = " ".join(filter(None, [persona, text, style]))
    follow_ups = rng.permutation(templates["follow_ups"])[: rng.integers(most_turns)]
    system = one_of(templates["systems"], rng) if rng.random() < 0.3 else ""
    return ChatPrompt(system, (first, *map(str, follow_ups)), language, kind)


def one_of(values: Sequence[str], rng: np.random.Generator) -> str:
    """One of the values, which the generator draws."""
    return values[rng.integers(len(values))]
