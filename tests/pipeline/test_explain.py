"""The stage that has texts written, on activations that nobody extracted."""

import json
import os
import random

import numpy as np
import pytest

from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.config import CorpusConfig, ExperimentConfig, ModelConfig
from nla_jax.data.dataset import load_dataset, write_shard
from nla_jax.data.manifest import Manifest, verify_dataset
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.data.splits import split_of
from nla_jax.data.writers.reports import Tally
from nla_jax.pipeline import explain as stage
from nla_jax.pipeline.explain import data_is_written, explain
from nla_jax.pipeline.run import Run

SHARDS, DOCUMENTS, WIDTH = 4, 12, 32
CORPUS = CorpusConfig(av_sft=0.25, ar_sft=0.25, rl=0.25, held_out=0.25)


def write_base(run: Run) -> None:
    """Shards of twelve documents of two rows each, and one without rows."""
    draw = np.random.default_rng(0)
    for number in range(SHARDS + 1):
        documents = DOCUMENTS if number < SHARDS else 0
        docs = [f"doc-{number}-{i // 2}" for i in range(2 * documents)]
        columns = {
            "activation_vector": draw.standard_normal((len(docs), WIDTH)).astype(np.float32),
            "n_raw_tokens": [60 + i % 2 for i in range(len(docs))],
            "activation_layer": [1] * len(docs),
            "doc_id": docs,
            "detokenized_text_truncated": [f"Words about {doc} row {i}" for i, doc in enumerate(docs)],
            "genre": ["news"] * len(docs),
            "next_words": [["and", "then"]] * len(docs),
        }
        path = run.directory / "data" / "base" / f"base-{number:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        extraction = Extraction(run.config.model.path, WIDTH, 1, "texts", CorpusSlice(0, documents), 2)
        write_shard(path, columns, Sidecar("base", "base", len(docs), extraction))


@pytest.fixture
def run_of(tiny_lm, tmp_path):
    def make(name: str) -> Run:
        config = ExperimentConfig("small", model=ModelConfig(tiny_lm.name, layer=1), corpus=CORPUS)
        run = Run(config, tmp_path / name)
        write_base(run)
        return run

    return make


def contents(run: Run) -> dict:
    """The digests of all bytes of the splits, what is told of their texts, and the yardstick."""
    manifests = {split: Manifest.load(folder) for split, folder in run.split_folders().items()}
    told = json.loads((run.directory / "data" / "texts.json").read_text())
    yardstick = Yardstick.load(run.directory / "data")
    mean_D = yardstick.mean_D.tobytes(), yardstick.normalized_mean_D.tobytes()
    numbers = yardstick.spread, yardstick.norm_p75, yardstick.count
    return {**manifests, "texts": told, "means": mean_D, "numbers": numbers}


class Picky:
    """A writer that has no text for the second row of every third document, and notes what it is asked."""

    def __init__(self):
        self.tally, self.asked = Tally(), []

    def explain(self, rows):
        self.asked.append(len(rows))
        texts = [
            None if n == 61 and int(doc.rsplit("-", 1)[1]) % 3 == 0 else f"It is {doc} at {n}."
            for doc, n in zip(rows.doc_ids, rows.n_raw_tokens.tolist(), strict=True)
        ]
        self.tally.refused["too long"] += texts.count(None)
        self.tally.count(texts)
        return texts

    def prompts(self, rows):
        return None

    def about(self):
        return {"writer": "picky"}

    def report(self):
        return self.tally.report(**self.about())


def test_rows_without_a_text_are_left_out_where_texts_are_needed(run_of, monkeypatch):
    run, writer = run_of("run"), Picky()
    monkeypatch.setattr(stage, "open_writer", lambda *_, **__: writer)
    assert not data_is_written(run)
    explain(run)
    assert data_is_written(run)
    base = load_dataset(run.directory / "data" / "base")
    split_of_row = [split_of(doc, CORPUS.fractions, run.config.seed) for doc in base.doc_ids]
    told = json.loads((run.directory / "data" / "texts.json").read_text())
    # Nothing is asked about rows of joint training.
    assert told["writer"] == "picky" and sum(writer.asked) == told["rows"]
    assert told["rows"] == len(base) - split_of_row.count("rl") == told["written"] + told["left_out"]
    assert told["refused"] == {"too long": told["left_out"]}
    for split in run.split_folders():
        data = load_dataset(run.directory / "data" / split)
        places = list(zip(data.doc_ids, data.n_raw_tokens.tolist(), strict=True))
        rows = [
            row
            for row, doc in enumerate(base.doc_ids)
            if split_of_row[row] == split
            and (split == "rl" or not (base.n_raw_tokens[row] == 61 and int(doc.rsplit("-", 1)[1]) % 3 == 0))
        ]
        assert places == [(base.doc_ids[row], base.n_raw_tokens[row]) for row in rows]
        np.testing.assert_array_equal(data.activations, base.activations[rows])
        assert told["rows_of_splits"][split] == len(rows) > 0
        assert data.sidecar.texts == (None if split == "rl" else {"writer": "picky"})
        if split != "rl":
            assert data.explanations == [f"It is {doc} at {n}." for doc, n in places]
        assert verify_dataset(run.directory / "data" / split) == SHARDS + 1
    assert not (run.directory / "data" / "texts").exists()


class Killed(BaseException):
    """The process is killed here."""


def test_ten_kills_while_texts_are_written_change_nothing(run_of, monkeypatch):
    alone, run = run_of("alone"), run_of("killed")
    explain(alone)
    replace, draw = os.replace, random.Random(0)
    kills = 0
    while not data_is_written(run):
        left = draw.randrange(12) if kills < 10 else 10**6

        def until_killed(source, target):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", until_killed)
            try:
                explain(run)
            except Killed:
                kills += 1
    assert kills == 10
    assert contents(run) == contents(alone)


def test_a_shard_is_explained_once_unless_its_activations_change(run_of, monkeypatch):
    run, writer = run_of("run"), Picky()
    monkeypatch.setattr(stage, "open_writer", lambda *_, **__: writer)
    monkeypatch.setattr(stage, "check_documents", lambda counts: (_ for _ in ()).throw(ValueError("too few")))
    with pytest.raises(ValueError, match="too few"):
        explain(run)
    write_base(run)  # The same bytes.
    with pytest.raises(ValueError, match="too few"):
        explain(run)
    assert len(writer.asked) == SHARDS and not data_is_written(run)
    base = run.directory / "data" / "base" / "base-00001.parquet"
    changed = load_dataset(base)
    write_shard(base, stage.base_columns(changed) | {"genre": ["law"] * len(changed)}, changed.sidecar)
    with pytest.raises(ValueError, match="too few"):
        explain(run)
    assert len(writer.asked) == SHARDS + 1


def test_texts_for_too_few_documents_are_an_error_that_loses_nothing(run_of, monkeypatch):
    run, writer = run_of("run"), Picky()
    monkeypatch.setattr(Picky, "explain", lambda self, rows: [None] * len(rows))
    monkeypatch.setattr(stage, "open_writer", lambda *_, **__: writer)
    with pytest.raises(
        ValueError, match="av_sft has 0, ar_sft has 0, held_out has 0, and every split needs 2"
    ):
        explain(run)
    assert not data_is_written(run) and len(load_dataset(run.directory / "data" / "rl"))


def test_a_writer_that_has_changed_is_refused_before_it_writes(run_of, monkeypatch):
    run = run_of("run")
    written = []

    class Versioned:
        def __init__(self, version, lasts=100):
            self.version, self.lasts, self.tally = version, lasts, Tally()

        def explain(self, rows):
            if not self.lasts:
                raise KeyboardInterrupt
            self.lasts -= 1
            written.append(self.version)
            texts = [f"Version {self.version}."] * len(rows)
            self.tally.count(texts)
            return texts

        def prompts(self, rows):
            return None

        def about(self):
            return {"writer": "versioned", "instruction": {"digest": self.version}}

        def report(self):
            return self.tally.report(**self.about())

    monkeypatch.setattr(stage, "open_writer", lambda *_, **__: Versioned("a", lasts=2))
    with pytest.raises(KeyboardInterrupt):
        explain(run)
    monkeypatch.setattr(stage, "open_writer", lambda *_, **__: Versioned("b"))
    with pytest.raises(
        ValueError, match=r"written in another way \(instruction: \{'digest': 'a'\} then, .*'b'"
    ):
        explain(run)
    monkeypatch.setattr(stage, "open_writer", lambda *_, **__: Versioned("a"))
    explain(run)
    assert set(written) == {"a"} and data_is_written(run)
