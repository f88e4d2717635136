"""Tokenizers: from a Hugging Face directory, or rebuilt from the header of a GGUF file."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
"""Values of `tokenizer.ggml.token_type`; control and user-defined tokens never come out of merging."""
SPACE = "\u2581"
"""How SentencePiece spells a space."""


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _digits_first() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)]
    )


def _split_numbers(digits: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """The pre-tokenizer of Llama 3 and Qwen 2; `digits` is the pattern of digits that stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), _byte_level(use_regex=False)]
    )


class _Recipe(NamedTuple):
    """The settings that a name in `tokenizer.ggml.pre` stands for; the rest of the tokenizer is in the header."""

    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    ignore_merges: bool = False
    """Whether a piece that is itself a token is taken whole, whatever the merges say."""
    add_bos: bool = False
    """Whether texts begin with a BOS if the file does not say."""


RECIPES = {
    "default": _Recipe(lambda: _byte_level(use_regex=True)),
    "gpt-2": _Recipe(lambda: _byte_level(use_regex=True)),
    "smollm": _Recipe(_digits_first),
    "llama-bpe": _Recipe(_split_numbers(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True),
    "qwen2": _Recipe(_split_numbers(r"\p{N}"), normalizer=normalizers.NFC),
}


def tokenizer_from_gguf(header: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Rebuild a tokenizer from a GGUF header: byte-level BPE, or SentencePiece's BPE over characters.

    Tokens keep their ids; control tokens are special tokens; the chat template and the context length are the
    header's. Texts begin with a BOS if `tokenizer.ggml.add_bos_token` says so. Without that key, only SentencePiece and
    Llama 3 vocabularies add a BOS, as in llama.cpp (https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp). A
    header that names no BOS token never adds one.

    Args:
      header: key -> value, as in `GGUFFile.header`.

    Raises:
      ValueError: the tokenizer is of another kind, its pre-tokenizer is unknown here, or a field is missing.
    """
    kinds = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}
    model = header.get("tokenizer.ggml.model", "missing")
    if model not in kinds:
        raise ValueError(
            f"tokenizer.ggml.model={model!r} is not supported, only 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece); use the Hugging Face directory of this model"
        )
    try:
        tokens = header["tokenizer.ggml.tokens"]
        types = header.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
        built = kinds[model](tokens, types, header)
    except KeyError as error:
        raise ValueError(
            f"the GGUF header lacks the field {error}, which its tokenizer needs; "
            "use the Hugging Face directory of this model"
        ) from error

    def named(role: str) -> str | None:
        index = header.get(f"tokenizer.ggml.{role}_token_id", built.roles.get(role))
        return None if index is None else tokens[index]

    architecture = header.get("general.architecture")
    return PreTrainedTokenizerFast(
        tokenizer_object=built.tokenizer,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        extra_special_tokens=[token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL],
        add_bos_token=bool(header.get("tokenizer.ggml.add_bos_token", built.add_bos))
        and named("bos") is not None,
        chat_template=header.get("tokenizer.chat_template"),
        model_max_length=header.get(f"{architecture}.context_length"),
        clean_up_tokenization_spaces=False,
    )


class _Built(NamedTuple):
    """A tokenizer, and the defaults of its kind for keys that the header lacks."""

    tokenizer: Tokenizer
    add_bos: bool
    roles: Mapping[str, int] = {}
    """Default token ids of bos, eos and unknown."""


def _byte_level_bpe(tokens: list[str], types: list[int], header: Mapping[str, Any]) -> _Built:
    pre = header.get("tokenizer.ggml.pre", "default")
    if pre not in RECIPES:
        raise ValueError(
            f"tokenizer.ggml.pre={pre!r} is not supported, only {', '.join(sorted(RECIPES))}; "
            "use the Hugging Face directory of this model"
        )
    recipe = RECIPES[pre]
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
    _add_tokens(tokenizer, tokens, types)
    return _Built(tokenizer, recipe.add_bos)


def _sentencepiece(tokens: list[str], types: list[int], header: Mapping[str, Any]) -> _Built:
    """SentencePiece's BPE (https://github.com/google/sentencepiece).

    The pair whose union scores highest merges first, a character that is no token becomes bytes, and user-defined
    tokens are matched before any merging.
    """
    add_prefix = header.get("tokenizer.ggml.add_space_prefix", True)
    # The header holds user-defined runs of spaces (Gemma) as plain spaces.
    tokens = [token.replace(" ", SPACE) for token in tokens]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_merges_by_score(tokens, types, header["tokenizer.ggml.scores"]),
            unk_token=tokens[header.get("tokenizer.ggml.unknown_token_id", 0)],
            fuse_unk=True,
            byte_fallback=BYTE in types,
        )
    )
    spell, prefix = normalizers.Replace(" ", SPACE), normalizers.Prepend(SPACE)
    unspell = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = normalizers.Sequence([prefix, spell] if add_prefix else [spell])
    tokenizer.decoder = decoders.Sequence([*unspell, *[decoders.Strip(" ", 1, 0)] * add_prefix])
    _add_tokens(tokenizer, tokens, types, spelled=not add_prefix)
    return _Built(tokenizer, True, {"bos": 1, "eos": 2, "unknown": 0})


def _merges_by_score(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a normal token of two others, the best token first.

    SentencePiece has no list of merges: it takes the leftmost of the best pairs. A list has to order the splits of one
    token; longer left halves come first, as in transformers' converter.
    """
    pieces = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    return [
        (token[:cut], token[cut:])
        for token in sorted(pieces, key=lambda token: -scores[pieces[token]])
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in pieces and token[cut:] in pieces
    ]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], spelled: bool = False) -> None:
    """Add control and user-defined tokens; with `spelled`, the latter are matched after spaces became `SPACE`."""
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=spelled and kind == USER_DEFINED)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )


def tokenizer_from_directory(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a Hugging Face directory, never running code from it.

    Raises:
      ValueError: the directory holds no tokenizer that `transformers` can load as a fast one.
    """
    # Imported here, because the import takes half a second and GGUF files do not need it.
    from transformers import AutoTokenizer

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
