"""Kinds of texts, requests and languages."""

import pytest

from nla_jax.data.writers.statements.facts import Facts
from nla_jax.data.writers.statements.kind import code_language, form_of, kind, language, request_of
from nla_jax.data.writers.statements.languages import language_of

GERMAN = "Der alte Mann ging mit seinem Hund durch den Wald und sah die Vögel."


def facts(context, place="sentence_end", **fields) -> Facts:
    return Facts("key", 0, context, place, **fields)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import numpy as np\n\ndef mean(x):\n    return x.sum()", "Python code"),
        ("const x = 1;\nlet y = () => {\n", "JavaScript"),
        ("#include <stdio.h>\nint main() {\n", "C code"),
        ("SELECT name\nFROM people\nWHERE age > 3", "SQL"),
        ("<div>\n<p>Hello</p>\n", "HTML"),
        ('{\n  "name": "x",\n  "age": 3\n}', "JSON"),
        ("$ cd here\n$ pip install it", "shell commands"),
        ("It was cold. They had to return home:\nnothing was left.", None),
    ],
)
def test_code(text, name):
    assert code_language(text) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Dear Ms Miller,\n\nthank you", "letter"),
        ('"Wait", he said. "I come too."', "dialogue"),
        ("1. Boil water\n2. Add salt\n", "numbered list"),
        ("- bread\n- milk\n", "bullet list"),
        ("a | b | c\n1 | 2 | 3\n", "table"),
        ("Plain prose of 1. May.", None),
    ],
)
def test_forms(text, name):
    assert form_of(text) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Translate this into French.", "translation request"),
        ("Write an e-mail to my aunt.", "letter to write"),
        ("Write a poem about rain.", "poem to write"),
        ("Why is the sky blue?", "why question"),
        ("Is it true that bees sleep?", "true-or-false question"),
        ("Was ist das?", "question"),
        ("Bees sleep.", None),
    ],
)
def test_requests(text, name):
    assert request_of(text) == name


def test_the_origin_is_told_where_the_form_is_plain_prose():
    docs = "Returns the array of the given arguments, or raises."
    assert kind(facts(docs, genre="scipy")).endswith("Scipy documentation.")
    assert kind(facts("It rained.", genre="news_report")).endswith("News report.")
    assert kind(facts("It rained.", genre="/data/x.jsonl")) is None and kind(facts("It rained.")) is None
    # Inside a sentence plain prose goes without saying, and code does not.
    assert kind(facts("It rained", "inside", genre="news report")) is None
    assert kind(facts("import x\ndef f(x):\n    return x", "inside")).endswith("Python code.")


def test_the_genre_tells_what_is_wanted_where_words_do_not():
    def wanted(text, genre):
        return kind(facts(text, "turn_end", role="user", genre=genre))

    assert wanted("Mein Koffer fehlt. Was nun?", "request in German (advice)").endswith("dvice request.")
    assert wanted("Write a poem about rain.", "request (letter)").endswith("oem to write.")
    assert wanted("Mein Koffer fehlt.", "chat") is None
    said = "Write a poem about rain."
    assert kind(facts(said, "turn_end", role="assistant")) is None
    assert kind(facts(said, "answer_start", role="assistant")).endswith("oem to write.")


def test_languages_are_told_by_function_words():
    assert language_of("The dog was in the garden with us.") == "en" and language_of(GERMAN) == "de"
    assert language_of("我的行李没有到。我该怎么办？请简短一些。") == "zh"
    assert (
        language_of("我的行李") == "zh"
        and language_of("Was hältst du von dem Museum, das so groß ist?") == "de"
    )
    assert language_of("x = foo(bar); qux[i] += zap << 3") == "" and language_of("") == ""


def test_only_what_is_not_plain_english_is_said():
    assert "German" in language(facts(GERMAN)) and language(facts("The dog was in the garden.")) is None
    assert language(facts("Hey guys, we're gonna be at the party and I'm so happy, yeah")) is not None
