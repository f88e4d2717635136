"""The built-in corpus: the prose in the docstrings of installed packages and of the standard library."""

import ast
import functools
import importlib.metadata
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nla_jax.data.corpora.documents import Document
from nla_jax.data.corpora.duplicates import without_repeated_runs

DOCSTRING_DISTRIBUTIONS = (
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "chex",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "matplotlib",
    "pyarrow",
    "jinja2",
    "tyro",
)
"""The docstring corpus reads these distributions, everything they require, and the standard library.

The list is fixed, so that other installed packages (torch, say) do not change the corpus."""
MIN_PLAIN_WORDS = 0.85
"""Least share of plain words in a paragraph of prose; signatures, tables and examples have fewer."""
MIN_PARAGRAPH_WORDS = 8
"""Shorter paragraphs are headings and labels."""
MIN_WORDS = 60
"""Docstrings with fewer words of prose are dropped: activations are sampled from token 50 on."""
MAX_PER_PACKAGE = 1500
"""Most docstrings of one top-level package, so that no package dominates."""

SKIPPED_FOLDERS = {"test", "tests", "testing", "_tests", "site-packages", "dist-packages", "idlelib"}
_PLAIN_WORD = re.compile(r"[(\"']*[A-Za-z][A-Za-z'-]*[.,;:!?)\"']*")
# The start of a definition, or a whole triple-quoted string.
_DEFINITION_OR_STRING = re.compile(
    r'\n(?P<indent>[ \t]*)(?:async +)?(?:def|class) +(?P<name>\w+)|"""(?P<body>.*?)(?<!\\)"""', re.DOTALL
)


def docstring_documents() -> Iterator[Document]:
    """The prose in the docstrings of `DOCSTRING_DISTRIBUTIONS`, their requirements and the standard library.

    Paragraphs that are parameter lists, signatures, tables or examples are left out: no explanation can be expected to
    spell their words. Nothing is imported. A document's id is its module and qualified name, its genre the top-level
    package. The rules are the constants at the top of this module. Near repetitions are left out, see
    `without_repeated_runs`.
    """
    by_id: dict[str, Document] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        for root, path in _source_files():
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            try:
                source = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            for name, text in docstrings_of(source):
                prose = _prose(text)
                if len(prose.split()) >= MIN_WORDS:
                    doc_id = f"{module}.{name}" if name else module
                    by_id.setdefault(doc_id, Document(doc_id, prose, module.partition(".")[0]))
    yield from without_repeated_runs(
        by_id.values(), purpose="docstrings", limits=lambda document: {document.genre: MAX_PER_PACKAGE}
    )


@functools.cache
def docstring_versions() -> dict[str, str]:
    """The versions of Python and of the distributions that are read: with others the documents are others."""
    distributions = {d.metadata["Name"]: d.version for d in required_distributions()}
    return {"Python": platform.python_version(), **distributions}


def _source_files() -> Iterator[tuple[Path, Path]]:
    """(Import root, source file) of every module that the docstring corpus reads, test folders left out."""
    for distribution in required_distributions():
        root = Path(str(distribution.locate_file("")))
        for file in distribution.files or ():
            if file.suffix == ".py" and not SKIPPED_FOLDERS & {"..", *file.parts}:
                yield root, root / file
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(path.relative_to(stdlib).parts):
            yield stdlib, path


def required_distributions() -> list[importlib.metadata.Distribution]:
    """Installed distributions among `DOCSTRING_DISTRIBUTIONS` and their requirements without extras, by name."""
    distributions: dict[str, importlib.metadata.Distribution | None] = {}
    pending = list(DOCSTRING_DISTRIBUTIONS)
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in distributions:
            continue
        try:
            distributions[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            distributions[name] = None
            continue
        requirements = distributions[name].requires or ()
        pending += [re.match(r"[\w.-]+", r)[0] for r in requirements if not re.search(r"\bextra\s*==", r)]
    return [distributions[name] for name in sorted(distributions) if distributions[name] is not None]


def docstrings_of(source: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, cleaned docstring) of a module and its definitions, short docstrings left out.

    Only the head of a definition, up to its first triple-quoted string, is parsed: that is several times
    faster than parsing whole files, and finds the same docstrings but for a few in a thousand.
    """
    source = "\n" + source
    enclosing: list[tuple[int, str]] = []
    head: int | None = 0
    for match in _DEFINITION_OR_STRING.finditer(source):
        if (name := match["name"]) is not None:
            indent = len(match["indent"])
            while enclosing and enclosing[-1][0] >= indent:
                enclosing.pop()
            enclosing.append((indent, name))
            head = match.start() + 1
        elif head is not None:
            # Prose has five characters a word or more; shorter strings need not be parsed.
            if len(match["body"]) > 4 * MIN_WORDS:
                text = _docstring_of_head(source[head : match.end()], is_module=not enclosing)
                if text is not None and len(text.split()) >= MIN_WORDS:
                    yield ".".join(name for _, name in enclosing), text
            head = None


def _docstring_of_head(head: str, *, is_module: bool) -> str | None:
    is_indented = head[:1] in " \t"
    try:
        node: Any = ast.parse("if True:\n" + head if is_indented else head)
    except (SyntaxError, ValueError):
        return None
    if not is_module:
        node = node.body[0].body[0] if is_indented else node.body[0]
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return None
    return ast.get_docstring(node)  # cleaned by inspect.cleandoc


def _prose(text: str) -> str:
    """The paragraphs of a docstring that are prose, each on one line, with blank lines between them."""
    paragraphs = [paragraph.split() for paragraph in re.split(r"\n\s*\n", text)]
    return "\n\n".join(
        " ".join(words)
        for words in paragraphs
        if len(words) >= MIN_PARAGRAPH_WORDS
        and sum(_PLAIN_WORD.fullmatch(word) is not None for word in words) >= MIN_PLAIN_WORDS * len(words)
    )
