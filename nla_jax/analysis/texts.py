"""Texts and conversations to explain: read from files, and which of their tokens are chosen.

A line of a .jsonl file is a JSON object with `text` or `messages`, and an `id` if it likes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nla_jax.files import Place, as_path
from nla_jax.lm.activations import Activations

READABLE = (".jsonl", ".json", ".txt", ".md")
"""Kinds of files that hold texts."""


@dataclasses.dataclass(frozen=True)
class TextItem:
    """A text or a conversation, by a name that is its own in its file."""

    id: str
    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None

    def digest(self, *settings: Any) -> str:
        """Identifies the text together with whatever else a result of it depends on."""
        whole = json.dumps([self.text, self.messages, *map(str, settings)], sort_keys=True)
        return hashlib.blake2b(whole.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def read_texts(path: Place) -> list[TextItem]:
    """The texts of a file: one a line of .jsonl, the whole file of .txt and .md, and in .json one or a list of them.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, a line that is no such object, or an id that comes twice.
    """
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a file of texts ({', '.join(READABLE)})")
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        raise ValueError(
            f"{path} is none of {', '.join(READABLE)}; write one JSON object a line, with `text` or `messages`, into a "
            ".jsonl file"
        )
    try:
        content = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from error
    if suffix in (".txt", ".md"):
        return [TextItem(path.name, content)]
    if suffix == ".json":
        whole = _parsed(content, str(path))
        listed = whole if isinstance(whole, list) else [whole]
        if listed and all(isinstance(row, dict) and "role" in row for row in listed):
            listed = [{"id": path.name, "messages": listed}]  # The file is one conversation.
        rows = [(f"{path}, entry {number}", row) for number, row in enumerate(listed, 1)]
    else:
        # Only \n ends a line: JSON strings may hold other line separators, such as U+2028, unescaped.
        lines = enumerate(content.split("\n"), 1)
        rows = [
            (f"{path}, line {number}", _parsed(line, f"{path}, line {number}"))
            for number, line in lines
            if line.strip()
        ]
    items = [_item(where, row) for where, row in rows]
    ids = [item.id for item in items]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(
            f"{path} holds the ids {', '.join(twice[:5])} more than once; give every text its own"
        )
    if not items:
        raise ValueError(f"{path} holds no texts; give at least one")
    return items


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); write one object a line") from error


def _item(where: str, row: Any) -> TextItem:
    name = where.rpartition(", ")[2]
    if isinstance(row, Mapping):
        name = name if row.get("id") is None else str(row["id"])
        if isinstance(row.get("text"), str):
            return TextItem(name, row["text"])
        if isinstance(row.get("messages"), list):
            return TextItem(name, messages=row["messages"])
    holds = sorted(row) if isinstance(row, Mapping) else type(row).__name__
    raise ValueError(f"{where} holds {holds}; expected an object with a string `text` or a list `messages`")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which tokens of a text are explained: those that every given rule chooses; without any, all but a BOS."""

    positions: tuple[str, ...] = ()
    """Indices and ranges as Python writes them, "5", "-1", "0:5", "-3:", counted over the whole text."""
    role: str | None = None
    """Tokens of the messages of this role."""
    last_of_turn: bool = False
    """The last token of every message."""
    match: str | None = None
    """Tokens that overlap a match of this regular expression."""

    def of(self, activations: Activations) -> Activations:
        """The chosen rows of a whole text's activations.

        Raises:
          ValueError: a position that is none or lies outside the text, or rules that choose nothing.
        """
        rules = []
        source = activations.source
        if self.positions:
            rules.append({p for spec in self.positions for p in parse_positions(spec, len(source))})
        if self.role is not None:
            rules.append(set(source.with_role(self.role)))
        if self.last_of_turn:
            rules.append(set(source.last_of_turns()))
        if self.match is not None:
            rules.append(set(source.matching(self.match)))
        chosen = set(activations.positions).intersection(*rules)
        if not chosen:
            raise ValueError(
                f"{self} chooses none of the {len(source)} tokens of the text; choose at least one"
            )
        return activations.at(sorted(chosen))


def parse_positions(spec: str, length: int) -> list[int]:
    """The positions that an index or a range stands for in a text of some length.

    Raises:
      ValueError: neither an index nor a range, or one that lies outside the text.
    """
    parts = spec.split(":")
    try:
        numbers = [int(part) if part else None for part in parts]
        if len(parts) > 3 or parts == [""]:
            raise ValueError(spec)
    except ValueError as error:
        raise ValueError(
            f"{spec!r} is no position; give an index or a range, such as 5, -1, 0:5 or -3:"
        ) from error
    if len(parts) > 1:
        chosen = list(range(length))[slice(*numbers)]
    else:
        chosen = [numbers[0] % length] if -length <= numbers[0] < length else []
    if not chosen:
        raise ValueError(f"position {spec} is outside the text: it has tokens 0 to {length - 1}")
    return chosen


def looks_like_a_file(text: str) -> bool:
    """Whether a text is more likely meant as the name of a file: there is one of that name, or it ends like one."""
    one_word = len(text.split()) == 1 and len(text) < 256
    endings = (*READABLE, ".parquet", ".csv", ".npy", ".npz", ".pdf", ".html")
    return one_word and (Path(text).is_file() or text.endswith(endings))
