import ast
import inspect
import json
import operator
import subprocess
import sys
import tarfile
import threading
import types
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_jax.data import corpus
from nla_jax.data.corpus import Document, load_corpus

PROSE = "the quick brown fox jumps over the lazy dog and then walks home again " * 5


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def by_id(documents):
    return {document.id: document for document in documents}


def test_text_files_are_named_by_their_path_and_their_folder_is_the_genre(tmp_path):
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "a.txt").write_text("first\n")
    (tmp_path / "news" / "b.txt").write_text("  \n")
    (tmp_path / "notes.md").write_text("not read")
    expected = [Document("news/a.txt", "first", "news")]
    assert load_corpus(str(tmp_path)) == expected
    assert load_corpus(str(tmp_path / "news" / "a.txt")) == [Document("a.txt", "first", "news")]


def test_rows_of_jsonl_and_parquet(tmp_path):
    rows = [{"text": "one\u2028line", "id": "x", "genre": "news"}, {"text": "two"}, {"text": " "}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    pq.write_table(pa.table({"text": ["three"], "id": [5], "other": [0]}), tmp_path / "more.parquet")
    documents = by_id(load_corpus(str(tmp_path)))
    assert documents.pop("x") == Document("x", "one\u2028line", "news")
    assert documents.pop("5") == Document("5", "three", "more")
    ((_, unnamed),) = documents.items()
    assert (unnamed.text, unnamed.genre) == ("two", "rows")


def test_a_cut_keeps_the_same_documents_whatever_the_order_and_file_names(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(40)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    a, b = (load_corpus(str(tmp_path / name), max_documents=10, seed=2) for name in ("a.jsonl", "b.jsonl"))
    assert [d.text for d in a] == [d.text for d in b]
    whole = load_corpus(str(tmp_path / "a.jsonl"), seed=2)
    assert (len(whole), whole[:10]) == (40, a)
    assert {d.text for d in load_corpus(str(tmp_path / "a.jsonl"), max_documents=10, seed=3)} != {
        d.text for d in a
    }


def test_a_repeated_row_is_kept_once(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "same"}, {"text": "same"}, {"text": "same", "id": "named"}])
    assert sorted(d.text for d in load_corpus(str(tmp_path / "a.jsonl"))) == ["same", "same"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no documents with text"),
        ([{"text": ""}], "no documents with text"),
        ([{"text": "a"}, {"body": "b"}], r"row 2: no field 'text' holding a string; found \['body'\]"),
        ([{"text": 3}], "row 1: no field 'text'"),
        (["bare"], "row 1: no field 'text' holding a string; found str"),
        (
            [{"text": "a", "id": 1}, {"text": "b", "id": 1}],
            "two different texts have the id '1'; make the ids",
        ),
    ],
)
def test_bad_rows(tmp_path, rows, message):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_corpus(str(tmp_path / "rows.jsonl"))


def test_bad_files(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing more")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "no_text.parquet")
    (tmp_path / "page.html").write_text("<p>")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "bad.jsonl": r"bad.jsonl, line 2: not a JSON object",
        "bad.txt": r"bad.txt: not UTF-8 text .* convert it to UTF-8",
        "bad.parquet": r"bad.parquet: not a readable parquet file .* copy or write it again",
        "no_text.parquet": "row 1: no field 'text'",
        "page.html": r"unknown corpus format '.html'; expected .txt, .jsonl, .parquet",
        "empty": "no documents with text",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_corpus(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"'nowhere' does not exist; give 'docstrings', 'hf:NAME"):
        load_corpus("nowhere")
    with pytest.raises(ValueError, match="max_documents=0; expected a positive number"):
        load_corpus("docstrings", max_documents=0)


def test_hugging_face_source(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [{"text": "hello", "id": 1}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_corpus("hf:some/set") == [Document("1", "hello", "some/set")]
    load_corpus("hf:some/set:validation")
    assert asked == [("some/set", "train"), ("some/set", "validation")]


def test_hugging_face_source_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"'hf:x' needs the optional package `datasets`; run `pip"):
        load_corpus("hf:x")


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
            if text and len(text.split()) >= corpus.MIN_WORDS:
                expected[name] = text
    assert set(expected) == {"", "Outer", "method", "coroutine"}
    found = dict(corpus._docstrings(SOURCE))
    assert list(found) == ["", "Outer", "Outer.method", "Outer.coroutine"]
    assert {name.rpartition(".")[2]: text for name, text in found.items()} == expected


def test_prose_paragraphs_are_told_from_code():
    first = 'A plain paragraph\nof two lines, (with) "signs".'
    second = "Another one that doesn't hold any code at all."
    code = "x[0] += {'a': 1, 'b': (2, 3)}; y = f(x, *args) and then some more"
    parameters = "dtype : data-type, optional\n    By default, it is ``float``."
    text = f"{first}\n\n{code}\n  \n{parameters}\n\nHeading\n\n{second}\n"
    assert corpus._prose(text) == f"{' '.join(first.split())}\n\n{second}"


def test_share_of_plain_words_decides():
    words = ["word"] * 17 + ["a=1"] * 3
    assert corpus._prose(" ".join(words)) == " ".join(words)  # exactly the least share: kept
    assert corpus._prose(" ".join([*words, "b=2"])) == ""
    assert corpus._prose(" ".join(["word"] * (corpus.MIN_PARAGRAPH_WORDS - 1))) == ""


@pytest.fixture(scope="module")
def docstrings():
    return load_corpus("docstrings")


def test_docstring_corpus_holds_the_promised_rules(docstrings):
    assert len(docstrings) >= 4500
    assert max(Counter(d.genre for d in docstrings).values()) <= corpus.MAX_PER_PACKAGE
    assert len({d.text for d in docstrings}) == len(docstrings)
    for document in docstrings:
        assert len(document.text.split()) >= corpus.MIN_WORDS
        assert document.text == document.text.strip()
        assert document.id.split(".")[0] == document.genre
        assert not {"test", "tests"} & set(document.id.split("."))


def test_docstring_corpus_names_what_it_quotes(docstrings):
    modules = {module.__name__: module for module in (subprocess, tarfile, threading)}
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
    monkeypatch.setattr(corpus, "_source_files", lambda: iter(files))
    found = by_id(load_corpus("docstrings"))
    assert "pkg.h" in found and len({"pkg.f", "pkg.g"} & set(found)) == 1
    assert found["pkg.h"] == Document("pkg.h", other, "pkg")
    monkeypatch.setattr(corpus, "MAX_PER_PACKAGE", 1)
    assert len(load_corpus("docstrings")) == 1
