"""Data sets in the reference's layout, written here by hand, become the splits of a run."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from nla_jax.config import CorpusConfig, DataConfig, ExperimentConfig, ModelConfig
from nla_jax.data.adoption import adopt, sidecars, splits_digest, templates_of
from nla_jax.data.batches import verbalizer_rows
from nla_jax.data.dataset import load_dataset
from nla_jax.data.extraction import ExtractionConfig
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.documents import read_record
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.stages import run_stages

D, LAYER = 32, 2
ACTOR = "Look: <concept>{injection_char}</concept>. Say it in <explanation> tags."
CRITIC = "Summary of the following text: <text>{explanation}</text> <summary>"
MARKER = "<empty_output>"


def write_reference_data(directory, stage, documents, tokenizer, *, model="someone/target", **changes):
    """Two rows a document; only the columns that the format requires."""
    docs = [doc for doc in documents for _ in range(2)]
    user = [{"role": "user", "content": ACTOR.replace("{injection_char}", "<INJECT>")}]
    texts = [f"A text on {doc}." for doc in docs]
    prompts = {"ar_sft": [CRITIC.replace("{explanation}", text) for text in texts]}
    columns = {"prompt": prompts.get(stage, [user] * len(docs))}
    if stage == "av_sft":
        columns["response"] = [f"<explanation>\n{text}\n</explanation>" for text in texts]
    draw = np.random.default_rng(len(stage) + len(docs))
    flat = pa.array(draw.standard_normal(len(docs) * D).astype(np.float32))
    columns["activation_vector"] = pa.FixedSizeListArray.from_arrays(flat, D)
    columns["n_raw_tokens"] = pa.array([60, 61] * len(documents), pa.int64())
    columns["activation_layer"] = pa.array([LAYER] * len(docs), pa.int64())
    columns["doc_id"] = docs
    chat = [{"role": "user", "content": ACTOR.replace("{injection_char}", MARKER)}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    slot = ids.index(tokenizer.convert_tokens_to_ids(MARKER))
    suffix = tokenizer.encode(CRITIC.partition("{explanation}")[2], add_special_tokens=False)
    sidecar = {
        "kind": "nla_dataset",
        "schema_version": 1,
        "dataset_id": f"reference-{stage}",
        "stage": stage,
        "row_count": len(docs),
        "extraction": {
            "base_model": model,
            "d_model": D,
            "layer_index": LAYER,
            "norm": "none",
            "corpus": "somewhere/fineweb",
            "corpus_slice": {"start": 0, "length": len(documents)},
            "positions_per_doc": 2,
        },
        "tokens": {
            "injection_char": MARKER,
            "injection_token_id": ids[slot],
            "injection_left_neighbor_id": ids[slot - 1],
            "injection_right_neighbor_id": ids[slot + 1],
            "critic_suffix_ids": suffix[1:] if stage == "ar_sft" else None,
            **changes,
        },
        "prompt_templates": {"critic": CRITIC} if stage == "ar_sft" else {"actor": ACTOR},
        "parent_datasets": ["reference-base"],
        "created_at": "2026-01-01T00:00:00",
        "created_by": "nla.datagen",
        "git_commit": "0123abc",
    }
    path = directory / f"{stage}.parquet"
    pq.write_table(pa.table(columns), path)
    path.with_name(f"{path.name}.nla_meta.yaml").write_text(yaml.safe_dump(sidecar, allow_unicode=True))
    return str(path)


@pytest.fixture(scope="module")
def paths(tiny_lm, tmp_path_factory):
    directory = tmp_path_factory.mktemp("reference")
    sizes = {"av_sft": 20, "ar_sft": 5, "rl": 4}
    return {
        stage: write_reference_data(
            directory, stage, [f"{stage}-{i}" for i in range(size)], tiny_lm.tokenizer, model=tiny_lm.name
        )
        for stage, size in sizes.items()
    } | {"held_out": None}


def test_a_run_trains_on_them_as_they_are(paths, tiny_lm, tmp_path):
    config = ExperimentConfig(
        "adopted",
        model=ModelConfig(tiny_lm.name, layer=LAYER),
        data=DataConfig(**paths),
        corpus=CorpusConfig(held_out=0.3),
        templates=templates_of(paths["av_sft"], paths["ar_sft"]),
    )
    run = Run(config, tmp_path)
    run_stages(run, ("extract", "explain"))
    original = {split: load_dataset(path) for split, path in paths.items() if path}
    documents = {split: set(run.data(split).doc_ids) for split in run.split_folders()}
    assert documents["ar_sft"] == set(original["ar_sft"].doc_ids)
    assert documents["rl"] == set(original["rl"].doc_ids)
    assert not documents["av_sft"] & documents["held_out"]
    assert documents["av_sft"] | documents["held_out"] == set(original["av_sft"].doc_ids)
    assert 2 <= len(documents["held_out"]) <= 12
    assert run.data("held_out").explanations[0] == f"A text on {run.data('held_out').doc_ids[0]}."
    np.testing.assert_array_equal(run.data("rl").activations, original["rl"].activations)
    assert run.data("rl").sidecar.parent_datasets == ("reference-rl",)

    # What both warm starts read: answers up to the closing tag, AR prompts that end with the template's suffix.
    codec, data = run.models.autoencoder, run.data("av_sft").take(slice(0, 1))
    rows = verbalizer_rows(data, codec.tokenizer, codec.verbalizer.prompt, 32)
    answer = codec.tokenizer.decode(rows["responses_BT"][0, : rows["lengths_B"][0]])
    assert answer == f"{data.explanations[0]}\n</explanation>"
    prompt = codec.verbalizer.prompt
    assert codec.tokenizer.decode(prompt.prefix).endswith("<concept>") and prompt.marker_text == MARKER
    prompts_NT, lengths_N = codec.encode(data.explanations)
    text = codec.tokenizer.decode(prompts_NT[0, : lengths_N[0]])
    assert text.endswith(f"{data.explanations[0]}</text> <summary>")

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    run_stages(run, ("extract", "explain"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == written


def test_data_sets_that_change_under_a_finished_run_are_refused(paths, tiny_lm, tmp_path):
    documents = [f"rl-{i}" for i in range(4)]
    mine = write_reference_data(tmp_path, "rl", documents, tiny_lm.tokenizer, model=tiny_lm.name)
    config = ExperimentConfig(
        "adopted",
        model=ModelConfig(tiny_lm.name, layer=LAYER),
        data=DataConfig(**paths | {"rl": mine}),
        corpus=CorpusConfig(held_out=0.3),
        templates=templates_of(paths["av_sft"], paths["ar_sft"]),
    )
    run = Run(config, tmp_path / "run")
    run_stages(run, ("extract", "explain"))
    record = read_record(run.directory)
    assert record.documents == 29 and record.corpus.endswith("rl.parquet")
    os.utime(mine, ns=(1, 1))
    run_stages(run, ("extract", "explain"))  # It is read, found equal, and its new time is noted.
    assert read_record(run.directory).digest == record.digest
    assert read_record(run.directory).state != record.state

    write_reference_data(tmp_path, "rl", [*documents, "rl-4"], tiny_lm.tokenizer, model=tiny_lm.name)
    with pytest.raises(
        ValueError,
        match=r"rl.parquet has changed since .*run was made \(.*rl.parquet has changed\)\. Bring the old",
    ):
        run_stages(run, ("extract", "explain"))
    Path(mine).rename(tmp_path / "moved.parquet")
    run_stages(run, ("extract", "explain"))


def test_hidden_files_in_a_folder_of_shards_are_not_read(tiny_lm, tmp_path):
    write_reference_data(tmp_path, "rl", ["a", "b"], tiny_lm.tokenizer)
    (tmp_path / "._rl.parquet").write_bytes(b"\0\5\26\7")
    assert len(load_dataset(tmp_path)) == 4 and len(sidecars(tmp_path)) == 1


def test_data_of_another_model_is_refused_before_anything_is_written(paths, tiny_lm, tmp_path):
    wrong = write_reference_data(tmp_path, "rl", ["a", "b"], tiny_lm.tokenizer, injection_token_id=9)
    config = ExperimentConfig(
        "wrong",
        model=ModelConfig(tiny_lm.name, layer=LAYER),
        data=DataConfig(**paths | {"rl": wrong}),
        templates=templates_of(paths["av_sft"], paths["ar_sft"]),
    )
    run = Run(config, tmp_path / "run")
    with pytest.raises(
        ValueError,
        match="'reference-rl' does not fit this run: extraction.base_model: data 'someone/target', run '.*'; "
        "tokens.injection_token_id: data 9, run 3",
    ):
        run_stages(run, ("extract", "explain"))
    assert not (tmp_path / "run" / "data").exists()


def test_the_digest_of_rows_is_that_of_their_columns_as_one_list(paths):
    splits = adopt(paths, held_out_share=0.3, seed=1)
    expected = hashlib.blake2b(digest_size=8)
    for split, stored in splits.items():
        rows = stored.read()
        expected.update(
            json.dumps([split, rows.doc_ids, rows.n_raw_tokens.tolist(), rows.explanations]).encode()
        )
        expected.update(rows.activations.tobytes())
    assert splits["rl"].read().explanations is None
    assert splits_digest(splits) == expected.hexdigest()


def test_held_out_documents_are_nowhere_else(paths, tiny_lm, tmp_path):
    adopted = adopt(paths, held_out_share=0.3, seed=1)
    again = adopt(paths, held_out_share=0.3, seed=1)
    assert adopted["held_out"].doc_ids == again["held_out"].doc_ids
    assert adopted["held_out"].doc_ids != adopt(paths, held_out_share=0.3, seed=2)["held_out"].doc_ids
    # Given, they must be of other documents.
    given = write_reference_data(tmp_path, "av_sft", ["h0", "h1", "h2", "h3"], tiny_lm.tokenizer)
    kept = adopt({**paths, "held_out": given}, held_out_share=0.3, seed=1)
    assert len(kept["av_sft"]) == 40 and set(kept["held_out"].doc_ids) == {"h0", "h1", "h2", "h3"}
    with pytest.raises(ValueError, match="20 held-out documents are in av_sft too, for instance 'av_sft-0'"):
        adopt({**paths, "held_out": paths["av_sft"]}, held_out_share=0.3, seed=1)


def test_what_cannot_be_adopted_is_named(paths, tmp_path):
    with pytest.raises(ValueError, match="of stage 'rl' and holds no explanations, which ar_sft needs"):
        adopt({**paths, "ar_sft": paths["rl"]}, held_out_share=0.3, seed=0)
    with pytest.raises(ValueError, match=r"too few documents: held_out has 0, and every split needs 2"):
        adopt(paths, held_out_share=0.0, seed=0)
    with pytest.raises(ValueError, match="not for data.ar_sft, data.rl; give all three"):
        DataConfig(av_sft="x.parquet")
    with pytest.raises(
        FileNotFoundError, match="nowhere.parquet does not exist; give a .parquet file or a folder"
    ):
        templates_of(tmp_path / "nowhere.parquet")
    (tmp_path / "alone.parquet").touch()
    with pytest.raises(
        FileNotFoundError, match="lacks .*alone.parquet.nla_meta.yaml; give a .parquet file that"
    ):
        templates_of(tmp_path / "alone.parquet")
    with pytest.raises(ValueError, match="name 0 texts for templates.reconstructor, expected one"):
        templates_of(paths["av_sft"])


def test_only_given_data_enters_a_runs_digest():
    # Earlier versions read all tokens with the same probability.
    config = ExperimentConfig("x", extraction=ExtractionConfig(by_place=False))
    # Written down when there was no such field: finished runs keep their digest.
    assert stage_digest(config, "explain") == "65e9605072b1e6d4"
    given = dataclasses.replace(config, data=DataConfig("a", "b", "c"))
    assert stage_digest(given, "explain") != stage_digest(config, "explain")
