"""Documents from local files, Hugging Face data sets, or the docstrings of the installed packages."""

import ast
import dataclasses
import hashlib
import importlib.metadata
import json
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nla_jax.data.splits import hash_fraction

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
MAX_REPEATED = 0.5
"""Largest share of a docstring's 8-word runs that may occur in the docstrings kept before it."""
MAX_PER_PACKAGE = 1500
"""Most docstrings of one top-level package, so that no package dominates."""

_SKIPPED_FOLDERS = {"test", "tests", "testing", "_tests", "site-packages", "dist-packages", "idlelib"}
_PLAIN_WORD = re.compile(r"[(\"']*[A-Za-z][A-Za-z'-]*[.,;:!?)\"']*")
# The start of a definition, or a whole triple-quoted string.
_DEFINITION_OR_STRING = re.compile(
    r'\n(?P<indent>[ \t]*)(?:async +)?(?:def|class) +(?P<name>\w+)|"""(?P<body>.*?)(?<!\\)"""', re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Document:
    """One text to take contexts from."""

    id: str
    """A name that is unique in the corpus; splits and sampled positions are keyed by it."""
    text: str
    genre: str
    """Kind or origin of the text, as the built-in writer of warm-start texts names it."""


def load_corpus(source: str, *, max_documents: int | None = None, seed: int = 0) -> list[Document]:
    """Load the documents of a source, in an order keyed by (seed, document id).

    The order does not depend on the order of files or rows, and a smaller `max_documents` gives a prefix of a
    larger one. Rows with blank text are skipped; a repeated row is kept once.

    Args:
      source: `docstrings` (built in, offline); a `.txt` (one document), `.jsonl` or `.parquet` file (fields
        `text`, optional `id` and `genre`) or a folder of such files; or `hf:NAME[:split]` (split `train` by
        default). Text files are named by their path in the folder, rows without `id` by a hash of their text.
      max_documents: keep at most this many documents.
      seed: seed of the order, and so of the choice.

    Raises:
      FileNotFoundError: the source is neither a known name nor an existing path.
      ValueError: unreadable or empty source, a row without text, or two different texts under one id.
      ModuleNotFoundError: `hf:` without the `datasets` package.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents={max_documents}; expected a positive number, or None for all")
    if source == "docstrings":
        documents = _docstring_documents()
    elif source.startswith("hf:"):
        documents = _hugging_face_documents(source)
    else:
        documents = _local_documents(source)
    unique: dict[str, Document] = {}
    for document in documents:
        kept = unique.setdefault(document.id, document)
        if kept.text != document.text:
            raise ValueError(
                f"{source}: two different texts have the id {document.id!r}; make the ids unique"
            )
    if not unique:
        raise ValueError(f"{source}: no documents with text; expected at least one")
    ordered = sorted(unique.values(), key=lambda d: (hash_fraction(d.id, seed=seed, purpose="corpus"), d.id))
    return ordered[:max_documents]


def _local_documents(source: str) -> Iterator[Document]:
    root = Path(source)
    if not root.exists():
        raise FileNotFoundError(
            f"corpus {source!r} does not exist; give 'docstrings', 'hf:NAME[:split]', or a .txt, .jsonl or "
            "parquet file or a folder of them"
        )
    if root.is_file() and root.suffix not in _READERS:
        raise ValueError(f"{root}: unknown corpus format {root.suffix!r}; expected {', '.join(_READERS)}")
    files = sorted(p for p in root.rglob("*") if p.suffix in _READERS) if root.is_dir() else [root]
    for path in files:
        yield from _READERS[path.suffix](path, root if root.is_dir() else root.parent)


def _text_file(path: Path, root: Path) -> Iterator[Document]:
    if text := _read_text(path).strip():
        yield Document(path.relative_to(root).as_posix(), text, path.parent.name or path.stem)


def _jsonl_file(path: Path, root: Path) -> Iterator[Document]:
    def rows() -> Iterator[Any]:
        # Not splitlines(): JSON strings may hold other line separators, such as U+2028, unescaped.
        for number, line in enumerate(_read_text(path).split("\n"), start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not a JSON object: {error}") from error

    return _row_documents(rows(), origin=str(path), genre=path.stem)


def _parquet_file(path: Path, root: Path) -> Iterator[Document]:
    try:
        file = pq.ParquetFile(path)
        rows = file.read([n for n in ("text", "id", "genre") if n in file.schema_arrow.names]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); copy or write it again") from error
    return _row_documents(rows, origin=str(path), genre=path.stem)


_READERS = {".txt": _text_file, ".jsonl": _jsonl_file, ".parquet": _parquet_file}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from error


def _hugging_face_documents(source: str) -> Iterator[Document]:
    _, name, split = (*source.split(":"), "train")[:3]
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"corpus {source!r} needs the optional package `datasets`; run `pip install datasets`, "
            "or give a local file or 'docstrings'"
        ) from error
    return _row_documents(datasets.load_dataset(name, split=split), origin=source, genre=name)


def _row_documents(rows: Iterable[Mapping[str, Any]], *, origin: str, genre: str) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        text = row.get("text") if isinstance(row, Mapping) else None
        if not isinstance(text, str):
            found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"{origin}, row {number}: no field 'text' holding a string; found {found}")
        if text := text.strip():
            doc_id = row.get("id")
            if doc_id is None:
                doc_id = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
            yield Document(str(doc_id), text, row.get("genre") or genre)


def _docstring_documents() -> Iterator[Document]:
    """The prose in the docstrings of `DOCSTRING_DISTRIBUTIONS`, their requirements and the standard library.

    Paragraphs that are parameter lists, signatures, tables or examples are left out: no explanation can be expected to
    spell their words. Nothing is imported. A document's id is its module and qualified name, its genre the top-level
    package. The rules are the constants at the top of this module. Near-duplicates are left out, because a held-out
    document must not be a training document with one name changed.
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
            for name, text in _docstrings(source):
                prose = _prose(text)
                if len(prose.split()) >= MIN_WORDS:
                    doc_id = f"{module}.{name}" if name else module
                    by_id.setdefault(doc_id, Document(doc_id, prose, module.partition(".")[0]))
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    for document in sorted(by_id.values(), key=lambda d: hash_fraction(d.id, seed=0, purpose="docstrings")):
        words = document.text.lower().split()
        runs = {hash(tuple(words[i : i + 8])) for i in range(len(words) - 7)}
        if counts[document.genre] < MAX_PER_PACKAGE and len(runs & seen) <= MAX_REPEATED * len(runs):
            counts[document.genre] += 1
            seen |= runs
            yield document


def _source_files() -> Iterator[tuple[Path, Path]]:
    """(Import root, source file) of every module that the docstring corpus reads, test folders left out."""
    for distribution in _required_distributions():
        root = Path(str(distribution.locate_file("")))
        for file in distribution.files or ():
            if file.suffix == ".py" and not _SKIPPED_FOLDERS & {"..", *file.parts}:
                yield root, root / file
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if not _SKIPPED_FOLDERS & set(path.relative_to(stdlib).parts):
            yield stdlib, path


def _required_distributions() -> list[importlib.metadata.Distribution]:
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


def _docstrings(source: str) -> Iterator[tuple[str, str]]:
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
