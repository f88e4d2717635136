"""Tokenizers: from a Hugging Face directory, or rebuilt from the header of a GGUF file."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type` for tokens that never come out of merging bytes."""


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _digits_first() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)]
    )


def _split_numbers(digits: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """The splitting of Llama 3 and Qwen 2, which differ in how many digits stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), _byte_level(use_regex=False)]
    )


class _Recipe(NamedTuple):
    """What the name in `tokenizer.ggml.pre` stands for; the rest of the tokenizer is in the header."""

    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    ignore_merges: bool = False
    """Whether a piece that is itself a token is taken whole, whatever the merges say."""


RECIPES = {
    "default": _Recipe(lambda: _byte_level(use_regex=True)),
    "gpt-2": _Recipe(lambda: _byte_level(use_regex=True)),
    "smollm": _Recipe(_digits_first),
    "llama-bpe": _Recipe(_split_numbers(r"\p{N}{1,3}"), ignore_merges=True),
    "qwen2": _Recipe(_split_numbers(r"\p{N}"), normalizer=normalizers.NFC),
}


def tokenizer_from_gguf(header: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Rebuild a byte-level BPE tokenizer from a GGUF header.

    Tokens keep their ids; control tokens are special tokens; the chat template and the context length are the
    header's. A BOS is added only where `tokenizer.ggml.add_bos_token` says so.

    Args:
      header: key to value, as in `GGUFFile.header`.

    Raises:
      ValueError: not a byte-level BPE tokenizer, or a pre-tokenizer this port does not know.
    """
    model = header.get("tokenizer.ggml.model", "missing")
    if model != "gpt2":
        raise ValueError(
            f"tokenizer.ggml.model={model!r} is not supported, only 'gpt2' (byte-level BPE); "
            "use the Hugging Face directory of this model"
        )
    pre = header.get("tokenizer.ggml.pre", "default")
    if pre not in RECIPES:
        raise ValueError(
            f"tokenizer.ggml.pre={pre!r} is not supported, only {', '.join(sorted(RECIPES))}; "
            "use the Hugging Face directory of this model"
        )
    recipe = RECIPES[pre]
    tokens = header["tokenizer.ggml.tokens"]
    types = header.get("tokenizer.ggml.token_type", [1] * len(tokens))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in header["tokenizer.ggml.merges"]],
            ignore_merges=recipe.ignore_merges,
        )
    )
    if recipe.normalizer:
        tokenizer.normalizer = recipe.normalizer()
    tokenizer.pre_tokenizer = recipe.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )

    def named(role: str) -> str | None:
        index = header.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[index]

    architecture = header.get("general.architecture")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        extra_special_tokens=[token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL],
        add_bos_token=bool(header.get("tokenizer.ggml.add_bos_token", False)),
        chat_template=header.get("tokenizer.chat_template"),
        model_max_length=header.get(f"{architecture}.context_length"),
        clean_up_tokenization_spaces=False,
    )


def tokenizer_from_directory(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a Hugging Face directory, never running code from it.

    Raises:
      ValueError: the directory holds no tokenizer that `transformers` can load as a fast one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers do
        raise ValueError(
            f"no loadable tokenizer in {path}; it needs tokenizer.json and tokenizer_config.json ({error})"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"the tokenizer in {path} is a {type(tokenizer).__name__}, not a fast one; add a tokenizer.json"
        )
    return tokenizer
