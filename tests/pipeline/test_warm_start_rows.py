import dataclasses
import types

import numpy as np
import pytest
from untrained_nla import write_untrained_run

from nla_jax.data.dataset import base_columns, load_dataset, write_shard
from nla_jax.data.stage_texts import stage_columns
from nla_jax.data.store import open_dataset
from nla_jax.pipeline import warm_start_rows
from nla_jax.pipeline.warm_start_rows import (
    MixedTexts,
    closed_answers,
    partly_verbalized,
    reconstructor_prompts,
)


def stored_rows(run, split, texts, folder):
    """The rows of a split on disk, with other texts."""
    data = dataclasses.replace(run.data(split), explanations=texts)
    path = folder / f"{split}.parquet"
    write_shard(path, stage_columns(split, base_columns(data), data.sidecar.prompt_templates), data.sidecar)
    return open_dataset(path)


@pytest.fixture
def run(tiny_model_dir, tmp_path):
    (tmp_path / "run").mkdir()
    return write_untrained_run(tiny_model_dir, tmp_path / "run")


def let_the_av_write(run, monkeypatch, texts, asked):
    """Answer with the next of some texts, and note how many rows were asked about at a time."""
    texts = iter(texts)

    def verbalize(params, activations_ND, *_, **__):
        asked.append(len(activations_ND))
        return [next(texts) for _ in activations_ND]

    monkeypatch.setitem(run.models.__dict__, "round_trip", types.SimpleNamespace(verbalize=verbalize))
    monkeypatch.setattr(run.models, "model_params", lambda stage, model: None)


def test_a_text_with_a_tag_in_it_does_not_end_the_warm_start(run, tmp_path, monkeypatch):
    data = stored_rows(run, "ar_sft", ["one", "two", "three", "four"], tmp_path)
    written = ['Ends "x".</explanation>', "<explanation>\nIt ends.", None, "It ends."]
    let_the_av_write(run, monkeypatch, written, [])
    texts = partly_verbalized(run, data, 1.0).texts(np.arange(4))
    # Rows are verbalized in a shuffled order: one text stands, and three rows keep the writer's.
    assert texts.count("It ends.") == 1 and len({*texts} & {"one", "two", "three", "four"}) == 3
    stored = load_dataset(run.directory / "data" / "verbalized")
    assert sorted(stored.explanations) == sorted(texts)


def test_rows_are_verbalized_shard_by_shard_and_those_that_are_there_are_not_asked_for_again(
    run, tmp_path, monkeypatch
):
    data, asked = stored_rows(run, "ar_sft", ["one", "two", "three", "four"], tmp_path), []
    monkeypatch.setattr(warm_start_rows, "VERBALIZED_ROWS", 2)
    let_the_av_write(run, monkeypatch, ["a", "b", "c"], asked)
    mixed = partly_verbalized(run, data, 0.75)
    texts = mixed.texts(np.arange(4))
    assert asked == [2, 1]
    chosen = np.random.default_rng(run.config.seed).permutation(4)[:3]
    expected = np.array(["one", "two", "three", "four"], object)
    expected[chosen] = ["a", "b", "c"]
    assert texts == expected.tolist()
    assert mixed.texts(np.array([3, 0])) == [texts[3], texts[0]]

    folder = run.directory / "data" / "verbalized"
    (folder / "manifest.json").unlink()
    (folder / "verbalized-00001.parquet.nla_meta.yaml").unlink()
    let_the_av_write(run, monkeypatch, ["c"], asked)
    assert partly_verbalized(run, data, 0.75).texts(np.arange(4)) == texts
    assert asked == [2, 1, 1]
    assert partly_verbalized(run, data, 0.75).texts(np.arange(4)) == texts and len(asked) == 3


def test_several_texts_of_the_av_are_rows_of_their_own(run, tmp_path, monkeypatch):
    data, asked = stored_rows(run, "ar_sft", ["one", "two", "three", "four"], tmp_path), []
    monkeypatch.setattr(warm_start_rows, "VERBALIZED_ROWS", 4)
    let_the_av_write(run, monkeypatch, ["a1", "a2", "a3", "b1", None, "b3"], asked)
    mixed = partly_verbalized(run, data, 0.5, samples=3)
    assert asked == [4, 2] and len(mixed) == 8
    expected = {row: [text] for row, text in enumerate(["one", "two", "three", "four"])}
    first, second = np.random.default_rng(run.config.seed).permutation(4)[:2].tolist()
    expected[first], expected[second] = ["a1", "a2", "a3"], ["b1", data.explanations([second])[0], "b3"]
    assert mixed.texts(np.arange(8)) == [text for row in range(4) for text in expected[row]]
    # What lies together on disk is drawn together.
    monkeypatch.setattr(type(data), "chunk_sizes", lambda self: np.array([1, 2, 1]))
    counts = [len(expected[row]) for row in range(4)]
    assert mixed.chunk_sizes().tolist() == [counts[0], counts[1] + counts[2], counts[3]]
    batch = reconstructor_prompts(run.models.autoencoder, mixed, "ar_sft").batch(np.arange(8))
    rows = [row for row in range(4) for _ in expected[row]]
    np.testing.assert_array_equal(batch["activations_BD"], data.activations(rows))


def test_texts_are_cut_for_the_ar_at_places_that_no_order_changes(codec_and_rows):
    codec, data = codec_and_rows
    rows = reconstructor_prompts(codec, unmixed(data), "ar_sft", cut=(1, 2), seed=3)
    whole = reconstructor_prompts(codec, unmixed(data), "ar_sft")
    batch = rows.batch(np.array([3, 1, 3]))
    assert (batch["lengths_B"] < whole.batch(np.array([3, 1, 3]))["lengths_B"]).all()
    np.testing.assert_array_equal(batch["prompts_BT"][0], batch["prompts_BT"][2])
    np.testing.assert_array_equal(batch["prompts_BT"][1], rows.batch(np.array([1]))["prompts_BT"][0])
    # Both lengths are drawn, and nothing beyond them.
    assert {*rows._tokens(np.arange(50)).tolist()} == {1, 2}


def test_rows_carry_the_weights_of_what_they_are_about(codec_and_rows):
    codec, data = codec_and_rows
    mixed = MixedTexts(data, None, np.array([0, 0, 1, 2, 3]), np.full(5, -1))
    weights = np.array([1, 2, 3, 4], np.float32)
    rows = reconstructor_prompts(codec, mixed, "ar_sft", weights_N=weights)
    assert rows.batch(np.arange(5))["weights_B"].tolist() == [1, 1, 2, 3, 4]


@pytest.fixture
def codec_and_rows(untrained_run, tmp_path):
    """A codec, and four rows whose texts are longer and longer."""
    texts = ["a", "a text", "a text on", "a text on a text"]
    return untrained_run.models.autoencoder, stored_rows(untrained_run, "av_sft", texts, tmp_path)


def unmixed(data):
    return MixedTexts.written(data)


def tokens(codec, text):
    return len(codec.tokenizer.encode(text, add_special_tokens=False))


def test_the_av_is_not_trained_on_answers_that_would_be_cut(codec_and_rows, capsys):
    codec, data = codec_and_rows
    texts = data.explanations(np.arange(4))
    # The third text fits to the last token, with one for its closing.
    codec = dataclasses.replace(codec, max_explanation_tokens=tokens(codec, texts[2]) + 1)
    rows = closed_answers(codec, data, batch_size=2)
    assert len(rows) == 3 and rows.chunk_sizes().tolist() == [3]
    batch = rows.batch(np.array([2, 0, 1]))
    np.testing.assert_array_equal(batch["activations_BD"], data.activations([2, 0, 1]))
    closing = codec.verbalizer.prompt.closing[-1]
    pairs = zip(batch["responses_BT"], batch["lengths_B"], strict=True)
    assert all(row[length - 1] == closing for row, length in pairs)
    assert batch["lengths_B"].tolist() == [tokens(codec, texts[row]) + 1 for row in (2, 0, 1)]
    told = capsys.readouterr().err
    assert told.startswith("warning: av_sft: 1 of 4 texts (25.0%)")
    assert f"max_explanation_tokens={codec.max_explanation_tokens}. The AV is not trained on them" in told
    with pytest.raises(ValueError, match=r"others do not fill a batch of 4; raise max_explanation_tokens"):
        closed_answers(codec, data, batch_size=4)


def test_texts_whose_end_the_ar_does_not_read_are_counted(codec_and_rows, capsys):
    codec, data = codec_and_rows
    prompts_NT, lengths_N = codec.encode(data.explanations(np.arange(4)))
    assert (np.diff(lengths_N) > 0).all()
    shorter = dataclasses.replace(codec, max_reconstructor_tokens=int(lengths_N[2]))
    assert len(reconstructor_prompts(shorter, unmixed(data), "ar_sft")) == 4
    assert "warning: ar_sft: 1 of 4 texts (25.0%) have more tokens than max_reco" in capsys.readouterr().err
    batch = reconstructor_prompts(codec, unmixed(data), "ar_sft").batch(np.array([3, 1]))
    np.testing.assert_array_equal(batch["prompts_BT"], prompts_NT[[3, 1]])
    np.testing.assert_array_equal(batch["activations_BD"], data.activations([3, 1]))
    assert batch["weights_B"].tolist() == [1, 1]


def test_nothing_is_told_where_every_text_fits(codec_and_rows, capsys):
    codec, data = codec_and_rows
    longest = data.explanations([3])[0]
    codec = dataclasses.replace(codec, max_explanation_tokens=tokens(codec, longest) + 1)
    assert len(closed_answers(codec, data, 4)) == 4
    reconstructor_prompts(codec, unmixed(data), "ar_sft")
    assert capsys.readouterr().err == ""
