import copy
import dataclasses

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from nla_jax.autoencoder.prompts import (
    PromptTemplates,
    build_reconstructor_prompt,
    build_verbalizer_prompt,
    decode_responses,
    encode_reconstructor,
    encode_responses,
    pad,
)

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
    message = TEMPLATES.verbalizer.replace("{injection_char}", TEMPLATES.marker)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
    )
    ids = (*prompt.prefix, prompt.marker, *prompt.tail)
    assert tokenizer.decode(ids) == rendered + "<explanation>\n"
    assert len(ids) == prompt.length
    assert tokenizer.decode([prompt.marker]) == "<empty_output>"
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


def test_tokenizer_without_a_chat_template_is_an_error(tiny_lm):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; use an instruction-tuned"):
        build_verbalizer_prompt(tokenizer, TEMPLATES)


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
