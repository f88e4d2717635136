"""Parts of files put together to texts of a useful length, and what no text of a corpus should hold."""

import importlib.metadata
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

LEAST_BYTES = 280
"""Texts of fewer bytes (UTF-8) are dropped: they hold fewer than 60 tokens."""
MOST_CHARACTERS = 1200
"""A text ends before the part with which it would be longer: contexts are cut after some hundred tokens."""

_NOTICE = re.compile(
    r"copyright|licen[cs]e|licensed|warrant(?:y|ies)|all rights reserved|SPDX|merchantab", re.IGNORECASE
)
_PLACEHOLDER = re.compile(r"%\(\w+\)|%[sdr]\b|\$\{|\{\w*\}|</?\w+[^<>]*>|&\w+;|<!--")


def is_notice(text: str) -> bool:
    """Whether a text speaks of licences and rights, as the heads of source files do."""
    return _NOTICE.search(text) is not None


def is_clean(text: str) -> bool:
    """Whether a text for readers is free of legal notices, placeholders of programs and HTML."""
    return not (is_notice(text) or _PLACEHOLDER.search(text))


def joined(parts: Iterable[str], separator: str = "\n\n", least: int = LEAST_BYTES) -> Iterator[str]:
    """Put consecutive parts together to texts of at least `least` bytes.

    A text ends where it is long enough, and a part that is longer than `MOST_CHARACTERS` is left out. What is left at
    the end, and is too short for a text, is dropped.
    """
    held: list[str] = []
    for part in parts:
        if not part.strip() or len(part) > MOST_CHARACTERS:
            continue
        if held and sum(map(len, held)) + len(part) > MOST_CHARACTERS:
            held = []
        held.append(part)
        text = separator.join(held)
        if len(text.encode()) >= least:
            yield text.strip()
            held = []


def files_of(distribution: importlib.metadata.Distribution, pattern: str) -> Iterator[tuple[str, Path]]:
    """Names and paths of the installed files of a distribution that match a regular expression, in alphabetical order.

    Args:
      distribution: is installed.
      pattern: is searched for in the names, which have forward slashes.
    """
    for file in sorted(distribution.files or (), key=str):
        if re.search(pattern, file.as_posix()):
            path = Path(str(distribution.locate_file(file)))
            if path.is_file():
                yield file.as_posix(), path


def read_text(path: Path) -> str:
    """The text of a file with tabs as spaces; empty where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n").expandtabs(4)
    except UnicodeDecodeError:
        return ""
