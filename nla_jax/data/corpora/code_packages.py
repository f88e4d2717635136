"""The packages that nla_jax requires bring code, examples, lists, tables, manuals and settings beside prose.

Files are read and never imported. Ids of documents are unique in a package. Of the many modules a part is read that a
hash of their names decides.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path

from nla_jax.data.corpora.docstrings import SKIPPED_FOLDERS, docstrings_of
from nla_jax.data.corpora.documents import Document
from nla_jax.data.corpora.passages import LEAST_BYTES, files_of, is_clean, is_notice, joined, read_text
from nla_jax.data.splits import hash_fraction

READ_SHARE = 0.2
"""Share of the Python modules that is read."""
CODE = {
    ".c": "C", ".cc": "C++", ".css": "CSS", ".f": "Fortran", ".f90": "Fortran", ".h": "C++", ".hpp": "C++",
    ".js": "JavaScript", ".pxd": "Cython", ".pxi": "Cython", ".pyx": "Cython", ".sh": "shell",
}  # fmt: skip
"""Endings of files -> programming language."""
OTHER_FILES = {
    **{ending: f"code in {language}" for ending, language in CODE.items()},
    **dict.fromkeys((".ini", ".mplstyle", ".toml", ".build", ".tab"), "settings"),
    **dict.fromkeys((".csv", ".arff"), "rows of numbers"),
    ".md": "manuals",
}
"""Endings of files -> kind of text."""
_DEFINITION = re.compile(r"\n(?=[ ]*(?:@|def |class |async def ))")
_STEP = re.compile(r"\n\s*\n")


def texts_of_package(package: Distribution) -> Iterator[Document]:
    """Documents of the modules, the other files and the description of a package."""
    yield from _parts("description", _description(package), "manuals")
    for name, path in files_of(package, r"\.\w+$"):
        if ".." in name or ".dist-info" in name:
            continue
        if path.suffix == ".py":
            if (
                not {*name.split("/")} & SKIPPED_FOLDERS
                and hash_fraction(name, seed=0, purpose="modules") < READ_SHARE
            ):
                yield from _texts_of_module(name, read_text(path))
        elif path.suffix in OTHER_FILES and path.stat().st_size < 1_000_000:
            yield from _parts(name, read_text(path), OTHER_FILES[path.suffix])


def reference_manual(standard_library: Path) -> Iterator[Document]:
    """The language reference that Python's help shows, from the source of pydoc_data.topics."""
    path = standard_library / "pydoc_data" / "topics.py"
    if path.is_file():
        topics = ast.literal_eval(read_text(path).partition("topics = ")[2].strip())
        for topic, text in topics.items():
            yield from _parts(topic, text, "manuals")


def _description(package: Distribution) -> str:
    """The long description of a package without badges, links and HTML."""
    text = package.metadata.get_payload() or ""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def _parts(name: str, text: str, kind: str) -> Iterator[Document]:
    """Consecutive paragraphs of a file put together."""
    blocks = [block.strip("\n") for block in _STEP.split(text)]
    if kind == "rows of numbers":
        lines = [line for line in text.splitlines() if line.count(",") >= 2 and len(line) < 200]
        blocks = ["\n".join(lines[start : start + 12]) for start in range(0, min(len(lines), 60), 12)]
    elif kind == "manuals":
        blocks = [block for block in blocks if is_clean(block) and not re.match(r"```|[$#.]|\s{4}", block)]
    else:
        blocks = [block for block in blocks if not is_notice(block) and "__pyx" not in block]
    for number, part in enumerate(map(textwrap.dedent, joined(blocks))):
        if len(part.encode()) >= LEAST_BYTES:
            yield Document(f"{name}/{number}", part, kind)


def _texts_of_module(name: str, source: str) -> Iterator[Document]:
    """Definitions with comments, and what stands in docstrings beside prose."""
    definitions = [
        textwrap.dedent(block).strip()
        for block in _DEFINITION.split(source)[1:]
        if '"""' not in block and "'''" not in block and not is_notice(block)
    ]
    commented = (block for block in definitions if re.search(r"^\s*# \w", block, re.MULTILINE))
    for number, block in enumerate(joined(commented)):
        yield Document(f"{name}/code/{number}", block, "code in Python")
    # A definition may occur several times, as under conditions.
    for definition, docstring in dict(docstrings_of(source)).items():
        kinds: dict[str, list[str]] = {}
        for block in _STEP.split(docstring):
            if (kind := _kind_of_block(block)) and is_clean(block):
                kinds.setdefault(kind, []).append(textwrap.dedent(block.strip("\n")))
        for kind, blocks in kinds.items():
            for number, text in enumerate(joined(blocks)):
                yield Document(f"{name}/{definition}/{kind}/{number}", text, kind)


def _kind_of_block(block: str) -> str:
    """The kind of a paragraph of a docstring that is no prose; empty for all others."""
    lines = [line.strip() for line in block.splitlines() if line.strip()]
    if any(line.startswith(">>>") for line in lines):
        return "interactive sessions"
    if any(re.fullmatch(r"[=+-]{2,}(?:[ +]+[=+-]{2,})+\+?", line) for line in lines):
        return "tables"
    if sum(re.match(r"(?:[-*+]|\d+[.)]) \w", line) is not None for line in lines) >= max(2, 0.3 * len(lines)):
        return "lists"
    if sum(re.match(r"[`*]{0,2}\w+[`*]{0,2}(?: \([^)]*\))? ?: ?\S", line) is not None for line in lines) >= 2:
        return "parameter lists"
    return ""
