"""Warm starts from texts of chat models: the local back end end to end, and a model that answers by rule."""

import collections
import contextlib
import dataclasses
import json
import re
import sqlite3

import numpy as np
import pytest
from chat_server import ChatServer
from processes import ROOT
from tiny_model import write_tiny_model

from nla_jax.chat import batches
from nla_jax.chat.config import ChatConfig
from nla_jax.chat.models import CachedChat
from nla_jax.chat.replies import Answer, Reply
from nla_jax.config import load_config
from nla_jax.data.dataset import load_dataset
from nla_jax.data.writers import open as open_module
from nla_jax.data.writers.chat import ChatWriterConfig
from nla_jax.data.writers.checks import TextChecks
from nla_jax.data.writers.config import WriterConfig
from nla_jax.data.writers.instruction import load_instruction
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.explain import TEXTS
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.stages import run_stages

SUPERVISED = ("av_sft", "ar_sft", "held_out")


def config_of(model_dir, writer: ChatWriterConfig):
    config = load_config(ROOT / "configs" / "tiny.py")
    loop = dataclasses.replace(config.ar_sft.loop, steps=2, evaluate_every=2, checkpoint_every=2)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(model_dir)),
        corpus=dataclasses.replace(config.corpus, max_documents=48),
        extraction=dataclasses.replace(config.extraction, positions_per_document=2),
        writer=WriterConfig("chat", chat=writer),
        av_sft=dataclasses.replace(config.av_sft, loop=loop),
        ar_sft=dataclasses.replace(config.ar_sft, loop=loop),
    )


class Rule:
    """A back end that answers about the last word of a context: nothing about vowels, and badly about some letters."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, parameters, allowance):
        assert parameters.instruction == load_instruction("activation_v1").text
        for prompt in prompts:
            self.asked.append(prompt)
            yield [Reply(prompt, self.answer(prompt))]

    def answer(self, prompt) -> Answer:
        first = self.key(re.search(r"<text>\n(.*)\n</text>", prompt, re.DOTALL)[1])
        if first in "aeiou":
            return Answer("", "the model refused to answer")
        if first in "stp" or (first in "nm" and "An earlier description was refused." not in prompt):
            return Answer("It has no tags.")
        return Answer(
            f"<explanation>\nSomething with {first} stood last.\nMore of it is due now.\n</explanation>"
        )

    @staticmethod
    def key(context) -> str:
        return ([letter for letter in context.lower() if letter.isalpha()] or ["z"])[-1]

    def expects(self, context) -> bool:
        return self.key(context) not in "aeioustp"


def rows_of(run) -> dict[str, list]:
    return {split: load_dataset(folder) for split, folder in run.split_folders().items()}


def test_rows_that_a_model_explains_badly_or_not_at_all_are_left_out_and_counted(
    shallow_model_dir, tmp_path, monkeypatch
):
    rule = Rule()
    monkeypatch.setattr(
        open_module, "open_chat_model", lambda config, cache: CachedChat(config.model, rule, cache)
    )
    writer = ChatWriterConfig(ChatConfig("local:by_rule"), checks=TextChecks(fewest_words=5))
    run = Run(config_of(shallow_model_dir, writer), tmp_path / "run")
    run_stages(run, ["extract", "explain"])
    base = load_dataset(run.directory / "data" / "base")
    kept = collections.Counter(
        (doc, n)
        for doc, n, c in zip(base.doc_ids, base.n_raw_tokens, base.contexts, strict=True)
        if rule.expects(c)
    )
    found = rows_of(run)
    supervised = [found[split] for split in SUPERVISED]
    assert all(rule.expects(context) for data in supervised for context in data.contexts)
    of_rl = set(found["rl"].doc_ids)
    assert sum(map(len, supervised)) == sum(n for (doc, _), n in kept.items() if doc not in of_rl) > 20
    for data in supervised:
        assert all(
            text == f"Something with {rule.key(context)} stood last.\nMore of it is due now."
            for text, context in zip(data.explanations, data.contexts, strict=True)
        )
        assert data.sidecar.texts["instruction"]["digest"] == load_instruction("activation_v1").digest
    # Rows of joint training are all there, and nobody was asked about them.
    assert len(found["rl"]) == sum(doc in of_rl for doc in base.doc_ids) and found["rl"].sidecar.texts is None
    assert not any(f"<text>\n{context}\n</text>" in rule.asked for context in found["rl"].contexts)
    report = json.loads((run.directory / TEXTS).read_text())
    keys = [rule.key(c) for doc, c in zip(base.doc_ids, base.contexts, strict=True) if doc not in of_rl]
    assert report["refused"] == {
        "no answer": sum(key in "aeiou" for key in keys),
        "no tag": sum(key in "stp" for key in keys),
    }
    assert report["asked_again"] == sum(key in "stpnm" for key in keys)
    assert report["written"] + report["left_out"] == report["rows"] == len(keys)

    # Another run with the same answers asks nothing, whatever the budget.
    asked = len(rule.asked)
    assert asked == len(set(rule.asked))
    for name in ("base", "documents"):
        assert (run.directory / "data" / name).exists()
    (run.directory / "data" / "texts.json").unlink()
    for folder in run.split_folders().values():
        for file in folder.iterdir():
            file.unlink()
    richer = dataclasses.replace(writer, chat=ChatConfig("local:by_rule", concurrency=3, budget=1.0))
    again = Run(config_of(shallow_model_dir, richer), run.directory)
    assert stage_digest(again.config, "explain") == stage_digest(run.config, "explain")
    run_stages(again, ["explain"])
    assert len(rule.asked) == asked and json.loads((run.directory / TEXTS).read_text()) == report
    assert rows_of(again)["ar_sft"].explanations == found["ar_sft"].explanations


def test_message_batches_of_all_shards_are_under_way_together(shallow_model_dir, tmp_path, monkeypatch):
    text = "<explanation>\nSomething stood last.\nMore of it is due now.\n</explanation>"
    server = ChatServer(lambda prompt: text)
    sent_before_an_answer = []
    results = server.results
    monkeypatch.setattr(
        server, "results", lambda name: sent_before_an_answer.append(len(server.batches)) or results(name)
    )
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key")
    monkeypatch.setattr(batches, "FIRST_POLL", 0.01)
    writer = ChatWriterConfig(ChatConfig("anthropic:m", batch=True), checks=TextChecks(fewest_words=5))
    config = config_of(shallow_model_dir, writer)
    extraction = dataclasses.replace(config.extraction, shard_documents=16)
    run = Run(dataclasses.replace(config, extraction=extraction), tmp_path / "run")
    run_stages(run, ["extract", "explain"])
    server.close()
    shards = len(list((run.directory / "data" / "base").glob("*.parquet")))
    assert shards == 3 and sent_before_an_answer == [shards] * shards and server.asked == []
    assert json.loads((run.directory / TEXTS).read_text())["left_out"] == 0


def test_warm_starts_from_texts_of_a_local_language_model(shallow_model_dir, tmp_path):
    # What a model without training writes passes no check; here whatever has words does. Tied to its embedding, it
    # would repeat one token.
    writing_model = write_tiny_model(tmp_path / "writer", num_layers=2, tie=False)
    lenient = TextChecks(
        needs_tag=False, fewest_statements=1, most_statements=99, fewest_words=1, copied_words=99
    )
    writer = ChatWriterConfig(
        ChatConfig(f"local:{writing_model}"),
        "activation_small_v1",
        context_characters=60,
        answer_tokens=10,
        temperature=1.0,
        checks=lenient,
    )
    run = Run(config_of(shallow_model_dir, writer), tmp_path / "run")
    run_stages(run, ["extract", "explain", "av_sft", "ar_sft"])
    with contextlib.closing(sqlite3.connect(run.directory / "data" / "answers.sqlite")) as db:
        answers = {answer.strip() for (answer,) in db.execute("select answer from answers")}
    found, report = rows_of(run), json.loads((run.directory / TEXTS).read_text())
    texts = [text for split in SUPERVISED for text in found[split].explanations]
    squeezed = {re.sub(r"\W+", "", answer) for answer in answers}
    assert len(texts) == report["written"] > 20 and report["left_out"] == sum(report["refused"].values())
    assert len(set(texts)) > len(texts) / 2
    assert all(re.sub(r"\W+", "", text) in squeezed for text in texts)
    metrics = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    last = {row["stage"]: row for row in metrics if row["step"] == 2}
    assert np.isfinite([last["av_sft"]["gap"], last["ar_sft"]["held_out_fve_nrm"]]).all()


@pytest.mark.parametrize("change", [{"concurrency": 1}, {"budget": 2.0}, {"prices": "p.json"}])
def test_what_decides_no_text_is_not_in_the_digest(tmp_path, change):
    before = config_of("m", ChatWriterConfig(ChatConfig("local:m")))
    after = config_of("m", ChatWriterConfig(ChatConfig("local:m", **change)))
    assert stage_digest(before, "explain") == stage_digest(after, "explain")


def test_what_decides_a_text_is_in_the_digest_and_other_writers_options_are_not():
    chat = ChatWriterConfig(ChatConfig("local:m"))
    config = config_of("m", chat)
    digest = stage_digest(config, "explain")
    for change in (
        {"chat": ChatConfig("local:n")},
        {"instruction": "activation_small_v1"},
        {"checks": TextChecks(most_words=50)},
        {"temperature": 0.5},
    ):
        assert stage_digest(config_of("m", dataclasses.replace(chat, **change)), "explain") != digest
    predictive = dataclasses.replace(config.writer.predictive, next_words=1)
    others = dataclasses.replace(config.writer, predictive=predictive, options='{"a": 1}')
    assert stage_digest(dataclasses.replace(config, writer=others), "explain") == digest
    assert stage_digest(config, "extract") == stage_digest(
        dataclasses.replace(config, writer=WriterConfig()), "extract"
    )
