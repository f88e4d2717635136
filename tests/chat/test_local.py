import copy
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tiny_model import write_tiny_model

from nla_jax.chat.local import LocalLM, render_with_instruction
from nla_jax.lm.chat_template import render_chat
from nla_jax.lm.files.weights import load_language_model
from nla_jax.lm.logits import logits
from nla_jax.lm.transformer import Transformer

PROMPTS = [
    "Return a list of the words in the string",
    "Parse one argument",
    "A dictionary that maps every key to a count of its values, and more words to make it long enough",
]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A random model that does not end its turn at once."""
    return load_language_model(write_tiny_model(tmp_path_factory.mktemp("talker"), seed=2))


def greedy(lm, ids: list[int], count: int) -> list[int]:
    """Token after token, each by a forward pass over everything before it."""

    @jax.jit
    def best(tokens_1T, last):
        out = Transformer(lm.config).apply({"params": lm.params}, tokens_1T)
        return logits(lm.params, lm.config, out.final_BTD[0, last][None])[0].argmax()

    written = []
    while len(written) < count and lm.tokenizer.eos_token_id not in written:
        so_far = ids + written
        written.append(int(best(jnp.array([so_far + [0] * (192 - len(so_far))]), len(so_far) - 1)))
    return written


def test_answers_are_greedy_and_begin_where_the_chat_template_leaves_off(talker):
    found = dict(LocalLM(talker, talker.config, batch_tokens=256)(PROMPTS, max_tokens=5))
    assert set(found) == set(PROMPTS) and len(set(found.values())) == 3
    for prompt, answer in found.items():
        ids = talker.tokenizer.encode(render_chat(talker.tokenizer, prompt), add_special_tokens=False)
        assert ids.count(talker.tokenizer.bos_token_id) == 3  # one for each turn, none before them
        assert answer == talker.tokenizer.decode(greedy(talker, ids, 5), skip_special_tokens=True).strip()


def test_a_base_model_goes_on_in_a_new_line(tiny_lm):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.chat_template = None
    base = LocalLM(dataclasses.replace(tiny_lm, tokenizer=tokenizer), tiny_lm.config)
    assert base.encode("A") == tiny_lm.tokenizer.encode("A\n")
    assert base.encode("A", "Count.") == tiny_lm.tokenizer.encode("Count.\n\nA\n")


TURN = "<{{ message.role }}>{{ message.content }}"


@pytest.mark.parametrize(
    "for_system, text",
    [
        (TURN, "<system>Count.<user>A"),
        ("{{ raise_exception('no system messages') }}", "<user>Count.\n\nA"),
        ("", "<user>Count.\n\nA"),
    ],
    ids=["taken", "refused", "dropped"],
)
def test_an_instruction_is_the_system_message_where_the_template_has_one(tiny_lm, for_system, text):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}"
        f"{for_system}{{% else %}}{TURN}{{% endif %}}{{% endfor %}}"
    )
    assert render_with_instruction(tokenizer, "A", "Count.") == text
    assert render_with_instruction(tokenizer, "A", "") == "<user>A"


def test_an_instruction_is_read_before_the_prompt(talker):
    model = LocalLM(talker, talker.config)
    ((_, answer),) = model(
        ["Parse one argument"], 5, instruction="Count the words of every text that you are given."
    )
    ids = model.encode("Parse one argument", "Count the words of every text that you are given.")
    assert answer == talker.tokenizer.decode(greedy(talker, ids, 5), skip_special_tokens=True).strip()
    assert ids != model.encode("Parse one argument")
