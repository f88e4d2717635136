import copy

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from nla_jax.autoencoder.markers import find_marker
from nla_jax.autoencoder.prompts import PromptTemplates, build_verbalizer_prompt

PLAIN = PromptTemplates(verbalizer="ab {injection_char}", forced_start="c", closing="c", chat=False)


def characters(tokens, special=()):
    """A tokenizer of single characters and the given tokens, ids in this order; longer tokens merge from two."""
    merges = [(token[:1], token[1:]) for token in tokens if len(token) == 2]
    vocab = {token: i for i, token in enumerate([*"abc \n$", *tokens])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<end>", *special)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.mark.parametrize(
    ("tokens", "special", "expected"),
    [
        # Reserved tokens come first, in the order of their ids, whatever else there is.
        ("㊗㈎", ["<|im_start|>", "<unused7>", "<unused0>"], "<unused7>"),
        ("", ["<|reserved_special_token_0|>", "<empty_output>"], "<|reserved_special_token_0|>"),
        ("", ["<|placeholder1|>"], "<|placeholder1|>"),
        ("", ["[control_8]"], "[control_8]"),
        ("", ["<extra_id_0>"], "<extra_id_0>"),
        # Then the signs, the ones of published models before others.
        ("㈎㊗", ["<|im_start|>"], "㊗"),
        ("㈱㈎é", [], "㈎"),
        ("é㈱日", [], "㈱"),
        # Then the latest token without ASCII, then the latest of all.
        ("é日z", [], "日"),
        ("zy", [], "y"),
        # Tokens with a meaning of their own are no candidates: an end token called "empty" stays one.
        ("z", ["<pad>"], "z"),
    ],
)
def test_order_of_preference(tokens, special, expected):
    prompt = build_verbalizer_prompt(characters(tokens, special), PLAIN)
    assert prompt.marker_text == expected
    assert prompt.marker not in (*prompt.prefix, *prompt.tail)


def test_named_special_tokens_are_not_spare():
    tokenizer = characters("z", ["<unused0>", "<unused1>"])
    tokenizer.pad_token = "<unused0>"
    assert build_verbalizer_prompt(tokenizer, PLAIN).marker_text == "<unused1>"


def test_a_sign_that_merges_with_its_context_is_passed_over():
    tokenizer = characters(["㊗", "日", " ㊗"])
    assert build_verbalizer_prompt(tokenizer, PLAIN).marker_text == "日"


def test_a_token_that_the_prompt_holds_elsewhere_is_passed_over():
    tokenizer = characters("日é", ["<unused0>"])
    templates = PromptTemplates(verbalizer="é <unused0> {injection_char}", forced_start="c", chat=False)
    assert build_verbalizer_prompt(tokenizer, templates).marker_text == "日"


def test_smollm2_keeps_its_marker(smollm2, tiny_lm):
    for lm in (smollm2, tiny_lm):
        assert build_verbalizer_prompt(lm.tokenizer, PromptTemplates()).marker_text == "<empty_output>"


def test_smollm2_without_reserved_tokens_finds_another_one(smollm2):
    """It has no token for any sign of the list; one is found nonetheless, and the same one again."""
    templates = PromptTemplates(verbalizer="Not <empty_output>. Vector: {injection_char}")
    prompts = [build_verbalizer_prompt(copy.deepcopy(smollm2.tokenizer), templates) for _ in range(2)]
    assert prompts[0] == prompts[1]
    assert not prompts[0].marker_text.isascii()


def test_no_token_fits(tiny_lm):
    with pytest.raises(
        ValueError, match=r"no token of this tokenizer can be the marker.* set templates.marker"
    ):
        find_marker(tiny_lm.tokenizer, lambda text: False)
