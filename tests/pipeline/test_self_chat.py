"""Chats that the target LM writes: what a run makes of prompts, wherever it is stopped."""

import dataclasses
import json
import shutil

import pytest
from tiny_model import write_tiny_model

from nla_jax.chat.local import LocalLM
from nla_jax.config import ExperimentConfig, ModelConfig
from nla_jax.data.corpora.config import CorpusConfig
from nla_jax.data.corpora.self_prompts import SelfChatConfig
from nla_jax.data.dataset import load_dataset
from nla_jax.data.extraction import ExtractionConfig
from nla_jax.pipeline import self_chat as module
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.self_chat import FOLDER, self_documents
from nla_jax.pipeline.stages import run_stages

PROMPTS = [
    {"system": "Count.", "turns": ["What are lists?", "Why?"]},
    "Return one argument",
    {"turns": ["Name a string"]},
    {"turns": ["Say more words", "Go on", "Further"]},
    "Is this a class?",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a random model that writes on, and a file of prompts."""
    folder = tmp_path_factory.mktemp("self_chat")
    write_tiny_model(folder / "model", seed=2, num_layers=2)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return folder


def run_of(folder, directory, **settings):
    settings = {"turns": 3, "max_tokens": 6, "temperature": 1.0, "batch_size": 2} | settings
    source = f"self:{folder / 'prompts.jsonl'}"
    corpus = CorpusConfig(source, self_chat=SelfChatConfig(**settings))
    return Run(
        ExperimentConfig("x", model=ModelConfig(str(folder / "model"), layer=1), corpus=corpus), directory
    )


def documents_of(run):
    return list(self_documents(run, run.config.corpus.source))


@pytest.fixture(scope="module")
def written(folder):
    """The documents of an undisturbed run, and its directory."""
    run = run_of(folder, folder / "run")
    return documents_of(run), run.directory


@pytest.fixture
def answers(monkeypatch):
    """Answers that the model gives in the place of its own, by the number of the call: lists of texts and endings."""
    calls = []

    class Writer(LocalLM):
        def write(self, prompts, **_):
            return [*calls.pop(0), *[("filled up", True)] * len(prompts)][: len(prompts)]

    monkeypatch.setattr(module, "_writer", lambda run: Writer(run.models.lm, run.models.lm_config))
    return calls


def test_chats_hold_the_turns_as_they_were_given_and_answers_of_the_model(written):
    documents, _ = written
    said = {
        turn for prompt in PROMPTS for turn in (prompt["turns"] if isinstance(prompt, dict) else [prompt])
    }
    assert documents and len({document.id for document in documents}) == len(documents)
    for document in documents:
        roles = [message["role"] for message in document.messages]
        assert roles in (["system", "user", "assistant"], ["user", "assistant"])  # All answers are cut.
        assert {m["content"] for m in document.messages if m["role"] == "user"} <= said
        assert document.text.splitlines()[0].partition(": ")[0] == roles[0]
    assert len({document.messages[-1]["content"] for document in documents}) == len(documents)


def test_a_run_that_was_killed_writes_the_same_chats(folder, tmp_path, written):
    documents, directory = written
    (blocks,) = (directory / FOLDER).iterdir()
    shutil.copytree(directory / FOLDER, tmp_path / FOLDER)
    (tmp_path / FOLDER / blocks.name / "00001.jsonl").unlink()
    assert documents_of(run_of(folder, tmp_path)) == documents
    # What is there is read: nothing is written anew.
    first = tmp_path / FOLDER / blocks.name / "00000.jsonl"
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    rows[0]["messages"][-1]["content"] = "from disk"
    first.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert documents_of(run_of(folder, tmp_path))[0].messages[-1]["content"] == "from disk"


def test_what_is_written_does_not_depend_on_how_many_chats_are_written_at_a_time(folder, tmp_path, written):
    documents, _ = written
    assert documents_of(run_of(folder, tmp_path, batch_size=4)) == documents


def test_another_seed_or_temperature_is_other_chats_in_a_folder_of_their_own(folder, tmp_path, written):
    documents, _ = written
    run = run_of(folder, tmp_path, batch_size=4)
    other = Run(dataclasses.replace(run.config, seed=1), tmp_path)
    first = {document.id: document for document in documents}
    for document in documents_of(other):
        assert document.messages != first[document.id].messages
    assert stage_digest(run.config, "extract") != stage_digest(
        run_of(folder, tmp_path, temperature=0.5).config, "extract"
    )


def test_digests_of_other_corpora_know_nothing_of_chats(folder, tmp_path):
    config = ExperimentConfig("x")
    corpus = dataclasses.replace(config.corpus, self_chat=SelfChatConfig(max_tokens=3))
    assert stage_digest(config, "extract") == stage_digest(
        dataclasses.replace(config, corpus=corpus), "extract"
    )


def test_chats_end_where_an_answer_is_of_no_use_and_the_reasons_are_counted(
    folder, tmp_path, answers, capsys
):
    run = run_of(folder, tmp_path, batch_size=8)
    repeated = "one two three four five " * 8
    order = [
        prompt.turns[0]
        for prompt in module.self_prompts(run.config.corpus.source, run.config.corpus.self_chat, 0)
    ]
    first = {
        "What are lists?": ("They are.", True),
        "Return one argument": ("", True),
        "Name a string": ("A string that was c", False),
        "Say more words": ("More words.", True),
        "Is this a class?": (repeated, True),
    }
    answers += [
        [first[turn] for turn in order],
        [("Because.", True), ("I go on.", True)],
        [(repeated, False)],
    ]
    documents = {document.messages[-2]["content"]: document for document in documents_of(run)}
    assert set(documents) == {"Why?", "Name a string", "Go on"}
    assert [message["role"] for message in documents["Go on"].messages] == ["user", "assistant"] * 2
    told = capsys.readouterr().err
    assert "warning: self:" in told and "of 5 chats some ended early" in told
    for counted in (
        "empty answers: 1",
        "repeat themselves: 2",
        "were cut: 1",
        "without any answer, left out: 2",
    ):
        assert counted in told


def test_a_chat_that_fills_the_context_ends_before_the_turn(folder, tmp_path, answers):
    run = run_of(folder, tmp_path, batch_size=8, max_tokens=440)
    prompts = module.self_prompts(run.config.corpus.source, run.config.corpus.self_chat, 0)
    answers += [[("word " + str(i) + " of these", True) for i in range(8)]] * 3
    rows = module._write_block(module._writer(run), prompts, run.config.corpus.self_chat, 0)
    ended = [row for row in rows if row["problem"] == "turns for which the context is too short"]
    assert ended and all(row["messages"][-1]["role"] != "user" for row in ended)


def test_a_system_prompt_that_the_template_refuses_opens_the_first_turn(folder, tmp_path, answers):
    run = run_of(folder, tmp_path)
    writer = module._writer(run)
    prompt = module.ChatPrompt("Count.", ("Go",))
    assert [message["role"] for message in module._opening(writer, prompt)] == ["system", "user"]
    run.models.lm.tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ message.content }}{% endfor %}"
    )
    assert module._opening(module._writer(run), prompt) == [{"role": "user", "content": "Count.\n\nGo"}]


def test_a_model_without_a_chat_template_is_refused(folder, tmp_path):
    run = run_of(folder, tmp_path)
    run.models.target.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template.*corpus\.self_chat\.model"):
        documents_of(run)


def test_activations_are_read_of_the_chats_that_the_target_wrote(folder, tmp_path):
    run = run_of(folder, tmp_path, batch_size=64, documents=64, max_tokens=8, languages=("english",))
    shares = {"av_sft": 0.25, "ar_sft": 0.25, "rl": 0.25, "held_out": 0.25}
    config = dataclasses.replace(
        run.config,
        corpus=dataclasses.replace(run.config.corpus, source="self:builtin", **shares),
        extraction=ExtractionConfig(max_tokens=96, min_position=5, positions_per_document=2, next_words=0),
    )
    run = Run(config, tmp_path)
    run_stages(run, ("extract",))
    rows = load_dataset(tmp_path / "data" / "base")
    chats = documents_of(run)
    assert set(rows.doc_ids) == {chat.id for chat in chats} and len(rows) == 2 * len(chats)
    assert {"user", "assistant"} <= set(rows.extra["role"])
