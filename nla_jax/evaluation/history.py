"""How the AV's texts about a few fixed activations changed in joint training, for readers of a report."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from nla_jax.files import AnyPath
from nla_jax.training.metrics_log import MetricsLog


@dataclasses.dataclass(frozen=True)
class Version:
    """A text that the AV wrote about an activation at one evaluation, or at several in a row."""

    first: int
    """Step of the first of these evaluations."""
    last: int
    """Step of the last of them."""
    text: str | None
    """None where no text could be read."""
    cosine: float | None
    """Of the activation with what the judge rebuilds from the text."""
    pieces: tuple[tuple[str, bool], ...]
    """The text in parts, each with whether it is new against the version before."""

    @property
    def steps(self) -> str:
        """The steps of the evaluations, as in "4" or "8 to 16"."""
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"


@dataclasses.dataclass(frozen=True)
class Watched:
    """An activation with all that was written about it, in order."""

    id: str
    """The document, and the number of its tokens that were read."""
    place: str | None
    context_tail: str
    writer_text: str | None
    """What the writer of the warm-start texts wrote about it."""
    versions: tuple[Version, ...]


def read_history(run_dir: AnyPath) -> list[Watched]:
    """The watched activations of a run; none where it kept no texts."""
    return histories(MetricsLog(run_dir / "metrics.jsonl").history())


def histories(lines: Iterable[Mapping[str, Any]]) -> list[Watched]:
    """The watched activations, from the lines of `history.jsonl` in their order."""
    seen: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for line in lines:
        for row in line["rows"]:
            seen.setdefault(row["id"], []).append((line["step"], row))
    return [
        Watched(
            id=name,
            place=rows[0][1]["place"],
            context_tail=rows[0][1]["context_tail"],
            writer_text=rows[0][1]["writer_text"],
            versions=_versions(rows),
        )
        for name, rows in seen.items()
    ]


def _versions(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> tuple[Version, ...]:
    versions: list[Version] = []
    for step, row in rows:
        text, before = row["text"], versions[-1] if versions else None
        if before is not None and text == before.text:
            versions[-1] = dataclasses.replace(before, last=step)
        else:
            pieces = changes(text if before is None else before.text, text)
            versions.append(Version(step, step, text, row["cosine"], pieces))
    return tuple(versions)


def changes(before: str | None, after: str | None) -> tuple[tuple[str, bool], ...]:
    """Parts of a text, each with whether its words are new against another text: others, or in another place.

    All parts together are the text; a text that there is not counts as empty.
    """
    # A word keeps the blanks behind it, which are not compared.
    old, new = (re.findall(r"\s+|\S+\s*", text or "") for text in (before, after))
    matcher = difflib.SequenceMatcher(
        None, [word.strip() for word in old], [word.strip() for word in new], autojunk=False
    )
    parts = ((kind, "".join(new[start:end])) for kind, _, _, start, end in matcher.get_opcodes())
    return tuple((part, kind != "equal") for kind, part in parts if part)


def as_text(history: Iterable[Watched]) -> str:
    """All texts in order for a terminal, with the words that are new in [brackets]."""
    return "\n\n".join("\n".join(_lines(watched)) for watched in history)


def _lines(watched: Watched) -> Iterable[str]:
    yield f"{watched.id}{f', {watched.place}' if watched.place else ''}: ...{watched.context_tail[-80:]!r}"
    if watched.writer_text is not None:
        yield f"  writer: {watched.writer_text}"
    for version in watched.versions:
        cosine = "" if version.cosine is None else f" (cosine {version.cosine:.2f})"
        yield f"  {version.steps}{cosine}: {_bracketed(version)}"


def _bracketed(version: Version) -> str:
    if version.text is None:
        return "(none could be read)"
    parts = (f"[{part.strip()}]{part[len(part.rstrip()) :]}" if new else part for part, new in version.pieces)
    return "".join(parts)
