import copy

import pytest

from nla_jax.lm.places import answer_starts, places, sentence_ends
from nla_jax.lm.tokenized import tokenize_chat, tokenize_text


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", " Two!", " Three?"]),
        ("Dr. Smith paid 3.50 to J. R. Jones. Why?", ["Dr. Smith paid 3.50 to J. R. Jones.", " Why?"]),
        ("Use files, e.g. this one. See fig. 3.", ["Use files, e.g. this one.", " See fig. 3."]),
        ('He said "No." Then (he left.) So.', ['He said "No."', " Then (he left.)", " So."]),
        ('"Why?" he asked... and "Go!" she said.', ['"Why?" he asked... and "Go!" she said.']),
        ("hi. how are you? fine", ["hi.", " how are you?"]),
        ("Pears etc. are fruit. Nuts etc. Are not.", ["Pears etc. are fruit.", " Nuts etc.", " Are not."]),
        ("1. First\n2. Second one.\nThe year was 1999. Then", ["1. First\n2. Second one.", "\nThe year was 1999."]),
        ("import a.b and x.y() v1.2.3 at example.com", []),
        ("今日は。明日は？", ["今日は。", "明日は？"]),
        ("Она ушла. Он остался!", ["Она ушла.", " Он остался!"]),
        ("It works **well.** Good", ["It works **well.**"]),
        ("Made in the U.S. Army of one. I did it. So did I. You?", None),
        ("", []),
        ("...", ["..."]),
    ],
)  # fmt: skip
def test_the_ends_of_sentences(text, sentences):
    ends = sentence_ends(text)
    edges = [0, *ends]
    cut = [text[a:b] for a, b in zip(edges, ends, strict=False)]
    if sentences is None:
        assert cut == ["Made in the U.S. Army of one.", " I did it.", " So did I.", " You?"]
    else:
        assert cut == sentences


def by_place(source):
    """The tokens of each place, in order, without the spaces around them."""
    shown = {}
    for token, place in zip(source.tokens, places(source), strict=True):
        shown.setdefault(place, []).append(token.strip(" "))
    return shown


def test_the_places_of_plain_text(smollm2):
    source = tokenize_text(smollm2.tokenizer, 'He left (at 3.5 p.m. sharp.) So, "Go."\nIt is the end')
    shown = by_place(source)
    assert shown["sentence_end"] == [".)", '."'] and shown["line_end"] == ["\n"]
    assert set(shown) == {"inside", "sentence_end", "line_end"}
    assert "".join(shown["inside"]).startswith("Heleft(at3.5p.m.sharp")


def test_the_last_of_several_tokens_of_a_character_ends_a_sentence(tiny_lm):
    source = tokenize_text(tiny_lm.tokenizer, "a。b")
    assert places(source) == ("inside", "inside", "inside", "sentence_end", "inside")


CHAT = [
    {"role": "user", "content": "Add these. Now\nplease."},
    {"role": "assistant", "content": "It is 4. Fine"},
    {"role": "user", "content": "Thanks"},
]


def test_the_places_of_a_chat(smollm2):
    source = tokenize_chat(smollm2.tokenizer, CHAT)
    found = places(source)
    where = {place: [i for i, at in enumerate(found) if at == place] for place in found}
    assert [source.tokens[i] for i in where["turn_end"]] == [".", " Fine", "Thanks"]
    assert [source.tokens[i] for i in where["sentence_end"]] == [".", "."]
    assert [source.tokens[i] for i in where["line_end"]] == ["\n"]
    # The token before the assistant's content, and the last of the generation prompt.
    assert where["answer_start"] == answer_starts(source)
    assert source.tokens[where["answer_start"][0] + 1] == "It" and where["answer_start"][1] == len(source) - 1
    assert all(source.roles[i] == "assistant" for i in where["answer_start"])
    # What the template writes has no place, the system's turn of its own included.
    written = {source.tokens[i] for i in where[None]}
    assert {"<|im_start|>", "<|im_end|>", "user"} <= written
    assert [source.tokens[i] for i in range(len(source)) if source.in_content[i] and found[i] is None] == []


def test_a_conversation_that_ends_with_an_answer_opens_none(smollm2):
    source = tokenize_chat(smollm2.tokenizer, CHAT[:2])
    assert [source.tokens[i + 1] for i in answer_starts(source)] == ["It"]
    empty = tokenize_chat(smollm2.tokenizer, [CHAT[0], {"role": "assistant", "content": ""}])
    assert answer_starts(empty) == []


def test_tool_calls_and_results_have_places(smollm2):
    tokenizer = copy.deepcopy(smollm2.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}"
        "{{ '<tool_call>' + call.function.name + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    calls = [{"type": "function", "function": {"name": "sum", "arguments": {}}}]
    messages = [
        {"role": "user", "content": "Sum"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "four"},
    ]
    source = tokenize_chat(tokenizer, messages)
    ends = [i for i, place in enumerate(places(source)) if place == "turn_end"]
    assert [(source.roles[i], source.tokens[i]) for i in ends] == [
        ("user", "Sum"),
        ("assistant", ">"),
        ("tool", "four"),
    ]
    starts = answer_starts(source)
    assert [source.text[source.spans[i][1] :][:6] for i in starts] == ["<tool_", ""]
