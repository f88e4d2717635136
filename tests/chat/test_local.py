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


def test_sampled_answers_depend_on_their_own_prompt_alone(talker):
    model = LocalLM(talker, talker.config)
    together = dict(model(PROMPTS, 5, temperature=1.0))
    alone = dict(model(PROMPTS[2:], 5, temperature=1.0))
    assert alone == {PROMPTS[2]: together[PROMPTS[2]]}
    assert together != dict(model(PROMPTS, 5))


def test_rows_of_a_batch_are_sampled_by_their_own_seeds(talker):
    model = LocalLM(talker, talker.config)
    ids = model.encode(PROMPTS[0])
    seeds = [3, 5, 3, 8]
    answers = model.write([ids] * 4, length=128, max_tokens=5, temperature=1.0, seeds=seeds)
    assert answers[0] == answers[2] and len({*answers}) == 3
    backwards = model.write([ids] * 4, length=128, max_tokens=5, temperature=1.0, seeds=seeds[::-1])
    assert backwards == answers[::-1]


def test_an_answer_says_whether_the_model_ended_it(talker):
    model = LocalLM(talker, talker.config)
    ids = model.encode(PROMPTS[0])
    written = greedy(talker, ids, 12)
    # The last token that is new among them stands in for the one that ends a turn.
    last = max(i for i, token in enumerate(written) if token not in written[:i])
    model.end_token = written[last]
    ((_, ended),) = model.write([ids], length=128, max_tokens=last + 1)
    ((text, cut),) = model.write([ids], length=128, max_tokens=last)
    assert last > 0 and ended and not cut
    assert text == talker.tokenizer.decode(written[:last], skip_special_tokens=True).strip()
