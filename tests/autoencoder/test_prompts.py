import copy
import dataclasses

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers.processors import ByteLevel, TemplateProcessing

from nla_jax.autoencoder.prompts import (
    PromptTemplates,
    build_reconstructor_prompt,
    build_verbalizer_prompt,
    decode_responses,
    encode_reconstructor,
    encode_responses,
)
from nla_jax.lm.prompt_batches import pad

TEMPLATES = PromptTemplates()
EXPLANATIONS = [
    "A recipe for bread.",
    "",
    "(in parentheses)",
    "\n\nnewlines around\n\n",
    "  spaces  ",
    "</text>",
    "ends with <",
    "écrit en français »",
    "x" * 40,
    "quoted {explanation} and <empty_output>",
]


@pytest.fixture(scope="module", params=["tiny_lm", "smollm2"])
def tokenizer(request):
    return request.getfixturevalue(request.param).tokenizer


@pytest.fixture(scope="module")
def bos_tokenizer(tiny_lm):
    """The tiny tokenizer, adding <|im_start|> (id 1) as a BOS; its chat template writes one already."""
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer.encode("a")[0] == 1
    return tokenizer


def test_verbalizer_pieces_are_the_rendered_prompt(tokenizer):
    prompt = build_verbalizer_prompt(tokenizer, TEMPLATES)
    message = TEMPLATES.verbalizer.replace("{injection_char}", "<empty_output>")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
    )
    ids = (*prompt.prefix, prompt.marker, *prompt.tail)
    assert tokenizer.decode(ids) == rendered + "<explanation>\n"
    assert len(ids) == prompt.length
    assert tokenizer.decode([prompt.marker]) == prompt.marker_text == "<empty_output>"
    assert tokenizer.decode(prompt.prefix).endswith("Vector: ")
    assert tokenizer.decode(prompt.tail).endswith("<|im_start|>assistant\n<explanation>\n")
    assert tokenizer.decode(prompt.closing) == "\n</explanation>"
    assert tokenizer.decode([prompt.end_token]) == "<|im_end|>"
    assert hash(prompt) == hash(dataclasses.replace(prompt))


def test_smollm2_pieces(smollm2):
    prompt = build_verbalizer_prompt(smollm2.tokenizer, TEMPLATES)
    assert (prompt.prefix[0], prompt.end_token) == (1, 2)
    assert prompt.marker == smollm2.tokenizer.convert_tokens_to_ids("<empty_output>")
    templates = PromptTemplates(reconstructor="<text>\n{explanation}\n</text>\nThe text goes on:")
    reconstructor = build_reconstructor_prompt(smollm2.tokenizer, templates)
    # The newline before the explanation may join one that the explanation starts with, so it is not in the prefix.
    assert smollm2.tokenizer.decode(reconstructor.prefix) == "<text>"
    assert smollm2.tokenizer.decode(reconstructor.suffix) == "\n</text>\nThe text goes on:"


@pytest.mark.parametrize("marker", ["two tokens surely", "ab"])
def test_marker_of_several_tokens_is_an_error(tokenizer, marker):
    with pytest.raises(ValueError, match=rf"marker '{marker}' is not one token in context: it becomes \["):
        build_verbalizer_prompt(tokenizer, dataclasses.replace(TEMPLATES, marker=marker))


def test_marker_that_merges_with_its_context_is_an_error(smollm2):
    # "x" is a token by itself, but not after a letter.
    assert len(smollm2.tokenizer.encode("x")) == 1
    templates = PromptTemplates(verbalizer="e{injection_char}ample", marker="x")
    with pytest.raises(ValueError, match="'x' is not one token in context.*choose a single token"):
        build_verbalizer_prompt(smollm2.tokenizer, templates)


FAMILIES = {
    "llama3": (
        "{{- bos_token }}{%- set today = strftime_now('%d %b %Y') %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + today + '<|eot_id|>' }}"
        "{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content']"
        " | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>"],
    ),
    "gemma": (
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system role') }}"
        "{%- endif -%}{%- for m in messages -%}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('roles must alternate') }}{%- endif -%}"
        "{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}",
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        ["<start_of_turn>", "<end_of_turn>", "<unused0>", "<unused1>"],
    ),
    "qwen3": (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
        "{%- endif %}{%- endif %}",
        {"bos_token": None, "eos_token": "<|im_end|>"},
        ["<think>", "</think>"],
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}",
        {"bos_token": "<s>", "eos_token": "</s>"},
        ["[INST]", "[/INST]", "[control_8]"],
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
        ["<|user|>", "<|assistant|>", "<|end|>", "<|placeholder1|>"],
    ),
}
"""Chat templates of five families cut down to their structure, their special tokens, and further ones."""


@pytest.fixture(params=FAMILIES)
def family(request, tiny_lm):
    """The tiny tokenizer in the dress of a family; where there is a BOS, plain text gets it as well."""
    template, named, further = FAMILIES[request.param]
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    added = [token for token in (*named.values(), *further) if token]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    tokenizer.chat_template = template
    for name, token in named.items():
        setattr(tokenizer, name, token)
    tokenizer.add_bos_token = tokenizer.bos_token is not None
    return request.param, tokenizer


def test_prompts_of_families(family):
    name, tokenizer = family
    templates = PromptTemplates(verbalizer="Vector: {injection_char}", marker="<empty_output>")
    prompt = build_verbalizer_prompt(tokenizer, templates)
    ids = (*prompt.prefix, prompt.marker, *prompt.tail)
    message = "Vector: <empty_output>"
    expected = {
        "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{message}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "gemma": f"<bos><start_of_turn>user\n{message}<end_of_turn>\n<start_of_turn>model\n",
        "qwen3": f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "mistral": f"<s>[INST] {message} [/INST]",
        "phi3": f"<|user|>\n{message}<|end|>\n<|assistant|>\n",
    }
    ends = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "qwen3": "<|im_end|>", "mistral": "</s>",
            "phi3": "<|end|>"}  # fmt: skip
    assert tokenizer.decode(ids) == expected[name] + "<explanation>\n"
    assert tokenizer.decode([prompt.marker]) == "<empty_output>"
    assert tokenizer.decode([prompt.end_token]) == ends[name]
    # One BOS at most, and the template's; none in closings.
    assert ids.count(tokenizer.bos_token_id) == (name in ("llama3", "gemma", "mistral"))
    assert None not in ids and tokenizer.bos_token_id not in prompt.closing


def test_reconstructor_prompts_of_families_start_with_the_bos(family):
    _, tokenizer = family
    prompt = build_reconstructor_prompt(tokenizer, TEMPLATES)
    assert tokenizer.decode(prompt.prefix[:1]) == (tokenizer.bos_token or "A")
    ids, lengths = encode_reconstructor(tokenizer, prompt, EXPLANATIONS, 96)
    for row, length in zip(ids, lengths, strict=True):
        assert tokenizer.bos_token_id not in row[:length]


def test_template_that_needs_a_bos_the_tokenizer_lacks(tiny_lm):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.bos_token = None
    tokenizer.chat_template = "{{ bos_token + '[INST] ' }}{{ messages[0]['content'] }}{{ ' [/INST]' }}"
    prompt = build_verbalizer_prompt(tokenizer, PromptTemplates(verbalizer="V: {injection_char}"))
    ids = [*prompt.prefix, prompt.marker, *prompt.tail]
    assert None not in ids
    assert tokenizer.decode(ids) == "[INST] V: <empty_output> [/INST]<explanation>\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('only tools') }}",
            r"cannot render messages with the roles user \(only tools\); .*templates.chat",
        ),
        ("{{ messages[0].nothing + 'x' }}", r"cannot render messages with the roles user \(.*nothing"),
        ("{{ 'Hi' }}", "repeats or drops the user message: it renders 'V: .*' as 'Hi'; set templates.chat"),
        ("{{ messages[0].content + messages[0].content }}", "repeats or drops the user message"),
    ],
)
def test_chat_template_that_cannot_be_used(tiny_lm, template, message):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        build_verbalizer_prompt(tokenizer, PromptTemplates(verbalizer="V: {injection_char}"))


def test_marker_that_the_chat_template_writes_too(tokenizer):
    """The slot is where the message has it, not where the template does."""
    templates = PromptTemplates(verbalizer="Vector: {injection_char} end", marker="<|im_start|>")
    prompt = build_verbalizer_prompt(tokenizer, templates)
    assert prompt.marker == prompt.prefix[0] == 1
    assert tokenizer.decode(prompt.prefix).endswith("Vector: ")
    assert tokenizer.decode(prompt.tail).startswith(" end")


def test_token_that_takes_in_the_space_before_it_is_no_marker(smollm2):
    tokenizer = copy.deepcopy(smollm2.tokenizer)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    with pytest.raises(ValueError, match=r"'x' is not one token in context: it becomes \[' x'\]"):
        build_verbalizer_prompt(tokenizer, dataclasses.replace(TEMPLATES, marker="x"))


@pytest.fixture
def base_tokenizer(tiny_lm):
    """The tiny tokenizer as a base model has it: no chat template, one special token for everything."""
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.chat_template = None
    tokenizer.bos_token = tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def test_tokenizer_without_a_chat_template_is_an_error(base_tokenizer):
    with pytest.raises(
        ValueError,
        match=r"no chat template, so .*; use an instruction-tuned.* set templates.chat to False",
    ):
        build_verbalizer_prompt(base_tokenizer, TEMPLATES)


@pytest.mark.parametrize("add_bos", [False, True])
def test_plain_prompt_for_a_base_model(base_tokenizer, add_bos):
    base_tokenizer.add_bos_token = add_bos
    prompt = build_verbalizer_prompt(
        base_tokenizer, PromptTemplates(verbalizer="V: {injection_char}", chat=False)
    )
    ids = [*prompt.prefix, prompt.marker, *prompt.tail]
    assert base_tokenizer.decode(ids) == "<|endoftext|>" * add_bos + "V: <empty_output>\n<explanation>\n"
    assert prompt.end_token == 0
    assert base_tokenizer.decode(prompt.closing) == "\n</explanation>"


def test_plain_prompt_does_without_a_chat_template_that_is_there(bos_tokenizer):
    bos_tokenizer.bos_token = "<|im_start|>"
    prompt = build_verbalizer_prompt(bos_tokenizer, dataclasses.replace(TEMPLATES, chat=False))
    ids = [*prompt.prefix, prompt.marker, *prompt.tail]
    assert bos_tokenizer.decode(ids).startswith("<|im_start|>A vector was read")
    assert ids.count(1) == 1 and 2 not in ids


def test_prompt_that_starts_with_the_marker_is_an_error(base_tokenizer):
    templates = PromptTemplates(verbalizer="{injection_char} is a vector.", chat=False)
    with pytest.raises(ValueError, match="starts with the marker '<empty_output>'; write some words before"):
        build_verbalizer_prompt(base_tokenizer, templates)


def test_tokenizer_without_an_end_token_is_an_error(base_tokenizer):
    base_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="names no token that ends a text; set its eos_token"):
        build_verbalizer_prompt(base_tokenizer, dataclasses.replace(TEMPLATES, chat=False))


@pytest.mark.parametrize(
    ("field", "slot"), [("verbalizer", "{injection_char}"), ("reconstructor", "{explanation}")]
)
@pytest.mark.parametrize("count", [0, 2])
def test_template_without_exactly_one_slot_is_an_error(field, slot, count):
    with pytest.raises(ValueError, match=f"{field} template must contain {slot} exactly once, got 'say"):
        PromptTemplates(**{field: "say " + slot * count})


def test_reconstructor_rows_spell_the_filled_template(tokenizer):
    """Whatever merges at the borders, prefix and row together are the template's text."""
    prompt = build_reconstructor_prompt(tokenizer, TEMPLATES)
    ids, lengths = encode_reconstructor(tokenizer, prompt, EXPLANATIONS, 128)
    for text, row, length in zip(EXPLANATIONS, ids, lengths, strict=True):
        filled = TEMPLATES.reconstructor.replace("{explanation}", text)
        assert tokenizer.decode([*prompt.prefix, *row[:length]]) == filled
        assert tuple(row[length - len(prompt.suffix) : length]) == prompt.suffix
        assert not row[length:].any()


def test_reconstructor_rows_when_the_explanation_merges_into_the_prefix(smollm2):
    tokenizer = smollm2.tokenizer
    templates = PromptTemplates(reconstructor="Text {explanation} end of the text:")
    prompt = build_reconstructor_prompt(tokenizer, templates)
    # "\u200dually" continues a word: with a prefix that ends in letters, the prefix's last token changes.
    merging = PromptTemplates(reconstructor="act{explanation} end of the text:")
    merging_prompt = build_reconstructor_prompt(tokenizer, merging)
    for chosen, templates_ in ((prompt, templates), (merging_prompt, merging)):
        for text in ("ually", "ion", "word", "1"):
            (row,), (length,) = encode_reconstructor(tokenizer, chosen, [text], 32)
            expected = templates_.reconstructor.replace("{explanation}", text)
            assert tokenizer.decode([*chosen.prefix, *row[:length]]) == expected


def test_too_long_explanation_loses_its_end_and_keeps_the_suffix(tokenizer):
    prompt = build_reconstructor_prompt(tokenizer, TEMPLATES)
    long = "word " * 100
    (row,), (length,) = encode_reconstructor(tokenizer, prompt, [long], 40)
    (whole,), _ = encode_reconstructor(tokenizer, prompt, [long], 400)
    kept = 40 - len(prompt.suffix)
    assert length == 40
    assert tuple(row[kept:]) == prompt.suffix
    np.testing.assert_array_equal(row[:kept], whole[:kept])


def test_failed_explanation_counts_as_empty(tokenizer):
    prompt = build_reconstructor_prompt(tokenizer, TEMPLATES)
    ids, lengths = encode_reconstructor(tokenizer, prompt, [None, ""], 32)
    np.testing.assert_array_equal(ids[0], ids[1])
    assert lengths[0] == lengths[1] >= len(prompt.suffix)


def test_halves_of_surrogate_pairs_are_replaced(tokenizer):
    prompt = build_reconstructor_prompt(tokenizer, TEMPLATES)
    ids, _ = encode_reconstructor(tokenizer, prompt, ["a\ud83d b", "a\ufffd b"], 32)
    np.testing.assert_array_equal(ids[0], ids[1])


def test_no_second_bos(bos_tokenizer, tiny_lm):
    """The chat template writes a BOS, plain texts get one from the tokenizer; rows never carry one."""
    assert build_verbalizer_prompt(bos_tokenizer, TEMPLATES) == build_verbalizer_prompt(
        tiny_lm.tokenizer, TEMPLATES
    )
    prompt = build_reconstructor_prompt(bos_tokenizer, TEMPLATES)
    plain = build_reconstructor_prompt(tiny_lm.tokenizer, TEMPLATES)
    assert prompt.prefix == (1, *plain.prefix)
    ids, _ = encode_reconstructor(bos_tokenizer, prompt, EXPLANATIONS, 64)
    np.testing.assert_array_equal(ids, encode_reconstructor(tiny_lm.tokenizer, plain, EXPLANATIONS, 64)[0])
    verbalizer = build_verbalizer_prompt(bos_tokenizer, TEMPLATES)
    assert 1 not in encode_responses(bos_tokenizer, verbalizer, ["a text"], 32)[0]
    assert 1 not in verbalizer.closing


def test_responses_survive_encoding_and_decoding(tokenizer):
    prompt = build_verbalizer_prompt(tokenizer, TEMPLATES)
    ids, lengths = encode_responses(tokenizer, prompt, EXPLANATIONS, 128)
    closed = np.ones(len(EXPLANATIONS), bool)
    decoded = decode_responses(tokenizer, prompt, ids, lengths, closed)
    assert decoded == [text.strip() or None for text in EXPLANATIONS]
    for row, length in zip(ids, lengths, strict=True):
        assert tuple(row[length - len(prompt.closing) : length]) == prompt.closing
        assert not row[length:].any()


def test_cut_response_lacks_its_closing(tokenizer):
    prompt = build_verbalizer_prompt(tokenizer, TEMPLATES)
    (row,), (length,) = encode_responses(tokenizer, prompt, ["word " * 100], 20)
    assert length == 20
    np.testing.assert_array_equal(row, tokenizer.encode("word " * 100)[:20])


def test_unclosed_and_empty_responses_fail(tokenizer):
    prompt = build_verbalizer_prompt(tokenizer, TEMPLATES)
    ids, lengths = encode_responses(tokenizer, prompt, ["good", "unclosed", "", " \n "], 64)
    closed = np.array([True, False, True, True])
    assert decode_responses(tokenizer, prompt, ids, lengths, closed) == ["good", None, None, None]


def test_pad_returns_lengths_that_do_not_depend_on_the_ids():
    ids, lengths = pad([[5, 0, 0], [], [7]], 4)
    np.testing.assert_array_equal(ids, [[5, 0, 0, 0], [0, 0, 0, 0], [7, 0, 0, 0]])
    np.testing.assert_array_equal(lengths, [3, 0, 1])


def test_no_room_beside_the_suffix_is_an_error(smollm2):
    prompt = build_reconstructor_prompt(smollm2.tokenizer, PromptTemplates())
    with pytest.raises(ValueError, match="max_reconstructor_tokens=2 leaves no room"):
        encode_reconstructor(smollm2.tokenizer, prompt, ["a text"], 2)
