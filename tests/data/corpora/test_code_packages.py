import pytest
from distributions import installed

from nla_jax.data.corpora import code_packages as module

WORDS = "these are plain words that fill a docstring until it is long enough to be read by anybody " * 4
MODULE = f'''# Copyright 2020 Somebody
import os


def documented():
    """{WORDS}

    Args:
      first: The first of two arguments, which is described at great length, so that the list is long enough.
      second: The second of two arguments, which is described at great length as well, and with other words.
      third: The third of two arguments, which nobody would expect, and which is therefore described twice.

    - One thing that is to be said in a list, which has several entries.
    - Another thing that is to be said in a list, which has several entries.
    - A third thing that is to be said in a list, which has several entries.
    - A fourth thing that is to be said in a list, which has several entries.

    >>> documented()
    {"1234567890 " * 26}
    """


class Commented:
    def method(self):
        # The comment tells why this is done, and takes some space to do so.
        return [{", ".join(map(str, range(70)))}]

    def bare(self):
        return [{", ".join(map(str, range(70, 140)))}]
'''


def test_modules_give_commented_code_and_the_parts_of_docstrings(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "READ_SHARE", 1.0)
    files = {"p/a.py": MODULE, "p/tests/b.py": MODULE, "p/empty.py": ""}
    found = {d.genre: d for d in module.texts_of_package(installed(tmp_path, "p", files))}
    assert {*found} == {"code in Python", "parameter lists", "lists", "interactive sessions"}
    assert found["code in Python"].text.startswith("def method(self):\n    # The comment")
    assert "bare" not in found["code in Python"].text
    lists = found["lists"]
    assert lists.id == "p/a.py/documented/lists/0" and lists.text.count("\n- ") == 3
    assert found["parameter lists"].text.splitlines()[1].startswith("  first: The first")
    assert found["interactive sessions"].text.startswith(">>> documented()\n1234567890 ")
    monkeypatch.setattr(module, "READ_SHARE", 0.0)
    assert list(module.texts_of_package(installed(tmp_path / "none", "p", files))) == []


def test_other_files_give_texts_without_notices(tmp_path):
    paragraph = "int add(int a, int b) { return a + b; } // adds two numbers\n" * 5
    files = {
        "p/include/a.h": f"// Licensed under something\n\n{paragraph}\n\n{paragraph}",
        "p/data/b.csv": "a,b,c\n" + "\n".join(f"{i},{i * i},{i**3},some words of a row" for i in range(40)),
        "p/c.mplstyle": "lines.linewidth : 2  # in points, as everything else in this file\n" * 5,
        "p/d.so": "not a text",
        "p-1.dist-info/e.md": "Not read, since it is about the package and not by it. " * 9,
    }
    found = {}
    for document in module.texts_of_package(installed(tmp_path, "p", files)):
        found.setdefault(document.genre, []).append(document.text)
    assert {kind: len(texts) for kind, texts in found.items()} == {
        "code in C++": 2,
        "rows of numbers": 3,
        "settings": 1,
    }
    assert found["code in C++"] == [paragraph.strip()] * 2
    assert found["rows of numbers"][0].splitlines()[0] == "a,b,c"


def test_descriptions_lose_badges_and_links(tmp_path):
    sentence = (
        "This package reads files, and a [guide](https://example.org) tells how that is done in detail. "
    )
    description = f"![badge](https://example.org/b.svg)\n\n{sentence * 4}\n\n```python\nimport p\n```\n"
    (document,) = module.texts_of_package(installed(tmp_path, "p", {}, description))
    assert (document.id, document.genre) == ("description/0", "manuals")
    assert document.text == " ".join(sentence.replace("[guide](https://example.org)", "guide").split() * 4)


def test_topics_of_the_language_reference(tmp_path):
    (tmp_path / "pydoc_data").mkdir()
    text = "The assert statement checks a condition, and raises an error where it does not hold. " * 4
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"# Made by Sphinx\ntopics = {{'assert': {text!r}}}\n")
    (document,) = module.reference_manual(tmp_path)
    assert (document.id, document.text, document.genre) == ("assert/0", text.strip(), "manuals")
    assert list(module.reference_manual(tmp_path / "nowhere")) == []


@pytest.mark.parametrize(
    "block, kind",
    [
        (">>> 1 + 1\n2", "interactive sessions"),
        ("====  ====\nkey   value\n====  ====", "tables"),
        ("- one thing\n- another thing", "lists"),
        ("1. first\n2. second\n   and more", "lists"),
        ("x : int\n    The number.\ny : float\n    Another one.", "parameter lists"),
        ("name (str): the name\n`size`: how large", "parameter lists"),
        ("A paragraph of prose - with a dash.\nIt goes on here.", ""),
        ("- only one point, and then\nlines that\nbelong to no\nlist at all", ""),
    ],
)
def test_kinds_of_paragraphs(block, kind):
    assert module._kind_of_block(block) == kind
