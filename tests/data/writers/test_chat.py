"""The chat writer against a model that answers by rule."""

import dataclasses

import numpy as np
import pytest

from nla_jax.chat.config import ChatConfig
from nla_jax.chat.models import Answer
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.data.writers.chat import ChatWriter, ChatWriterConfig, prompt_for_row
from nla_jax.data.writers.checks import TextChecks
from nla_jax.data.writers.instruction import built_in_instructions, load_instruction

GOOD = (
    "<explanation>\nA noun is due, since an article stands last.\nIt is a plain report of {}.\n</explanation>"
)
CONFIG = ChatWriterConfig(ChatConfig("local:somewhere"), checks=TextChecks(fewest_words=5))


class Rule:
    """A chat model that answers by a rule and keeps what it was asked."""

    def __init__(self, rule):
        self.rule, self.asked, self.options = rule, [], []

    def answers(self, prompts, *, instruction="", max_tokens, temperature=None, desc=None):
        self.asked += prompts
        self.options.append((instruction, max_tokens, temperature))
        return [self.rule(prompt) for prompt in prompts]

    def send_batches(self, prompts, *, instruction="", max_tokens, temperature=None):
        self.sent_ahead = list(prompts)


def rows(contexts, **extra) -> ActivationDataset:
    n = len(contexts)
    return ActivationDataset(
        activations=np.zeros((n, 2), np.float32),
        explanations=None,
        doc_ids=[f"d{i}" for i in range(n)],
        n_raw_tokens=np.full(n, 60),
        contexts=list(contexts),
        extra=extra,
        sidecar=Sidecar("x", "base", n, Extraction("m", 2, 1, "c", CorpusSlice(0, n), 1)),
    )


def written(rule, data, config=CONFIG):
    model = Rule(rule)
    writer = ChatWriter(config, lambda: model)
    return writer.explain(data), writer, model


def test_batches_hold_what_is_asked_first():
    model = Rule(lambda prompt: Answer(GOOD.format("cats")))
    writer, data = ChatWriter(CONFIG, lambda: model), rows(["they bark at the", "they purr at the"])
    writer.send_batches(data)
    assert model.asked == []
    writer.explain(data)
    assert model.sent_ahead == model.asked


def test_each_row_gets_the_text_of_its_own_prompt():
    def rule(prompt):
        return Answer(GOOD.format("cats" if "purr" in prompt else "dogs"))

    texts, writer, model = written(rule, rows(["they bark at the", "they purr at the"]))
    assert [text.split()[-1] for text in texts] == ["dogs.", "cats."]
    assert texts[0].startswith("A noun is due") and "<" not in texts[0]
    assert model.options[0] == (load_instruction("activation_v1").text, 320, None)
    assert model.asked == writer.prompts(rows(["they bark at the", "they purr at the"]))
    alone, *_ = written(rule, rows(["they purr at the"]))
    assert alone == texts[1:]


def test_what_fails_is_asked_once_more_with_the_complaint_and_then_left_out():
    def rule(prompt):
        again = "An earlier description was refused." in prompt
        if "stubborn" in prompt:
            return Answer("<explanation>Short.</explanation>")
        if "silent" in prompt:
            return Answer("", "the model refused to answer")
        return Answer(GOOD.format("cats") if again or "good" in prompt else "No tags at all.")

    texts, writer, model = written(rule, rows(["good", "mends", "stubborn", "silent"]))
    assert [text is not None for text in texts] == [True, True, False, False]
    again = model.asked[4:]
    assert len(again) == 2 and all("<text>" in prompt for prompt in again)
    assert "The tags are missing." in again[0] and "has 1 statements; write 2 to 4" in again[1]
    report = writer.report()
    assert {name: report[name] for name in ("rows", "written", "left_out", "asked_again")} == {
        "rows": 4,
        "written": 2,
        "left_out": 2,
        "asked_again": 2,
    }
    assert report["refused"] == {"no answer": 1, "too few statements": 1}
    assert report["model"] == "local:somewhere"
    assert report["instruction"] == {
        "name": "activation_v1",
        "digest": load_instruction("activation_v1").digest,
    }


def test_of_a_long_context_the_end_is_shown():
    config = dataclasses.replace(CONFIG, context_characters=12)
    prompt = prompt_for_row("first words and the last words", {}, 6, config)
    assert prompt == "<text>\n[...] last words\n</text>"
    assert "[...]" not in prompt_for_row("last words", {}, 2, config)
    assert "x" * 12 in prompt_for_row("x" * 30, {}, 2, config)


@pytest.mark.parametrize(
    ("columns", "note"),
    [
        ({"role": "user", "place": "inside"}, "stands inside a turn of the user."),
        ({"role": "tool", "place": "turn_end"}, "ends a turn of the tool."),
        ({"role": "assistant", "place": "answer_start"}, "the assistant is about to begin its turn"),
        ({"place": "span", "span_start": 40}, "the average of the model's states over the last 20 tokens"),
        ({"role": None, "place": "inside", "span_start": None}, None),
        ({"role": "", "place": "inside", "span_start": -1}, None),
    ],
)
def test_a_prompt_says_whose_turn_it_is_and_over_what_an_activation_is_averaged(columns, note):
    prompt = prompt_for_row("Hello there", columns, 60, CONFIG)
    assert prompt == "<text>\nHello there\n</text>" if note is None else note in prompt


def test_the_targets_own_next_words_are_shown_on_request():
    data = rows(["they bark at the"], next_words=[["moon", "door", "cat"]])
    shows = ChatWriter(dataclasses.replace(CONFIG, next_words=2), lambda: None).prompts(data)[0]
    assert "best first: moon, door." in shows
    assert "moon" not in ChatWriter(CONFIG, lambda: None).prompts(data)[0]
    with pytest.raises(
        ValueError, match="rows have no column next_words; extract with extraction.next_words"
    ):
        ChatWriter(dataclasses.replace(CONFIG, next_words=2), lambda: None).prompts(rows(["a"]))


def test_rows_without_contexts_and_a_config_without_a_model_are_refused():
    data = dataclasses.replace(rows(["a"]), contexts=None)
    with pytest.raises(ValueError, match="needs the context of each row, the column detokenized_text"):
        ChatWriter(CONFIG, lambda: None).prompts(data)
    with pytest.raises(ValueError, match="has no model: name one with writer.chat.chat.model"):
        ChatWriter(ChatWriterConfig(), lambda: None)
    with pytest.raises(ValueError, match="writer.chat.answer_tokens is 0, expected at least 1"):
        ChatWriterConfig(answer_tokens=0)


def test_instructions_are_built_in_or_files_of_the_users_own(tmp_path):
    assert "<explanation>" in load_instruction("activation_v1").text
    # What is published under a name never changes: runs and their sidecars name instructions.
    assert {name: load_instruction(name).digest for name in built_in_instructions()} == {
        "activation_small_v1": "f220eb26e6970a84",
        "activation_v1": "85499675672a15a0",
    }
    own = tmp_path / "mine.txt"
    own.write_text("Say what comes next.\n", encoding="utf-8")
    assert load_instruction(str(own)).text == "Say what comes next."
    own.write_text(" \n")
    with pytest.raises(ValueError, match="mine.txt is empty"):
        load_instruction(str(own))
    own.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="mine.txt is no text in UTF-8"):
        load_instruction(str(own))
    with pytest.raises(ValueError, match=r"no instruction 'other': .* built-in ones \(activation_"):
        load_instruction("other")


def test_rows_go_into_an_instruction_that_has_a_slot_for_them(tmp_path):
    own = tmp_path / "mine.txt"
    own.write_text("Read this: {row} What comes next?")
    texts, _, model = written(
        lambda prompt: Answer(GOOD.format("cats")),
        rows(["they bark"]),
        dataclasses.replace(CONFIG, instruction=str(own)),
    )
    assert model.asked == ["Read this: <text>\nthey bark\n</text> What comes next?"]
    assert model.options[0][0] == "" and texts[0].endswith("cats.")
