import dataclasses
import types

import numpy as np
import pytest
from untrained_nla import write_untrained_run

from nla_jax.data.dataset import load_dataset
from nla_jax.pipeline.warm_start_rows import closed_answers, partly_verbalized, reconstructor_prompts


def test_a_text_with_a_tag_in_it_does_not_end_the_warm_start(tiny_model_dir, tmp_path, monkeypatch):
    run = write_untrained_run(tiny_model_dir, tmp_path)
    data = dataclasses.replace(run.data("ar_sft"), explanations=["one", "two", "three", "four"])
    written = ['Ends "x".</explanation>', "<explanation>\nIt ends.", None, "It ends."]
    monkeypatch.setitem(
        run.models.__dict__, "round_trip", types.SimpleNamespace(verbalize=lambda *_, **__: written)
    )
    monkeypatch.setattr(run.models, "warm_start_params", lambda model: None)
    texts = partly_verbalized(run, data, 1.0)
    # Rows are verbalized in a shuffled order: one text stands, and three rows keep the writer's.
    assert texts.count("It ends.") == 1 and len({*texts} & {"one", "two", "three", "four"}) == 3
    stored = load_dataset(run.directory / "data" / "verbalized" / "verbalized.parquet")
    assert sorted(stored.explanations) == sorted(texts)


@pytest.fixture
def codec_and_rows(untrained_run):
    """A codec, and four rows whose texts are longer and longer."""
    codec, data = untrained_run.models.autoencoder, untrained_run.data("av_sft")
    return codec, dataclasses.replace(data, explanations=["a", "a text", "a text on", "a text on a text"])


def tokens(codec, text):
    return len(codec.tokenizer.encode(text, add_special_tokens=False))


def test_the_av_is_not_trained_on_answers_that_would_be_cut(codec_and_rows, capsys):
    codec, data = codec_and_rows
    # The third text fits to the last token, with one for its closing.
    codec = dataclasses.replace(codec, max_explanation_tokens=tokens(codec, data.explanations[2]) + 1)
    rows = closed_answers(codec, data, batch_size=2)
    np.testing.assert_array_equal(rows["activations_BD"], data.activations[:3])
    assert len(rows["lengths_B"]) == len(rows["responses_BT"]) == 3
    closing = codec.verbalizer.prompt.closing[-1]
    assert all(row[length - 1] == closing for row, length in zip(*list(rows.values())[1:], strict=True))
    told = capsys.readouterr().err
    assert told.startswith("warning: av_sft: 1 of 4 texts (25.0%)")
    assert f"max_explanation_tokens={codec.max_explanation_tokens}. The AV is not trained on them" in told
    with pytest.raises(ValueError, match=r"others do not fill a batch of 4; raise max_explanation_tokens"):
        closed_answers(codec, data, batch_size=4)


def test_texts_whose_end_the_ar_does_not_read_are_counted(codec_and_rows, capsys):
    codec, data = codec_and_rows
    _, lengths_N = codec.encode(data.explanations)
    assert (np.diff(lengths_N) > 0).all()
    codec = dataclasses.replace(codec, max_reconstructor_tokens=int(lengths_N[2]))
    rows = reconstructor_prompts(codec, data, data.explanations, "ar_sft")
    assert len(rows["lengths_B"]) == 4
    assert "warning: ar_sft: 1 of 4 texts (25.0%) have more tokens than max_reco" in capsys.readouterr().err


def test_nothing_is_told_where_every_text_fits(codec_and_rows, capsys):
    codec, data = codec_and_rows
    codec = dataclasses.replace(codec, max_explanation_tokens=tokens(codec, data.explanations[3]) + 1)
    assert len(closed_answers(codec, data, 4)["lengths_B"]) == 4
    reconstructor_prompts(codec, data, data.explanations, "ar_sft")
    assert capsys.readouterr().err == ""
