import json

import numpy as np
import pytest

from nla_jax.analysis.texts import Selection, TextItem, looks_like_a_file, parse_positions, read_texts
from nla_jax.lm.activations import Activations
from nla_jax.lm.tokenized import tokenize_chat

CHAT = [
    {"role": "user", "content": "Name an array."},
    {"role": "assistant", "content": "The array is long."},
]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("5", [5]),
        ("-1", [8]),
        ("0:5", [0, 1, 2, 3, 4]),
        ("-3:", [6, 7, 8]),
        ("::4", [0, 4, 8]),
        (":99", list(range(9))),
    ],
)
def test_positions_and_ranges(spec, expected):
    assert parse_positions(spec, 9) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("x", "'x' is no position; give an index or a range, such as 5, -1, 0:5 or -3:"),
        ("", "'' is no position"),
        ("1:2:3:4", "'1:2:3:4' is no position"),
        ("9", "position 9 is outside the text: it has tokens 0 to 8"),
        ("-10", "position -10 is outside the text"),
        ("3:3", "position 3:3 is outside the text"),
    ],
)
def test_what_is_no_position_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_positions(spec, 9)


def test_rules_are_all_kept(tiny_lm):
    source = tokenize_chat(tiny_lm.tokenizer, CHAT)
    whole = Activations(
        np.arange(len(source), dtype=np.float32)[:, None], 0, source, tuple(range(len(source)))
    )
    assert len(Selection().of(whole)) == len(source)
    answer = Selection(role="assistant").of(whole)
    assert "".join(answer.tokens) == "The array is long."
    assert Selection(role="assistant", match="array").of(whole).positions == tuple(
        p for p in answer.positions if p in source.matching("array")
    )
    assert Selection(role="assistant", last_of_turn=True).of(whole).positions == answer.positions[-1:]
    assert Selection(positions=("0:2", "-1")).of(whole).positions == (0, 1, len(source) - 1)
    with pytest.raises(ValueError, match=r"Selection\(.* chooses none of the .* tokens of the text"):
        Selection(positions=("0",), role="assistant").of(whole)


def test_files_of_texts_and_conversations(tmp_path):
    lines = tmp_path / "texts.jsonl"
    rows = [{"text": "One."}, {"id": "b", "messages": CHAT}]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_texts(lines) == [TextItem("line 1", "One."), TextItem("b", messages=CHAT)]
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps(CHAT))
    assert read_texts(chat) == [TextItem("chat.json", messages=CHAT)]
    plain = tmp_path / "plain.txt"
    plain.write_text("Two\nlines.")
    assert read_texts(plain) == [TextItem("plain.txt", "Two\nlines.")]


def test_files_as_other_systems_write_them(tmp_path):
    """With a byte-order mark, line breaks of two characters, capital endings, null ids and bare line separators."""
    lines = tmp_path / "texts.JSONL"
    rows = [{"text": "One\u2028line.", "id": None}, {"text": "Two.", "id": 2}]
    written = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    lines.write_bytes(f"{written}\r\n\r\n".encode("utf-8-sig"))
    assert read_texts(lines) == [TextItem("line 1", "One\u2028line."), TextItem("2", "Two.")]
    (tmp_path / "plain.txt").write_bytes("Two\r\nlines.".encode("utf-8-sig"))
    assert read_texts(tmp_path / "plain.txt") == [TextItem("plain.txt", "Two\nlines.")]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin.txt: not UTF-8 text .* convert it to UTF-8"):
        read_texts(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"tex": "b"}\n', r"line 2 holds \['tex'\]; expected an object with a string `text`"),
        ('{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "holds the ids 1 more than once"),
        ("\n", "holds no texts"),
    ],
)
def test_files_that_cannot_be_read_are_named(content, message, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(path)


def test_other_kinds_of_files_are_refused(tmp_path):
    path = tmp_path / "texts.parquet"
    path.touch()
    with pytest.raises(
        ValueError, match=r"is none of \.jsonl, \.json, \.txt, \.md; write one JSON object a line"
    ):
        read_texts(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_texts(tmp_path / "none.jsonl")


def test_a_digest_follows_the_text_and_the_settings():
    item = TextItem("a", "One.")
    assert item.digest(1) == TextItem("another id", "One.").digest(1)
    assert len({item.digest(1), item.digest(2), TextItem("a", "Two.").digest(1)}) == 3


def test_names_of_files_are_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").touch()
    assert all(map(looks_like_a_file, ("mine.parquet", "chat.json", "notes")))
    assert not any(map(looks_like_a_file, ("The end.", "A file named chat.json", "word")))
