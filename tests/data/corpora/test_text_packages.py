import json
import struct

from distributions import installed

from nla_jax.data.corpora import text_packages as module

LONG = "Each of these sentences is so long that a few of them are enough for a document of the corpus."


def mo_file(translations):
    """A compiled gettext catalogue."""
    texts = [text.encode() for pair in translations.items() for text in pair]
    sources, targets = texts[::2], texts[1::2]
    count, start = len(sources), 28
    place = start + 16 * count
    tables = {True: b"", False: b""}
    body = b""
    for is_source, group in ((True, sources), (False, targets)):
        for text in group:
            tables[is_source] += struct.pack("<2I", len(text), place + len(body))
            body += text + b"\0"
    return (
        struct.pack("<7I", 0x950412DE, 0, count, start, start + 8 * count, 0, 0)
        + tables[True]
        + tables[False]
        + body
    )


def test_translations_are_sentences_without_the_messages_that_stayed_as_they_were():
    same = "This message was never translated, so it stays."
    catalogue = mo_file(
        {
            "": "Content-Type: text/plain; charset=UTF-8.",
            "a": "Der  ganze Satz ist lang genug,\num ein Satz zu sein.",
            "b": "Abbrechen",
            same: same,
            "c": "これは翻訳された文で、十分に長いものです。",
        }
    )
    assert list(module._translations(catalogue)) == [
        "Der ganze Satz ist lang genug, um ein Satz zu sein.",
        "これは翻訳された文で、十分に長いものです。",
    ]


def test_messages_of_programs_are_those_of_known_languages_without_placeholders(tmp_path):
    sentences = [f"Satz Nummer {number}: {LONG}" for number in range(6)]
    catalogue = {f"id{number}": text for number, text in enumerate(sentences)}
    catalogue["placeholder"] = f"${{count}} {LONG}"
    files = {f"p/locales/{code}/LC_MESSAGES/plone.mo": mo_file(catalogue) for code in ("de", "xx")}
    found = list(module.messages_of_programs(installed(tmp_path, "p", files)))
    assert {document.genre for document in found} == {"messages in German"}
    assert [document.id for document in found] == ["de/0", "de/1"]
    parts = [document.text.split("\n\n") for document in found]
    assert list(map(len, parts)) == [3, 3] and {*parts[0], *parts[1]} == {*sentences}


def test_conversations_keep_their_turns_and_other_topics_a_question_and_an_answer():
    turns = ["Hi.", "Hello.", "How are you?", "Fine.", "Good."]
    assert module._exchanges([turns, turns, ["Alone."]], "conversations") == [tuple(turns[:4])]
    assert module._exchanges([["Why?", "Because.", "Another answer."], ["Why?", "No."]], "ai") == [
        ("Why?", "Because.")
    ]
    assert module._exchanges([["Who is {name}?", "Me."], ["Is it 3?", 3]], "ai") == []


def test_dialogues_become_chats_of_several_exchanges(tmp_path):
    yml = "conversations:\n" + "".join(f"- - Question {i}?\n  - Answer {i}. {LONG}\n" for i in range(4))
    package = installed(tmp_path, "p", {"p/data/german/food.yml": yml})
    (document,) = module.dialogues(package)
    assert (document.id, document.genre) == ("german/food/0", "dialogue in German")
    assert [m["role"] for m in document.messages] == ["user", "assistant"] * 3
    for question, answer in zip(document.messages[::2], document.messages[1::2], strict=True):
        assert answer["content"].startswith(question["content"].replace("Question", "Answer")[:-1])


def test_fortunes_that_are_short_are_put_together(tmp_path):
    long, rude = "A long story. " * 30, "What a shit. " * 30
    entries = [long, rude, *(f"Saying {i}. {LONG}\n\t\t-- Somebody" for i in range(5))]
    package = installed(tmp_path, "p", {"p/fortunes": "\n%\n".join(entries), "p/fortunes-o": long})
    humour, quotations = module.humour_and_quotations(package)
    assert (humour.text, humour.genre, quotations.genre) == (long.strip(), "humour", "quotations")
    assert quotations.text.count("        -- Somebody") == 3


def test_sentences_end_with_a_sign():
    assert module._with_ending("¿Quién es.") == "¿Quién es?"
    assert module._with_ending("¡Qué bien.") == "¡Qué bien!"
    assert module._with_ending("Io non lo so") == "Io non lo so."
    assert module._with_ending('He said "no."') == 'He said "no."'


def test_invented_data_are_sentences_lists_and_tables(tmp_path):
    names = [f"Name {i:02} with some more words" for i in range(24)]
    files = {
        "text": {"text": [f"Satz {i}. {LONG}" for i in range(6)], "quotes": [], "questions": []},
        "person": {"surnames": names, "occupation": [f"Job {i:02} with some more words" for i in range(24)]},
        "address": {"city": [f"Stadt, {i}" for i in range(24)]},
    }
    paths = {f"p/datasets/de/{name}.json": json.dumps(value) for name, value in files.items()}
    found = {}
    for document in module.invented_data(installed(tmp_path, "p", paths)):
        found.setdefault(document.genre, []).append(document)
    counts = {kind: len(documents) for kind, documents in found.items()}
    # Ten jobs of 27 bytes and the lines between them are long enough; all towns are too short. Twenty tables.
    assert counts == {
        "sentences in German": 2,
        "lists in German": 2,
        "tables in German": 7,
        "JSON in German": 7,
        "CSV in German": 6,
    }
    rows = [json.loads(line) for line in found["JSON in German"][0].text.splitlines()]
    assert len(rows) == 10 and rows[0]["name"] in names and 1980 <= rows[0]["since"] < 2025
    assert found["CSV in German"][0].text.splitlines()[0] == "name,work,town,since"
    assert all(line.count('"') == 2 for line in found["CSV in German"][0].text.splitlines()[1:])


def test_passages_of_a_book_are_whole_sentences_of_one_chapter(tmp_path):
    verses = ["In the beginning,", "it was so.", "God`s light shone. " * 40, "The end."]
    text, starts = "", []
    for verse in verses:
        starts.append(len(text))
        text += verse + " "
    numbers = (1001001, 1001002, 1001003, 23001001)
    offsets = ", ".join(f"{number}: {start}" for number, start in zip(numbers, starts, strict=True))
    source = f'bible = Bible(1, """{text}""", {{{offsets},}})'
    package = installed(tmp_path, "p", {"p/plain_text_readers_bible.py": source})
    (passage,) = module.scripture(package)
    assert passage.id == "1001/0" and passage.genre == "stories"
    assert passage.text == "In the beginning, it was so. " + " ".join(["God's light shone."] * 40)


def test_kinds_of_books():
    kinds = [module._kind_of_book(book) for book in (1, 3, 19, 20, 23, 40, 45, 66)]
    assert kinds == [
        "stories",
        "laws",
        "poems",
        "proverbs in English",
        "prophecies",
        "stories",
        "letters",
        "prophecies",
    ]


def test_games_are_chats_of_commands_and_what_is_said(tmp_path):
    moves = "".join(f">>> get(lamp{i})\nYOU TAKE IT.\n<BLANKLINE>\n{LONG}\n" for i in range(6))
    text = f">>> import adventure\n>>> quiet\n{moves}"
    package = installed(tmp_path, "p", {"p/tests/walkthrough1.txt": text})
    (document,) = module.adventures(package)
    assert (document.id, document.genre) == ("walkthrough1.txt/0", "text adventure")
    assert document.messages[:2] == (
        {"role": "user", "content": "get lamp0"},
        {"role": "assistant", "content": f"YOU TAKE IT.\n\n{LONG}"},
    )
    assert len(document.messages) == 8
