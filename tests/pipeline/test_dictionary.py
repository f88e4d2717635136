import json
import shutil

import pytest
from safetensors import safe_open

from nla_jax.commands.data import main
from nla_jax.config import CorpusConfig, ExperimentConfig, ModelConfig, save_config
from nla_jax.data.extraction import ExtractionConfig
from nla_jax.evaluation.dictionary_files import METADATA_KEY, read_dictionary
from nla_jax.pipeline import dictionary
from nla_jax.pipeline.explain import explain
from nla_jax.pipeline.extract import extract
from nla_jax.pipeline.run import Run

WIDTH = 32


@pytest.fixture(scope="module")
def run(shallow_model_dir, tmp_path_factory):
    """A run on 48 short documents that has its data."""
    directory = tmp_path_factory.mktemp("described")
    lines = [
        json.dumps({"id": f"doc {i}", "text": f"Number {i}: " + f"{i} words follow here " * 12, "genre": "g"})
        for i in range(48)
    ]
    (directory / "corpus.jsonl").write_text("\n".join(lines))
    corpus = CorpusConfig(str(directory / "corpus.jsonl"), av_sft=0.3, ar_sft=0.3, rl=0.2, held_out=0.2)
    extraction = ExtractionConfig(max_tokens=40, min_position=20, positions_per_document=4, length_buckets=1)
    config = ExperimentConfig(
        "described", model=ModelConfig(str(shallow_model_dir), layer=1), corpus=corpus, extraction=extraction
    )
    made = Run(config, directory / "run")
    extract(made)
    explain(made)
    save_config(config, directory / "run" / "config.json")
    return made


def test_the_command_trains_on_rows_that_are_not_held_out(run, capsys):
    main(["dictionary", str(run.directory), "--width", "2", "-k", "4", "--steps", "30", "--batch-size", "32"])
    printed, warned = capsys.readouterr()
    assert "learns" not in warned
    rows = sum(len(run.open(split)) for split in ("av_sft", "ar_sft", "rl"))
    assert f"64 features from {rows} training rows" in printed
    path = run.directory / "dictionary.safetensors"
    assert f"nla evaluate {run.directory} --evaluation.dictionary {path}" in printed
    with safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()[METADATA_KEY])
    assert (about["layer"], about["recipe"]["steps"], about["recipe"]["rows"]) == (1, 30, rows)
    found = read_dictionary(path, layer=1, d_model=WIDTH)
    held_out = run.held_out(256).activations
    assert ((found.strengths(held_out) > 0).sum(axis=1) <= 4).all()
    rebuilt = found.decode(found.strengths(held_out), held_out)
    explained = run.yardstick.fve_nrm(rebuilt, [""] * len(held_out), held_out)
    assert f"explain fve_nrm {explained:.3f}" in printed


def test_more_features_than_rows_are_warned_of(run, tmp_path, capsys):
    out = ["-o", str(tmp_path / "wide.safetensors")]
    main(["dictionary", str(run.directory), "--width", "8", "-k", "4", "--steps", "2", *out])
    rows = sum(len(run.open(split)) for split in ("av_sft", "ar_sft", "rl"))
    assert f"256 features learns {rows} rows by heart; lower width=8" in capsys.readouterr().err


def test_of_very_many_rows_each_split_gives_its_share(run, monkeypatch):
    sizes = [len(run.open(split)) for split in ("av_sft", "ar_sft", "rl")]
    whole = dictionary.training_rows(run)
    assert len(whole) == sum(sizes)
    monkeypatch.setattr(dictionary, "TRAINING_ROWS", sum(sizes) // 2)
    half = dictionary.training_rows(run)
    assert abs(len(half) - sum(sizes) / 2) <= 3
    assert {row.tobytes() for row in half} < {row.tobytes() for row in whole}


def test_what_cannot_be_trained_is_told(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="end its name in .safetensors"):
        main(["dictionary", str(run.directory), "-o", str(tmp_path / "features.npz")])
    with pytest.raises(SystemExit, match="k of a dictionary is 0"):
        main(["dictionary", str(run.directory), "-k", "0"])
    with pytest.raises(SystemExit, match="is not a run directory"):
        main(["dictionary", str(tmp_path)])
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run.directory / "config.json", bare / "config.json")
    with pytest.raises(SystemExit, match="av_sft"):
        main(["dictionary", str(bare)])
    assert not list(tmp_path.rglob("*.safetensors"))
