"""A run notices when its corpus changes under it: while data are made, and when it goes on with them."""

import dataclasses
import errno
import json
import os
import re
import shutil

import numpy as np
import pytest
import yaml

from nla_jax.config import CorpusConfig, ExperimentConfig, ModelConfig
from nla_jax.data.corpora import document_store, packages
from nla_jax.data.corpora.corpus import load_corpus
from nla_jax.data.corpora.documents import documents_digest
from nla_jax.data.dataset import load_dataset
from nla_jax.data.extraction import ExtractionConfig
from nla_jax.pipeline import documents
from nla_jax.pipeline.digests import corpus_digest, stage_digest
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.stages import run_stages

STAGES = ("extract", "explain")


def write_texts(path, word="words", count=24):
    rows = (
        {"id": f"doc-{i}", "text": f"Text {i} says that {i * 7} {word} follow, and more after. " * 2}
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_of(directory, model, source):
    config = ExperimentConfig(
        "small",
        model=ModelConfig(model, layer=1),
        corpus=CorpusConfig(str(source), av_sft=0.25, ar_sft=0.25, rl=0.25, held_out=0.25),
        extraction=ExtractionConfig(
            max_tokens=24, min_position=5, positions_per_document=2, next_words=2, shard_documents=8
        ),
    )
    return Run(config, directory)


@pytest.fixture
def finished(tiny_lm, tmp_path):
    """A run that has made its data of the folder texts/ beside it."""
    (tmp_path / "texts").mkdir()
    write_texts(tmp_path / "texts" / "a.jsonl")
    run = run_of(tmp_path / "run", tiny_lm.name, tmp_path / "texts")
    run_stages(run, STAGES)
    return run


def _change(path, **fields):
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **fields}))


def _forbid_reading(monkeypatch):
    def corpus_documents(*args, **kwargs):
        raise AssertionError("the corpus was read")

    monkeypatch.setattr(documents, "corpus_documents", corpus_documents)


def test_data_say_which_documents_they_are_of(finished):
    rows = load_corpus(finished.config.corpus.source)
    record = documents.read_record(finished.directory)
    assert (record.documents, record.digest) == (24, documents_digest(rows))
    for split in ("base", "av_sft", "held_out"):
        extraction = load_dataset(finished.directory / "data" / split).sidecar.extraction
        assert (extraction.corpus_documents, extraction.corpus_digest) == (24, record.digest)


def test_a_finished_run_reads_its_corpus_only_where_a_file_looks_changed(finished, monkeypatch):
    file = finished.directory.parent / "texts" / "a.jsonl"
    os.utime(file, ns=(1, 1))
    run_stages(finished, STAGES)  # It is read, found equal, and its new time is noted.
    _forbid_reading(monkeypatch)
    run_stages(finished, STAGES)
    os.utime(file, ns=(2, 2))
    with pytest.raises(AssertionError, match="the corpus was read"):
        run_stages(finished, STAGES)


def test_a_finished_run_of_an_edited_file_is_refused(finished):
    texts = finished.directory.parent / "texts"
    write_texts(texts / "a.jsonl", word="others")
    write_texts(texts / "b.jsonl", count=1)
    with pytest.raises(
        ValueError,
        match=r"texts has changed since .*run was made \(a.jsonl has changed, b.jsonl is new\). Bring the old files "
        r"back, .* rename the new ones. The digest .* was \w{16} and is now none, since .*two different texts",
    ):
        run_stages(finished, STAGES)
    (texts / "b.jsonl").unlink()
    with pytest.raises(ValueError, match=r"\(a.jsonl has changed\).* was \w{16} and is now \w{16}$"):
        run_stages(finished, STAGES)
    texts.rename(texts.with_name("kept"))
    run_stages(finished, STAGES)  # What is gone cannot be mistaken for what the data are of.


def test_data_made_before_there_were_digests_still_open(finished):
    (finished.directory / "data" / "corpus.json").unlink()
    write_texts(finished.directory.parent / "texts" / "a.jsonl", word="others")
    run_stages(finished, STAGES)


def _stop_in_extraction(run, *, stored):
    """Leave the run as if it had been killed after the first of its three shards.

    Args:
      run: a finished run.
      stored: whether it stored its documents; earlier versions did not.
    """
    if not stored:
        shutil.rmtree(run.directory / "data" / "documents")
        path = run.directory / "data" / "corpus.json"
        record = json.loads(path.read_text())
        path.write_text(
            json.dumps({name: record[name] for name in ("corpus", "documents", "digest", "state")})
        )
    for folder in run.split_folders().values():
        shutil.rmtree(folder)
    for number in (1, 2):
        for path in (run.directory / "data" / "base").glob(f"base-0000{number}*"):
            path.unlink()


def test_an_extraction_does_not_mix_two_corpora(finished):
    _stop_in_extraction(finished, stored=False)
    write_texts(finished.directory.parent / "texts" / "a.jsonl", word="others")
    base = finished.directory / "data" / "base"
    with pytest.raises(
        ValueError,
        match=r"base holds activations of other documents: their digest is \w{16}, and the corpus .*texts now gives 24 "
        r"documents with the digest \w{16}. Bring .* or delete .*base to extract again",
    ):
        run_stages(finished, STAGES)
    assert len(list(base.glob("*.parquet"))) == 1
    shutil.rmtree(base)
    run_stages(finished, STAGES)
    texts = " ".join(load_dataset(base).contexts)
    assert "others" in texts and "words" not in texts


def test_an_extraction_goes_on_with_its_own_documents_and_with_shards_without_a_digest(finished):
    _stop_in_extraction(finished, stored=False)
    sidecar = finished.directory / "data" / "base" / "base-00000.parquet.nla_meta.yaml"
    extraction = yaml.safe_load(sidecar.read_text())["extraction"]
    _change(sidecar, extraction={k: v for k, v in extraction.items() if not k.startswith("corpus_d")})
    before = sidecar.stat().st_mtime_ns
    run_stages(finished, STAGES)
    assert sidecar.stat().st_mtime_ns == before
    assert len(set(load_dataset(finished.directory / "data" / "base").doc_ids)) == 24


def test_another_field_is_another_corpus(finished):
    config = finished.config
    other = dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, field="content"))
    assert stage_digest(other, "extract") != stage_digest(config, "extract")
    with pytest.raises(ValueError, match="written with another config"):
        run_stages(Run(other, finished.directory), STAGES)


def test_other_versions_of_the_built_in_corpus_are_a_warning(finished, monkeypatch, capsys):
    path = finished.directory / "data" / "corpus.json"
    now = documents.corpus_state("docstrings")
    monkeypatch.setattr(documents, "corpus_state", lambda source: now)
    state = {**now, "numpy": "1.0"}
    path.write_text(
        json.dumps(
            {
                **json.loads(path.read_text()),
                "corpus": "docstrings",
                "sources": {"docstrings": 24},
                "state": state,
            }
        )
    )
    _forbid_reading(monkeypatch)
    capsys.readouterr()
    run_stages(finished, STAGES)
    (line,) = capsys.readouterr().err.splitlines()  # once, however many stages are asked for
    assert re.search(
        r"the built-in corpus has changed .* \(numpy 1.0 is now .*\); the run goes .* 24 documents", line
    )


def test_a_mixture_of_built_in_corpora_is_told_by_its_sources(finished, monkeypatch, capsys):
    path = finished.directory / "data" / "corpus.json"
    monkeypatch.setattr(documents, "corpus_state", lambda source: {"numpy": "2.0"})
    record = {"corpus": "0.5 docstrings + 0.5 packages", "state": {"numpy": "1.0"}}
    sources = {"docstrings": 12, "packages": 12}
    path.write_text(json.dumps({**json.loads(path.read_text()), **record, "sources": sources}))
    _forbid_reading(monkeypatch)
    run_stages(finished, STAGES)
    assert "the built-in corpus has changed" in capsys.readouterr().err


def test_a_source_that_is_not_installed_ends_a_run_before_anything_is_written(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(packages, "TEXT_PACKAGES", {"no-such-texts": None})
    corpus = CorpusConfig(sources=("docstrings", "requests"))
    run = Run(dataclasses.replace(finished.config, corpus=corpus), tmp_path / "other")
    with pytest.raises(ModuleNotFoundError, match="pip install no-such-texts"):
        run_stages(run)
    assert not run.directory.exists()
    # A run that has its documents needs the packages no more.
    documents.check_sources_of(Run(run.config, finished.directory))


def test_processes_that_find_other_documents_are_refused(finished, monkeypatch):
    record = documents.read_record(finished.directory)
    documents.check_processes(record)
    monkeypatch.setattr(documents, "to_host", lambda own: np.concatenate([own, own + 1]))
    with pytest.raises(
        ValueError, match=r"find other documents in .*texts \(here 24 with .* give all machines the"
    ):
        documents.check_processes(record)


def _keep_only_the_documents(run):
    """Leave the run as if it had been killed when its documents were stored."""
    for folder in (run.directory / "data").iterdir():
        if folder.is_dir() and folder.name != "documents":
            shutil.rmtree(folder)


def test_stored_documents_need_no_corpus(finished, monkeypatch):
    before = [*documents.prepare_documents(finished)]
    assert before == load_corpus(finished.config.corpus.source)
    _keep_only_the_documents(finished)
    shutil.rmtree(finished.directory.parent / "texts")
    _forbid_reading(monkeypatch)
    run_stages(finished, STAGES)
    assert [*documents.prepare_documents(finished)] == before


def test_stored_documents_of_an_edited_file_are_refused(finished):
    _keep_only_the_documents(finished)
    write_texts(finished.directory.parent / "texts" / "a.jsonl", word="others")
    with pytest.raises(ValueError, match=r"texts has changed since .* \(a.jsonl has changed\)"):
        documents.prepare_documents(finished)


def test_a_store_that_was_not_finished_and_one_of_another_choice_are_made_again(finished):
    folder = finished.directory / "data" / "documents"
    (finished.directory / "data" / "corpus.json").unlink()
    (folder / ".corpus-left").mkdir()
    (folder / "documents-00007.parquet").write_bytes(b"of a longer corpus")
    assert len(documents.prepare_documents(finished)) == 24
    assert [path.name for path in folder.iterdir()] == ["documents-00000.parquet"]
    corpus = dataclasses.replace(finished.config.corpus, max_documents=20)
    fewer = Run(dataclasses.replace(finished.config, corpus=corpus), finished.directory)
    assert [*documents.prepare_documents(fewer)] == load_corpus(corpus.source, max_documents=20)


def test_the_record_counts_sources_and_what_was_left_out(tmp_path, tiny_lm):
    write_texts(tmp_path / "a.jsonl", count=6)
    write_texts(tmp_path / "b.jsonl", word="others", count=6)
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"text": " "}\n')
    a, b = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    run = run_of(tmp_path / "run", tiny_lm.name, a)
    corpus = CorpusConfig(sources=(a, b), weights=(1.0, 2.0), max_documents=9)
    run = Run(dataclasses.replace(run.config, corpus=corpus), run.directory)
    store = documents.prepare_documents(run)
    assert store.record == documents.read_record(run.directory)
    assert store.record.sources == {a: 3, b: 6}
    assert store.record.corpus == f"0.333 {a} + 0.667 {b}"
    assert store.record.notices == {"rows without text, left out": 1}
    assert {name.removeprefix(f"{b}: ") for name in store.record.state} == {f"{a}: a.jsonl", "b.jsonl"}
    write_texts(tmp_path / "b.jsonl", count=5)
    with pytest.raises(ValueError, match=r"b.jsonl: b.jsonl has changed"):
        documents.prepare_documents(run)


def test_the_same_text_in_two_splits_is_a_warning(tmp_path, tiny_lm, capsys):
    rows = [
        {"id": f"{i}", "text": "Twice the same, " + ("and loud!" if i % 2 else "AND LOUD")} for i in range(30)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_of(tmp_path / "run", tiny_lm.name, tmp_path / "a.jsonl")
    assert len(documents.prepare_documents(run)) == 30
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r"are in two splits \(.*\d+ of .* and .*\), .* with --corpus.duplicates exact, or near", line
    )
    corpus = dataclasses.replace(run.config.corpus, duplicates="exact")
    run = Run(dataclasses.replace(run.config, corpus=corpus), tmp_path / "other")
    assert len(documents.prepare_documents(run)) == 1
    assert "splits" not in capsys.readouterr().err


def test_a_full_disk_says_what_to_do_and_leaves_no_record(tmp_path, tiny_lm, monkeypatch):
    write_texts(tmp_path / "a.jsonl")
    run = run_of(tmp_path / "run", tiny_lm.name, tmp_path / "a.jsonl")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(document_store.pq, "write_table", full)
        with pytest.raises(
            OSError, match=r"the disk became full .* with corpus.max_documents, or give .*--run-dir"
        ):
            documents.prepare_documents(run)
    assert documents.read_record(run.directory) is None
    assert len(documents.prepare_documents(run)) == 24


def test_a_run_in_a_bucket_stores_its_documents_there(tmp_path, tiny_lm, bucket):
    write_texts(tmp_path / "a.jsonl")
    run = run_of(f"{bucket}/run", tiny_lm.name, tmp_path / "a.jsonl")
    stored = [*documents.prepare_documents(run)]
    assert stored == load_corpus(str(tmp_path / "a.jsonl"))
    assert [*documents.prepare_documents(Run(run.config, run.directory))] == stored


def test_earlier_configs_keep_their_digests():
    """The digests are those of the version before corpora were streams."""
    extraction = ExtractionConfig(by_place=False)
    earlier = ExperimentConfig("x", extraction=extraction)
    assert stage_digest(earlier, "extract") == "4e591aa01ddf5257"
    corpus = CorpusConfig("a.jsonl", field="body", max_documents=7)
    earlier = ExperimentConfig("x", corpus=corpus, extraction=extraction)
    assert stage_digest(earlier, "extract") == "3ab236a515f128be"


@pytest.mark.parametrize(
    "fields",
    [
        {"duplicates": "near"},
        {"shuffle_buffer": 5},
        {"min_characters": 1},
        {"max_characters": 9},
        {"languages": ("en",)},
        {"sources": ("a", "b")},
        {"max_documents": 3},
    ],
)
def test_what_decides_the_choice_is_in_the_digests(fields):
    config, other = ExperimentConfig("x"), ExperimentConfig("x", corpus=CorpusConfig(**fields))
    assert stage_digest(config, "extract") != stage_digest(other, "extract")
    assert corpus_digest(config) != corpus_digest(other)


def test_how_documents_are_shared_out_is_no_part_of_their_choice():
    other = ExperimentConfig("x", corpus=CorpusConfig(av_sft=0.5, ar_sft=0.25))
    assert corpus_digest(ExperimentConfig("x")) == corpus_digest(other)
    assert stage_digest(ExperimentConfig("x"), "extract") != stage_digest(other, "extract")
