import dataclasses
import errno
import json
import os
import random
import shutil

import numpy as np
import pytest
import yaml

from nla_jax.config import CorpusConfig, ExperimentConfig, ModelConfig
from nla_jax.data.corpora.documents import documents_digest
from nla_jax.data.dataset import base_columns, load_dataset, write_shard
from nla_jax.data.extraction import ExtractionConfig, columns_of, read_rows
from nla_jax.data.positions import Tally, choose_positions
from nla_jax.pipeline import extract as stage
from nla_jax.pipeline.documents import prepare_documents
from nla_jax.pipeline.extract import extract
from nla_jax.pipeline.run import Run

EXTRACTION = ExtractionConfig(
    max_tokens=48,
    min_position=5,
    positions_per_document=3,
    next_words=2,
    batch_size=4,
    length_buckets=2,
    shard_documents=8,
)
CORPUS = CorpusConfig(av_sft=0.25, ar_sft=0.25, rl=0.25, held_out=0.25)


def plain_row(i):
    return {
        "id": f"doc-{i}",
        "text": f"Text {i} says that {i * 7} words follow. And more after. " * (1 + i % 3),
    }


def chat_row(i):
    turns = [("system", "Be."), ("user", f"What is {i}?"), ("assistant", "A number, as you know.")]
    return {"id": f"chat-{i}", "messages": [{"role": role, "content": content} for role, content in turns]}


def write_corpus(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def corpus(tmp_path):
    """24 texts of three lengths, four chats, and ten texts that are too short for any position."""
    rows = [plain_row(i) for i in range(24)] + [chat_row(i) for i in range(4)]
    return write_corpus(
        tmp_path / "texts.jsonl", [*rows, *({"id": f"s{i}", "text": f"{i}"} for i in range(10))]
    )


@pytest.fixture
def run_of(tiny_lm, tmp_path, corpus):
    """Runs in directories of their own on the same texts, with changes of their extraction and of their layer."""

    def make(name, layer=1, source=None, **changes):
        config = ExperimentConfig(
            "small",
            model=ModelConfig(tiny_lm.name, layer=layer),
            corpus=dataclasses.replace(CORPUS, source=str(source or corpus)),
            extraction=dataclasses.replace(EXTRACTION, **changes),
        )
        return Run(config, tmp_path / name)

    return make


def digests(run, name="base"):
    """What the manifest says of the shards: their rows, and digests of all their bytes."""
    return json.loads((run.directory / "data" / name / "manifest.json").read_text())


def test_shards_hold_fixed_ranges_of_documents_and_together_all_rows(run_of, capsys):
    run = run_of("run")
    extract(run)
    said = capsys.readouterr().err
    assert "10 of 38 documents have no token from position 5 on" in said
    places = load_dataset(run.directory / "data" / "base").extra["place"]
    assert f"extracted {len(places)} rows by place: " in said
    assert f"answer_start {places.count('answer_start') / len(places):.1%}" in said
    store = prepare_documents(run)
    assert store.record.digest == documents_digest(store.read(0, 38))
    folder, seen = run.directory / "data" / "base", []
    for number in range(5):
        shard = load_dataset(folder / f"base-{number:05d}.parquet")
        ids = [document.id for document in store.read(8 * number, min(8 * number + 8, 38))]
        assert list(dict.fromkeys(shard.doc_ids)) == [i for i in ids if not i.startswith("s")]
        slice_ = shard.sidecar.extraction.corpus_slice
        assert (slice_.start, slice_.length) == (8 * number, len(ids))
        seen += shard.doc_ids
    together = load_dataset(folder)
    assert together.doc_ids == seen and digests(run)["rows"] == len(seen)
    # The same as all documents read at once, in one batch without buckets.
    models = run.models
    config = dataclasses.replace(EXTRACTION, batch_size=38, length_buckets=1)
    contexts = choose_positions(store.read(0, 38), models.lm.tokenizer, config, 0, Tally())
    rows = read_rows(contexts, models.target.params, models.lm_config, (1,), config, run.mesh)
    columns = columns_of(contexts, rows, 1, models.lm.tokenizer, config)
    np.testing.assert_allclose(together.activations, columns["activation_vector"], rtol=1e-4, atol=1e-5)
    assert together.contexts == columns["detokenized_text_truncated"]
    chances = [np.array(of) for of in (together.extra["next_probabilities"], columns["next_probabilities"])]
    np.testing.assert_allclose(*chances, rtol=1e-3)
    for name in ("next_words", "last_token_ids", "true_continuation", "place", "role", "turn", "genre"):
        assert together.extra[name] == columns[name]
    assert {*together.extra["role"]} == {None, "system", "user", "assistant"}


def test_a_shard_without_rows_is_written_and_read(run_of, tmp_path):
    rows = [{"id": f"s{i}", "text": f"{i}"} for i in range(40)] + [plain_row(i) for i in range(24)]
    run = run_of("run", source=write_corpus(tmp_path / "short.jsonl", rows), shard_documents=2)
    extract(run)
    counts = [shard["rows"] for shard in digests(run)["shards"]]
    assert (
        len(counts) == 32
        and 0 in counts
        and sum(counts) == 72 == len(load_dataset(run.directory / "data/base"))
    )


def test_shards_of_an_earlier_version_are_not_mixed_with_others(run_of):
    run = run_of("run")
    extract(run)
    folder = run.directory / "data" / "base"
    first, last = folder / "base-00000.parquet", folder / "base-00004.parquet"
    data = load_dataset(first)
    del data.extra["last_token_ids"], data.extra["next_probabilities"]
    write_shard(first, base_columns(data), data.sidecar)
    extract(run)  # nothing is missing
    last.unlink()
    with pytest.raises(
        ValueError, match=r"base-00000.parquet was written by an earlier version, .*; delete .*base to"
    ):
        extract(run)


@pytest.mark.parametrize("written", [1, 4])
def test_a_killed_extraction_goes_on_and_ends_with_the_same_bytes(run_of, monkeypatch, written):
    alone, killed = run_of("alone", layers=(2,)), run_of("killed", layers=(2,))
    extract(alone)
    write, calls = stage.write_shard, []

    def write_shard(path, columns, sidecar):
        calls.append(path.name)
        if len(calls) > written:
            path.write_bytes(b"half of a shard")  # without its sidecar it counts for nothing
            raise KeyboardInterrupt
        write(path, columns, sidecar)

    monkeypatch.setattr(stage, "write_shard", write_shard)
    with pytest.raises(KeyboardInterrupt):
        extract(killed)
    monkeypatch.setattr(stage, "write_shard", lambda *given: calls.append("again") or write(*given))
    calls.clear()
    extract(killed)
    # A shard counts once it is there for all layers.
    assert calls.count("again") == 10 - written // 2 * 2
    assert digests(killed) == digests(alone) and digests(killed, "base_2") == digests(alone, "base_2")
    calls.clear()
    extract(killed)
    assert calls == []


class Killed(BaseException):
    """The process is killed here."""


def test_ten_kills_change_no_byte(run_of, monkeypatch):
    alone, run = run_of("alone", shard_documents=4), run_of("killed", shard_documents=4)
    extract(alone)
    prepare_documents(run)
    replace, draw, kills, finished = os.replace, random.Random(0), 0, False
    while not finished:
        left = draw.randrange(4) if kills < 10 else 10**6

        def until_killed(source, target):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", until_killed)
            try:
                extract(run)
                finished = True
            except Killed:
                kills += 1
    assert kills == 10
    assert digests(run) == digests(alone)


def test_a_full_disk_is_told_and_finished_shards_stay(run_of, monkeypatch):
    run, write = run_of("run"), stage.write_shard

    def write_shard(path, columns, sidecar):
        if path.name == "base-00002.parquet":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, columns, sidecar)

    monkeypatch.setattr(stage, "write_shard", write_shard)
    with pytest.raises(
        OSError, match=r"base-00002.parquet could not be written \(.*No space left.*make room"
    ):
        extract(run)
    folder = run.directory / "data" / "base"
    assert sorted(p.name for p in folder.glob("*.parquet")) == ["base-00000.parquet", "base-00001.parquet"]
    assert not (folder / "manifest.json").exists()
    monkeypatch.undo()
    extract(run)
    other = run_of("other")
    extract(other)
    assert digests(run) == digests(other)


def test_several_layers_are_read_at_once_and_another_run_takes_its_own(run_of, monkeypatch):
    run, single = run_of("run", layers=(3, 1, 0)), run_of("single", layer=3)
    extract(run)
    extract(single)
    read = {name: load_dataset(run.directory / "data" / name) for name in ("base", "base_3", "base_0")}
    assert [data.sidecar.extraction.layer_index for data in read.values()] == [1, 3, 0]
    own = load_dataset(single.directory / "data" / "base")
    np.testing.assert_allclose(read["base_3"].activations, own.activations, rtol=1e-5, atol=1e-6)
    assert read["base_3"].extra == own.extra and read["base_3"].contexts == own.contexts
    assert read["base_3"].sidecar.dataset_id == own.sidecar.dataset_id
    monkeypatch.setattr(stage, "read_rows", None)
    taker = run_of("taker", layer=3, copy_from=str(run.directory / "data" / "base_3"))
    extract(taker)
    assert digests(taker) == digests(run, "base_3")


def test_activations_of_another_run_are_refused_where_they_do_not_fit(run_of, tmp_path):
    run = run_of("run")
    extract(run)
    base = str(run.directory / "data" / "base")
    with pytest.raises(
        ValueError, match=r"does not fit this run: it holds layer 1 .* this run reads layer 2"
    ):
        extract(run_of("other", layer=2, copy_from=base))
    with pytest.raises(ValueError, match="does not fit this run: .* not in seed, corpus or extraction"):
        extract(run_of("more", positions_per_document=4, copy_from=base))
    with pytest.raises(FileNotFoundError, match="copy_from=.*nowhere does not exist; give data/base or"):
        extract(run_of("none", copy_from=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"holds one layer, and extraction.layers asks for \[2\] too"):
        extract(run_of("both", layers=(2,), copy_from=base))


def test_activations_in_bfloat16(run_of):
    half, single = run_of("half", storage="bfloat16"), run_of("single")
    extract(half)
    extract(single)
    rounded, exact = (load_dataset(run.directory / "data" / "base") for run in (half, single))
    np.testing.assert_allclose(rounded.activations, exact.activations, rtol=2**-8)
    assert (rounded.activations != exact.activations).any() and rounded.sidecar.storage == "bfloat16"
    assert rounded.sidecar.dataset_id != exact.sidecar.dataset_id


def test_an_unknown_role_and_too_few_documents_are_errors_before_anything_is_computed(
    run_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(stage, "read_rows", None)
    with pytest.raises(ValueError, match="no document has the role tool .* are assistant, system, user"):
        extract(run_of("roles", roles=("tool",)))
    few = write_corpus(tmp_path / "few.jsonl", [plain_row(i) for i in range(3)])
    with pytest.raises(ValueError, match="there are too few documents"):
        extract(run_of("few", source=few))
    short = write_corpus(tmp_path / "short.jsonl", [{"id": str(i), "text": f"{i}"} for i in range(3)])
    with pytest.raises(
        ValueError, match=r"no document is longer than min_position=5 tokens \(the longest of 3"
    ):
        extract(run_of("short", source=short))


def test_a_fitting_role_is_read_alone(run_of, tmp_path):
    chats = write_corpus(tmp_path / "chats.jsonl", [chat_row(i) for i in range(24)])
    run = run_of("run", source=chats, roles=("assistant",))
    extract(run)
    data = load_dataset(run.directory / "data" / "base")
    assert {*data.extra["role"]} == {"assistant"} and "answer_start" in data.extra["place"]
    row = data.extra["place"].index("answer_start")
    assert data.contexts[row].endswith("<|im_start|>assistant\n")


def test_shards_of_earlier_versions_are_not_mixed_with_new_ones(run_of):
    run = run_of("run")
    extract(run)
    folder = run.directory / "data" / "base"
    for path in folder.glob("base-00004*"):
        path.unlink()
    sidecar = folder / "base-00000.parquet.nla_meta.yaml"
    fields = yaml.safe_load(sidecar.read_text())
    sidecar.write_text(yaml.safe_dump({k: v for k, v in fields.items() if not k.startswith("file_")}))
    with pytest.raises(
        ValueError, match=r"base-00000.parquet was written by an earlier version, .* delete .*base to"
    ):
        extract(run)
    shutil.rmtree(folder)
    extract(run)
    assert len(digests(run)["shards"]) == 5
