import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from nla_jax.autoencoder.metrics import direction_mse
from nla_jax.data.dataset import load_dataset, write_shard
from nla_jax.data.shards import sha256_of
from nla_jax.data.sidecar import (
    CorpusSlice,
    Extraction,
    PromptIds,
    Sidecar,
    SidecarTemplates,
    sidecar_path_for,
)
from nla_jax.data.stage_texts import stage_columns

TOKENS = PromptIds("㊗", 16, 101, 102, (7, 8))
TEMPLATES = SidecarTemplates("Explain {injection_char}, {please}.", "<text>{explanation}</text> Goes on:")
EXTRACTION = Extraction("org/model", 3, 5, "brown", CorpusSlice(0, 10), 2)
SIDECAR = Sidecar("set-1", "base", 2, EXTRACTION, TOKENS, TEMPLATES, created_at="2026-01-02T03:04:05+00:00")
ACTIVATIONS = np.array([[1.5, -2.0, 0.25], [1e-8, 3e5, 0.1]], np.float32)


def base_columns(**changes):
    columns = {
        "activation_vector": ACTIVATIONS,
        "n_raw_tokens": [51, 77],
        "activation_layer": [5, 5],
        "doc_id": ["a", "b"],
        "detokenized_text_truncated": ["one two", "drei\nvier é"],
        "api_explanation": ["First.", "Second,\nin two lines."],
        "genre": ["news", "law"],
        "next_words": [["x", "y"], []],
        "next_probabilities": [[0.5, 0.1], []],
    }
    return {name: column for name, column in {**columns, **changes}.items() if column is not None}


def of_stage(stage, **changes):
    return dataclasses.replace(SIDECAR, stage=stage, **changes)


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "s0.parquet", base_columns(), SIDECAR)
    return tmp_path / "s0.parquet"


def forget_digest(shard):
    """Make the sidecar one of a writer that records no digest, so that the file may be changed."""
    sidecar = dataclasses.replace(Sidecar.load(sidecar_path_for(shard)), file_bytes=None, file_sha256=None)
    sidecar.save(sidecar_path_for(shard))


def test_sidecar_file_has_the_shared_keys(tmp_path):
    SIDECAR.save(tmp_path / "s.yaml")
    assert yaml.safe_load((tmp_path / "s.yaml").read_text(encoding="utf-8")) == {
        "kind": "nla_dataset",
        "schema_version": 1,
        "dataset_id": "set-1",
        "stage": "base",
        "row_count": 2,
        "extraction": {
            "base_model": "org/model",
            "d_model": 3,
            "layer_index": 5,
            "norm": "none",
            "corpus": "brown",
            "corpus_slice": {"start": 0, "length": 10},
            "positions_per_doc": 2,
        },
        "tokens": {
            "injection_char": "㊗",
            "injection_token_id": 16,
            "injection_left_neighbor_id": 101,
            "injection_right_neighbor_id": 102,
            "critic_suffix_ids": [7, 8],
        },
        "prompt_templates": {"actor": TEMPLATES.actor, "critic": TEMPLATES.critic},
        "parent_datasets": [],
        "created_at": "2026-01-02T03:04:05+00:00",
        "created_by": "nla_jax",
        "git_commit": "",
        "storage": "float32",
    }
    assert Sidecar.load(tmp_path / "s.yaml") == SIDECAR


def test_sidecar_reads_what_others_write(tmp_path):
    fields = yaml.safe_load(_yaml_of(SIDECAR, tmp_path)) | {"keep_debug_metadata": True, "tokens": None}
    del fields["prompt_templates"], fields["git_commit"]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    assert Sidecar.load(tmp_path / "s.yaml") == of_stage(
        "base", tokens=None, prompt_templates=SidecarTemplates()
    )


def test_sidecar_with_a_byte_order_mark(tmp_path):
    SIDECAR.save(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text((tmp_path / "s.yaml").read_text(), encoding="utf-8-sig")
    assert Sidecar.load(tmp_path / "s.yaml") == SIDECAR


def _yaml_of(sidecar, folder):
    sidecar.save(folder / "s.yaml")
    return (folder / "s.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: nla_dataset", "kind: nla_model", "kind is 'nla_model', expected 'nla_dataset'"),
        ("schema_version: 1", "schema_version: 2", "schema_version is 2, this version reads 1"),
        ("stage: base", "stage: test", "unknown stage 'test'; the stages are base, av_sft, ar_sft, rl"),
        ("row_count: 2", "rows: 2", "the sidecar lacks row_count"),
        ("  d_model: 3", "  width: 3", "extraction lacks d_model"),
        ("    start: 0\n", "", "extraction.corpus_slice lacks start"),
        ("  norm: none", "  norm: unit", "extraction.norm is 'unit', expected 'none'"),
        ("kind: nla_dataset", "kind: [", "while parsing"),
    ],
)
def test_bad_sidecars(tmp_path, old, new, message):
    text = _yaml_of(SIDECAR, tmp_path)
    assert old in text
    (tmp_path / "s.yaml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        Sidecar.load(tmp_path / "s.yaml")
    assert str(tmp_path / "s.yaml") in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "rl", "tokens": None}, "stage 'rl' needs tokens"),
        ({"stage": "ar_sft", "prompt_templates": SidecarTemplates("x")}, "needs prompt_templates.critic"),
        ({"stage": "av_sft", "prompt_templates": SidecarTemplates()}, "needs prompt_templates.actor"),
    ],
)
def test_training_stages_need_the_whole_contract(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIDECAR, **changes)


LIVE = {"base_model": "org/model", "layer_index": 5, "d_model": 3, "tokens": TOKENS}


def test_check_accepts_its_own_contract():
    SIDECAR.check(**LIVE)
    of_stage("base", tokens=None).check(**LIVE)
    # A local copy is named like the hub model that it is a copy of.
    SIDECAR.check(**{**LIVE, "base_model": "/models/model"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": "org/other"}, "extraction.base_model: data 'org/model', run 'org/other'"),
        ({"base_model": "/models/other"}, "extraction.base_model: data 'org/model', run '/models/other'"),
        ({"layer_index": 4}, "extraction.layer_index: data 5, run 4"),
        ({"d_model": 8}, "extraction.d_model: data 3, run 8"),
        (
            {"tokens": dataclasses.replace(TOKENS, injection_token_id=99)},
            "tokens.injection_token_id: data 16, run 99",
        ),
        (
            {"tokens": dataclasses.replace(TOKENS, critic_suffix_ids=(7, 9))},
            r"tokens.critic_suffix_ids: data \(7, 8\), run \(7, 9\)",
        ),
        (
            {"tokens": dataclasses.replace(TOKENS, injection_char="<unused0>", injection_token_id=6)},
            "tokens.injection_char: data '㊗', run '<unused0>'; tokens.injection_token_id: data 16, run 6; use the "
            "model and tokenizer it was extracted with, or extract again; set templates.marker to '㊗'",
        ),
        ({"layer_index": 4, "d_model": 8}, "layer_index: data 5, run 4; extraction.d_model: data 3, run 8"),
    ],
)
def test_check_names_both_values(changes, message):
    with pytest.raises(ValueError, match=f"data set 'set-1' does not fit this run: .*{message}"):
        SIDECAR.check(**{**LIVE, **changes})


def test_round_trip(shard):
    assert pq.read_schema(shard).field("activation_vector").type == pa.list_(pa.float32(), 3)
    assert pq.read_schema(shard).field("n_raw_tokens").type == pa.int64()
    data = load_dataset(shard)
    assert data.activations.dtype == np.float32
    np.testing.assert_array_equal(data.activations, ACTIVATIONS)
    assert data.n_raw_tokens.tolist() == [51, 77]
    assert data.doc_ids == ["a", "b"]
    assert data.contexts == ["one two", "drei\nvier é"]
    assert data.explanations == ["First.", "Second,\nin two lines."]
    assert pq.read_schema(shard).field("next_probabilities").type.value_type == pa.float32()
    assert data.extra.pop("next_probabilities") == [pytest.approx([0.5, 0.1]), []]
    assert data.extra == {"genre": ["news", "law"], "next_words": [["x", "y"], []]}
    written = {"file_bytes": shard.stat().st_size, "file_sha256": sha256_of(shard)}
    assert data.sidecar == dataclasses.replace(SIDECAR, **written)
    assert sorted(p.name for p in shard.parent.iterdir()) == ["s0.parquet", "s0.parquet.nla_meta.yaml"]


def test_optional_columns_may_be_absent(tmp_path):
    columns = base_columns(detokenized_text_truncated=None, api_explanation=None)
    write_shard(tmp_path / "s.parquet", columns, SIDECAR)
    data = load_dataset(tmp_path)
    assert (data.explanations, data.contexts) == (None, None)
    assert data.take([0]).explanations is None


def test_variable_length_lists_are_read_as_well(shard):
    table = pq.read_table(shard)
    lists = pa.array(ACTIVATIONS.tolist(), pa.list_(pa.float32()))
    pq.write_table(table.set_column(0, "activation_vector", lists), shard)
    forget_digest(shard)
    np.testing.assert_array_equal(load_dataset(shard).activations, ACTIVATIONS)


@pytest.mark.parametrize(
    ("indices", "rows"),
    [([1, 0, 1], [1, 0, 1]), (np.array([False, True]), [1]), (slice(0, 1), [0]), ([-1], [1])],
)
def test_take(shard, indices, rows):
    taken = load_dataset(shard).take(indices)
    assert len(taken) == taken.sidecar.row_count == len(rows)
    np.testing.assert_array_equal(taken.activations, ACTIVATIONS[rows])
    assert taken.doc_ids == ["ab"[row] for row in rows]
    assert taken.n_raw_tokens.tolist() == [(51, 77)[row] for row in rows]
    assert taken.extra["genre"] == [("news", "law")[row] for row in rows]


def test_shards_are_read_in_name_order(shard):
    later = dataclasses.replace(EXTRACTION, corpus_slice=CorpusSlice(10, 5))
    one_row = {name: column[:1] for name, column in base_columns(doc_id=["c", "d"]).items()}
    sidecar = dataclasses.replace(SIDECAR, row_count=1, extraction=later, created_at="2026-02-02")
    write_shard(shard.with_name("s1.parquet"), one_row, sidecar)
    data = load_dataset(shard.parent)
    assert data.doc_ids == ["a", "b", "c"]
    np.testing.assert_array_equal(data.activations, ACTIVATIONS[[0, 1, 0]])
    assert data.extra["genre"] == ["news", "law", "news"]
    assert data.sidecar.row_count == 3
    assert data.sidecar.extraction.corpus_slice == CorpusSlice(0, 15)


@pytest.mark.parametrize(
    ("columns", "sidecar", "message"),
    [
        ({}, of_stage("rl"), "differ in stage: base and rl"),
        ({"genre": None}, SIDECAR, r"differ in columns: .*'genre'"),
        (
            {},
            dataclasses.replace(SIDECAR, extraction=dataclasses.replace(EXTRACTION, base_model="org/other")),
            "differ in extraction: .*org/model.* and .*org/other",
        ),
        (
            {},
            dataclasses.replace(SIDECAR, tokens=dataclasses.replace(TOKENS, injection_token_id=3)),
            "differ in tokens: .*injection_token_id=16.* and .*injection_token_id=3",
        ),
    ],
)
def test_shards_must_agree(shard, columns, sidecar, message):
    write_shard(shard.with_name("s1.parquet"), base_columns(**columns), sidecar)
    with pytest.raises(ValueError, match=f"s0.parquet and .*s1.parquet {message}"):
        load_dataset(shard.parent)


def test_missing_paths(tmp_path, shard):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \*.parquet file"):
        load_dataset(tmp_path / "empty")
    sidecar_path_for(shard).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no sidecar: expected .*s0.parquet.nla_meta.yaml; copy it"
    ):
        load_dataset(tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_truncated_shard(shard, kept):
    whole = shard.read_bytes()
    shard.write_bytes(whole[:kept])
    with pytest.raises(
        ValueError,
        match=r"shard .*s0.parquet has \d+ bytes, and had \d+ when it was written: it is truncated or was changed",
    ):
        load_dataset(shard)
    forget_digest(shard)
    with pytest.raises(
        ValueError, match=r"shard .*s0.parquet is truncated or not parquet .*; copy or write it"
    ):
        load_dataset(shard)


def _swap(shard, name, values):
    table = pq.read_table(shard)
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), shard)
    forget_digest(shard)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("activation_layer", [5, 6], r"holds activations of layers \[6\], its sidecar says 5"),
        (
            "activation_vector",
            [[1.0, 2.0]] * 2,
            r"holds activations of length \[2\], its sidecar says d_model 3",
        ),
        ("activation_vector", [[1.0, 2.0, None]] * 2, r"empty cells in \['activation_vector'\]"),
        (
            "activation_vector",
            [[1.0, 2.0, 3.0], [1.0, float("nan"), 3.0]],
            r"s0.parquet: 1 of 2 activations hold NaN, infinity .*, the first in row 1; leave these rows out, or",
        ),
        (
            "activation_vector",
            [[1.0, 2.0, float("-inf")]] * 2,
            "2 of 2 activations hold NaN.*the first in row 0",
        ),
        ("activation_vector", [[1.0, 2.0, 1e39]] * 2, "number beyond float32"),
        (
            "activation_vector",
            ["[1, 2, 3]"] * 2,
            "'activation_vector' is of type string, expected lists of numbers",
        ),
        ("activation_vector", [["1", "2", "3"]] * 2, r"is of type list<.*string>, expected lists of numbers"),
        ("doc_id", ["a", None], r"empty cells in \['doc_id'\]"),
        (
            "n_raw_tokens",
            [51.5, 77.0],
            "'n_raw_tokens' of type double holds something else than whole numbers",
        ),
        ("n_raw_tokens", ["many", "7"], "'n_raw_tokens' of type string holds something else than whole"),
        (
            "api_explanation",
            ["a", None],
            "1 of 2 rows have no explanation .* 'api_explanation'; the first is row 1, which holds 'None'. Leave these",
        ),
        ("api_explanation", [" ", ""], "2 of 2 rows have no explanation"),
    ],
)
def test_shard_that_does_not_fit_its_sidecar(shard, name, values, message):
    _swap(shard, name, values)
    with pytest.raises(ValueError, match=message):
        load_dataset(shard)


def test_ids_that_are_numbers_and_other_forms_of_columns_are_read(shard):
    _swap(shard, "doc_id", [7, 8])
    _swap(shard, "n_raw_tokens", [51.0, 77.0])
    _swap(shard, "detokenized_text_truncated", ["one two", None])
    _swap(shard, "activation_vector", [[1, 2, 3], [4, 5, 6]])
    data = load_dataset(shard)
    assert data.doc_ids == ["7", "8"] and data.contexts == ["one two", ""]
    assert data.n_raw_tokens.tolist() == [51, 77] and data.n_raw_tokens.dtype == np.int64
    np.testing.assert_array_equal(data.activations, np.array([[1, 2, 3], [4, 5, 6]], np.float32))


def test_activations_without_a_direction_are_counted(shard, capsys):
    _swap(shard, "activation_vector", [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    data = load_dataset(shard)
    assert "s0.parquet: 1 of 2 activations are all zeros, the first in row 1" in capsys.readouterr().err
    np.testing.assert_allclose(direction_mse(ACTIVATIONS, data.activations)[1], 1, rtol=1e-6)


def test_answers_that_never_had_tags_are_explanations_as_they_are(tmp_path):
    columns = stage_columns("av_sft", base_columns(), TEMPLATES)
    write_shard(tmp_path / "s.parquet", {**columns, "response": [" One.", "Two.\n"]}, of_stage("av_sft"))
    assert load_dataset(tmp_path).explanations == ["One.", "Two."]


def test_activations_that_no_text_was_written_about_have_none(shard):
    _swap(shard, "api_explanation", pa.array([None, None], pa.string()))
    assert load_dataset(shard).explanations is None


def test_row_count_and_missing_columns(shard):
    dataclasses.replace(SIDECAR, row_count=3).save(sidecar_path_for(shard))
    with pytest.raises(ValueError, match=r"s0.parquet has 2 rows, its sidecar says 3"):
        load_dataset(shard)
    SIDECAR.save(sidecar_path_for(shard))
    pq.write_table(pq.read_table(shard).drop_columns(["doc_id"]), shard)
    with pytest.raises(ValueError, match=r"lacks the columns \['doc_id'\]"):
        load_dataset(shard)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_id": None}, r"missing columns \['doc_id'\]"),
        ({"doc_id": ["a"]}, r"the sidecar says 2 rows, the columns have {'doc_id': 1}"),
        ({"activation_vector": ACTIVATIONS[:, :2]}, r"has shape \(2, 2\), the sidecar says \(2, 3\)"),
        ({"activation_vector": ACTIVATIONS * [[1], [np.nan]]}, "the activation of row 1 is not finite"),
        ({"activation_layer": np.array([5, 4])}, r"layers \[4\], its sidecar says 5"),
    ],
)
def test_write_refuses_what_does_not_fit(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "s.parquet", base_columns(**changes), SIDECAR)
    assert list(tmp_path.iterdir()) == []


def test_write_refuses_another_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .parquet"):
        write_shard(tmp_path / "s.pq", base_columns(), SIDECAR)


def test_interrupted_overwrite_is_not_loadable(shard, monkeypatch):
    def interrupted(self, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(Sidecar, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shard(shard, base_columns(doc_id=["x", "y"]), SIDECAR)
    with pytest.raises(FileNotFoundError, match="has no sidecar"):
        load_dataset(shard)


def test_stage_columns_by_hand():
    turn = [{"role": "user", "content": "Explain <INJECT>, {please}."}]
    av = stage_columns("av_sft", base_columns(), TEMPLATES)
    assert av["prompt"] == [turn, turn]
    assert av["response"][1] == "<explanation>\nSecond,\nin two lines.\n</explanation>"
    ar = stage_columns("ar_sft", base_columns(), TEMPLATES)
    assert ar["prompt"][0] == "<text>First.</text> Goes on:"
    rl = stage_columns("rl", base_columns(api_explanation=None), TEMPLATES)
    assert rl["prompt"] == [turn, turn]
    assert "response" not in ar and "response" not in rl
    for columns in (av, ar, rl):
        assert "api_explanation" not in columns
        assert columns["genre"] == ["news", "law"]


@pytest.mark.parametrize("stage", ["av_sft", "ar_sft", "rl"])
def test_stages_round_trip(tmp_path, stage):
    columns = base_columns(api_explanation=[" First.\n", "A < B, {braces}\nand more."])
    write_shard(tmp_path / "s.parquet", stage_columns(stage, columns, TEMPLATES), of_stage(stage))
    expected = None if stage == "rl" else ["First.", "A < B, {braces}\nand more."]
    assert load_dataset(tmp_path).explanations == expected


@pytest.mark.parametrize(
    ("stage", "columns", "templates", "message"),
    [
        ("base", {}, TEMPLATES, "unknown training stage 'base'; expected av_sft, ar_sft or rl"),
        ("av_sft", {"api_explanation": None}, TEMPLATES, "need the column api_explanation"),
        ("av_sft", {"api_explanation": ["a", " "]}, TEMPLATES, "explanation '' of document 'b' is blank"),
        (
            "ar_sft",
            {"api_explanation": ["</explanation>", "b"]},
            TEMPLATES,
            "of document 'a' is blank or contains",
        ),
        (
            "rl",
            {},
            SidecarTemplates("no slot"),
            r"actor must contain {injection_char} exactly once, got 'no slot'",
        ),
        ("ar_sft", {}, SidecarTemplates("x"), r"critic must contain {explanation} exactly once, got None"),
    ],
)
def test_stage_columns_refuse(stage, columns, templates, message):
    with pytest.raises(ValueError, match=message):
        stage_columns(stage, base_columns(**columns), templates)


@pytest.mark.parametrize(
    ("stage", "name", "values", "message"),
    [
        (
            "av_sft",
            "response",
            ["<explanation>\na\n</explanation>", "<explanation>cut"],
            "1 of 2 rows have no explanation .* column 'response'; the first is row 1, which holds '<explanation>cut'",
        ),
        (
            "av_sft",
            "response",
            ["<explanation>a</explanation>", "no tags"],
            "is row 1, which holds 'no tags'",
        ),
        ("av_sft", "response", ["no tags", None], "is row 1, which holds 'None'"),
        ("av_sft", "response", [[{"role": "assistant", "content": "a"}]] * 2, r"which holds \"\[{'role': "),
        ("ar_sft", "prompt", ["other <text>a</text> Goes on:", "b"], "2 of 2 rows have no explanation"),
    ],
)
def test_load_without_a_recoverable_explanation(tmp_path, stage, name, values, message):
    path = tmp_path / "s.parquet"
    write_shard(path, stage_columns(stage, base_columns(), TEMPLATES), of_stage(stage))
    _swap(path, name, values)
    with pytest.raises(ValueError, match=message):
        load_dataset(path)
    pq.write_table(pq.read_table(path).drop_columns([name]), path)
    with pytest.raises(ValueError, match=f"of stage '{stage}' holds no explanations"):
        load_dataset(path)


def test_a_sidecar_says_who_wrote_the_texts(tmp_path):
    texts = {"writer": "chat", "model": "m", "instruction": {"name": "activation_v1", "digest": "ab"}}
    sidecar = Sidecar("x", "base", 1, Extraction("m", 2, 1, "c", CorpusSlice(0, 1), 1), texts=texts)
    sidecar.save(tmp_path / "s.yaml")
    assert Sidecar.load(tmp_path / "s.yaml").texts == texts
    dataclasses.replace(sidecar, texts=None).save(tmp_path / "s.yaml")
    assert "texts" not in (tmp_path / "s.yaml").read_text()
    assert Sidecar.load(tmp_path / "s.yaml").texts is None
