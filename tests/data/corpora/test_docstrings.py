import ast
import inspect
import operator
import subprocess
import tarfile
import threading
from collections import Counter

import pytest

from nla_jax.data.corpora import docstrings as module
from nla_jax.data.corpora.corpus import load_corpus
from nla_jax.data.corpora.documents import Document

PROSE = "the quick brown fox jumps over the lazy dog and then walks home again " * 5


def by_id(documents):
    return {document.id: document for document in documents}


SOURCE = f'''"""Module: {PROSE}"""
import os

SQL = """{PROSE} def not_a_definition(): {PROSE}"""

class Outer(
    object,
):
    r"""Class: {PROSE} \\d"""

    def method(self, x: str = "a:b") -> None:
        # A comment with a "quote".
        """Method: {PROSE}

            indented: def inside(): pass
        """

    async def coroutine(self): """Coroutine: {PROSE}"""

    def none(self):
        x = 1
        """Not a docstring: {PROSE}"""

    def short(self):
        """Too short."""

def formatted():
    f"""Not a docstring: {PROSE}"""

def mapping():
    return {{
        "key":
        """Not a docstring: {PROSE}"""
    }}
'''


def test_docstrings_are_those_of_a_full_parse():
    expected = {}
    for name, node in (
        ("", ast.parse(SOURCE)),
        *((n.name, n) for n in ast.walk(ast.parse(SOURCE)) if hasattr(n, "name")),
    ):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text.split()) >= module.MIN_WORDS:
                expected[name] = text
    assert set(expected) == {"", "Outer", "method", "coroutine"}
    found = dict(module.docstrings_of(SOURCE))
    assert list(found) == ["", "Outer", "Outer.method", "Outer.coroutine"]
    assert {name.rpartition(".")[2]: text for name, text in found.items()} == expected


def test_prose_paragraphs_are_told_from_code():
    first = 'A plain paragraph\nof two lines, (with) "signs".'
    second = "Another one that doesn't hold any code at all."
    code = "x[0] += {'a': 1, 'b': (2, 3)}; y = f(x, *args) and then some more"
    parameters = "dtype : data-type, optional\n    By default, it is ``float``."
    text = f"{first}\n\n{code}\n  \n{parameters}\n\nHeading\n\n{second}\n"
    assert module._prose(text) == f"{' '.join(first.split())}\n\n{second}"


def test_share_of_plain_words_decides():
    words = ["word"] * 17 + ["a=1"] * 3
    assert module._prose(" ".join(words)) == " ".join(words)  # exactly the least share: kept
    assert module._prose(" ".join([*words, "b=2"])) == ""
    assert module._prose(" ".join(["word"] * (module.MIN_PARAGRAPH_WORDS - 1))) == ""


@pytest.fixture(scope="module")
def docstrings():
    return load_corpus("docstrings")


def test_docstring_corpus_holds_the_promised_rules(docstrings):
    assert len(docstrings) >= 4500
    assert max(Counter(d.genre for d in docstrings).values()) <= module.MAX_PER_PACKAGE
    assert len({d.text for d in docstrings}) == len(docstrings)
    for document in docstrings:
        assert len(document.text.split()) >= module.MIN_WORDS
        assert document.text == document.text.strip()
        assert document.id.split(".")[0] == document.genre
        assert not {"test", "tests"} & set(document.id.split("."))


def test_docstring_corpus_names_what_it_quotes(docstrings):
    modules = {one.__name__: one for one in (subprocess, tarfile, threading)}
    quoted = [d for d in docstrings if d.genre in modules and "." in d.id]
    assert len(quoted) > 5
    for document in quoted:
        named = operator.attrgetter(document.id.partition(".")[2])(modules[document.genre])
        paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(named.__doc__).split("\n\n")]
        assert set(document.text.split("\n\n")) <= set(paragraphs)
    assert "torch" not in {d.genre for d in docstrings}


def test_docstring_corpus_imports_nothing_and_drops_near_duplicates(tmp_path, monkeypatch):
    words = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(200)]
    first, other = " ".join(words[:100]), " ".join(words[100:])
    renamed = first.replace("wordaa", "wordzz")
    source = "raise SystemExit\n"
    for name, text in (("f", first), ("g", renamed), ("h", other)):
        source += f'def {name}():\n    """{text}"""\n'
    (tmp_path / "pkg.py").write_text(source)
    (tmp_path / "latin.py").write_bytes(b'"""\xe9"""')
    files = [(tmp_path, tmp_path / "pkg.py"), (tmp_path, tmp_path / "latin.py")]
    monkeypatch.setattr(module, "_source_files", lambda: iter(files))
    found = by_id(load_corpus("docstrings"))
    assert "pkg.h" in found and len({"pkg.f", "pkg.g"} & set(found)) == 1
    assert found["pkg.h"] == Document("pkg.h", other, "pkg")
    monkeypatch.setattr(module, "MAX_PER_PACKAGE", 1)
    assert len(load_corpus("docstrings")) == 1
