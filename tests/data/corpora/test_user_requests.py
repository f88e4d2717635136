import re
from collections import Counter

import pytest

from nla_jax.data.corpora import user_requests as module
from nla_jax.data.corpora.chats import render_plain
from nla_jax.data.corpora.corpus import corpus_state, load_corpus
from nla_jax.data.corpora.documents import Document
from nla_jax.data.corpora.packages import texts_for_requests
from nla_jax.data.corpora.self_prompts import built_in_templates


@pytest.fixture(scope="module")
def requests():
    return load_corpus("requests")


def test_requests_are_thousands_of_single_user_turns(requests):
    assert len(requests) >= 5000 and len({request.text for request in requests}) == len(requests)
    for request in requests:
        *before, last = request.messages
        assert last["role"] == "user" and [message["role"] for message in before] in ([], ["system"])
        assert request.text == render_plain(request.messages)
        assert module.LEAST_BYTES <= len(last["content"].encode()) <= module.MOST_BYTES
    assert 0.15 < sum(len(request.messages) == 2 for request in requests) / len(requests) < 0.4


def test_requests_differ_in_task_and_language(requests):
    genres = Counter(request.genre for request in requests)
    assert max(genres.values()) <= module.MAX_PER_KIND
    kinds = {re.search(r"\((.*)\)", genre)[1] for genre in genres}
    assert {
        "trivia",
        "sensitive",
        "feelings",
        "role play",
        "numbers",
        "code",
        "about stories",
        "questions",
    } <= kinds
    for language in ("German", "French", "Spanish", "Italian", "Portuguese", "Chinese"):
        assert sum(count for genre, count in genres.items() if f"in {language} (" in genre) >= 100
    assert genres["request (about stories)"] <= module.MAX_ABOUT_KIND


def test_every_language_has_requests_about_texts():
    for name, templates in built_in_templates().items():
        assert {*templates["about_texts"]} == {"prose", "code", "data"}, name
        for requests in templates["about_texts"].values():
            assert all(request.count("{text}") == 1 for request in requests), name


def test_requests_about_texts_and_users_turns(monkeypatch):
    chat = (
        {"role": "user", "content": "Wie geht es dir heute?"},
        {"role": "assistant", "content": "Gut."},
        {"role": "user", "content": "Was kochst du am Sonntag?"},
    )
    given = [
        Document("p/1", render_plain(chat), "dialogue in German", chat),
        Document("p/2", "What is rain?\nWho was Ada Lovelace?", "questions in English"),
        Document("p/3", "x = 1\ny = 2", "code in Python"),
        Document("p/4", "Ein Satz. Noch ein Satz.", "messages in German"),
        Document("p/5", "user: go", "text adventure", chat),
    ]
    monkeypatch.setattr(module, "texts_for_requests", lambda: iter(given))
    found = {}
    for request in module._about_texts():
        found.setdefault(request.genre, []).append(request.text)
    assert found.pop("request in German (dialogue)") == [
        "Wie geht es dir heute?",
        "Was kochst du am Sonntag?",
    ]
    assert found.pop("request (questions)") == ["What is rain?", "Who was Ada Lovelace?"]
    (code,) = found.pop("request (about code in Python)")
    assert "x = 1\ny = 2" in code
    ((genre, (message,)),) = found.items()
    assert genre in ("request in German (about messages in German)", "request (about messages in German)")
    assert "Ein Satz. Noch ein Satz." in message


def test_parts_are_sentences_or_lines_up_to_a_length():
    sentence, long = "A sentence of forty letters, it is short.", "x" * (module.MOST_OF_TEXT + 1)
    prose = Document("a", " ".join([sentence] * 6 + [f"{long}.", sentence]), "stories")
    # Five of 42 bytes fit in, then one is left before the long one.
    assert module._parts(prose, "prose") == [" ".join([sentence] * 5), sentence, sentence]
    data = Document("b", "\n".join(["| a | b |"] * 30), "tables")
    (part,) = module._parts(data, "data")
    assert part == "\n".join(["| a | b |"] * 22)


def test_the_state_tells_the_templates_and_the_versions(monkeypatch):
    state = corpus_state("requests")
    assert "chatterbot-corpus" in state
    monkeypatch.setattr(module, "built_in_templates", lambda: {"english": {}})
    assert corpus_state("requests")["templates of requests"] != state["templates of requests"]


def test_no_request_is_about_a_text_of_the_corpus_of_packages(requests):
    aside = "\n".join(document.text for document in texts_for_requests())
    asked = [request for request in requests if request.genre == "request (questions)"]
    assert asked and all(request.messages[-1]["content"] in aside for request in asked)
