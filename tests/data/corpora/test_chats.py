import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_jax.data.corpora.chats import ROLES, ChatLeftOut, read_chat, render_plain
from nla_jax.data.corpora.corpus import load_corpus
from nla_jax.data.corpora.documents import Document, documents_digest

PLAIN = ({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"})


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_three_shapes_give_the_same_chat(tmp_path):
    source = write_rows(
        tmp_path / "chats.jsonl",
        {
            "id": 1,
            "messages": [{"role": "user", "content": "Hi. "}, {"role": "assistant", "content": "Hello!"}],
        },
        {
            "id": 2,
            "conversation": [
                {"role": "user", "content": "Hi.", "language": "English", "toxic": False},
                {"role": "assistant", "content": "Hello!", "language": "English"},
            ],
        },
        {"id": 3, "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello!"}]},
        {"id": 4, "messages": json.dumps(PLAIN)},
        {"id": 5, "text": "no chat", "messages": list(PLAIN)},
        {"id": 6, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}, PLAIN[1]]},
    )
    documents = {document.id: document for document in load_corpus(source)}
    assert documents.pop("5") == Document("5", "no chat", "chats")
    expected = [Document(i, "user: Hi.\nassistant: Hello!", "chats", PLAIN) for i in "12346"]
    assert [documents[i] for i in sorted(documents)] == expected


def test_the_chat_may_have_another_field_and_come_from_parquet(tmp_path):
    pq.write_table(pa.table({"dialog": [list(PLAIN)], "id": ["a"], "other": [1]}), tmp_path / "a.parquet")
    assert load_corpus(str(tmp_path), field="dialog") == [Document("a", render_plain(PLAIN), "a", PLAIN)]
    pq.write_table(pa.table({"messages": [list(PLAIN)], "id": ["a"], "other": [1]}), tmp_path / "a.parquet")
    assert load_corpus(str(tmp_path))[0].messages == PLAIN


def test_tools_are_called_and_answer_in_one_shape():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    openai = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": None},
        {"role": "assistant", "content": "It is sunny."},
    ]
    messages = read_chat(openai, "here")
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **call}]}
    assert messages[2] == {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
    assert render_plain(messages).splitlines() == [
        "user: Weather?",
        'assistant: weather({"city": "Paris"})',
        "tool: sunny",
        "assistant: It is sunny.",
    ]
    sharegpt = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ]
    assert read_chat(sharegpt, "here")[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert [message["role"] for message in read_chat(sharegpt, "here")] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    # Parquet holds a null for each argument that any row has.
    nulls = {"tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Paris", "day": None}}}]}
    assert read_chat([{"role": "assistant", **nulls}], "here")[0]["tool_calls"] == [call]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([PLAIN[0]], "without a turn of the assistant"),
        ([{"role": "user", "content": " "}, PLAIN[1]], "with an empty turn"),
        ([{"role": "user"}, PLAIN[1]], "with an empty turn"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, PLAIN[1]],
            "that are no text",
        ),
    ],
)
def test_chats_that_cannot_be_used_are_counted(messages, reason, tmp_path, capsys):
    with pytest.raises(ChatLeftOut, match=reason):
        read_chat(messages, "here")
    source = write_rows(
        tmp_path / "a.jsonl", {"messages": messages}, {"messages": list(PLAIN)}, {"messages": []}
    )
    assert len(load_corpus(source)) == 1
    line = capsys.readouterr().err
    assert f"{reason}, left out: 1" in line and "rows without text, left out: 1" in line


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            [{"role": "narrator", "content": "x"}],
            r"line 1: .* the role 'narrator'; .*read are system, .*user, .*: rename",
        ),
        (
            ["Hi."],
            r"line 1: a chat is a list of messages with 'role' and 'content' .*, and this is \['Hi.'\]; name",
        ),
        ("Hi.", r"line 1: a chat is a list of messages .* and this is 'Hi.'; name the .* corpus.field"),
        (
            [{"role": "assistant", "tool_calls": [{"id": 1}]}],
            r"line 1: a call of a tool is an object with the 'name'",
        ),
    ],
)
def test_what_is_no_chat_is_an_error(value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_corpus(write_rows(tmp_path / "a.jsonl", {"messages": value}))


def test_every_role_is_one_of_the_templates():
    assert set(ROLES.values()) == {"system", "developer", "user", "assistant", "tool"}


def test_the_digest_tells_chats_from_their_text():
    text = Document("a", render_plain(PLAIN), "g")
    chat = Document("a", text.text, "g", PLAIN)
    assert documents_digest([text]) != documents_digest([chat])
    assert documents_digest([chat]) == documents_digest(
        [Document("a", text.text, "g", tuple(map(dict, PLAIN)))]
    )
