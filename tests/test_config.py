import dataclasses
import json
from pathlib import Path

import pytest

from nla_jax.config import ExperimentConfig, load_config, read_config, save_config
from nla_jax.data.extraction import ExtractionConfig
from nla_jax.data.positions import PlaceWeights
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.evaluate import evaluation_digest
from nla_jax.pipeline.run import Run
from nla_jax.process import join_processes

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_survives_json(path, tmp_path):
    config = load_config(path)
    assert config.name == path.stem
    save_config(config, tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == config


def test_a_config_of_an_earlier_version_reads_all_tokens_alike(tmp_path):
    save_config(ExperimentConfig("x", extraction=ExtractionConfig(by_place=False)), tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    del values["extraction"]["by_place"], values["extraction"]["place_weights"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    earlier = read_config(tmp_path / "config.json")
    assert not earlier.extraction.by_place
    weighted = ExtractionConfig(place_weights=PlaceWeights(inside=0.3))
    digests = {
        stage_digest(dataclasses.replace(earlier, extraction=extraction), "extract")
        for extraction in (earlier.extraction, ExtractionConfig(), weighted)
    }
    assert len(digests) == 3


@pytest.mark.parametrize(("earlier", "tracker"), [(True, "tensorboard"), (False, "")])
def test_a_run_of_an_earlier_version_keeps_its_tracker(earlier, tracker, tmp_path):
    save_config(load_config(CONFIGS[0]), path := tmp_path / "config.json")
    values = json.loads(path.read_text())
    del values["tracker"]
    path.write_text(json.dumps(values | {"tensorboard": earlier}))
    assert read_config(path).tracker == tracker


def test_a_config_file_with_a_field_that_there_is_not(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from nla_jax.config import ExperimentConfig\n"
        'def get_config():\n    return ExperimentConfig("mine", tensorboard=True)\n'
    )
    with pytest.raises(
        ValueError, match=r"mine\.py names a field .*'tensorboard'; .* tracker=\"tensorboard\""
    ):
        load_config(path)


def test_digest_follows_what_defines_a_stage():
    config = ExperimentConfig("x")
    longer = dataclasses.replace(
        config, rl=dataclasses.replace(config.rl, loop=dataclasses.replace(config.rl.loop, steps=999))
    )
    other_ar = dataclasses.replace(config, ar_sft=dataclasses.replace(config.ar_sft, batch_size=3))
    assert stage_digest(config, "rl") == stage_digest(longer, "rl")
    assert stage_digest(config, "explain") == stage_digest(other_ar, "explain")
    assert stage_digest(config, "ar_sft") != stage_digest(other_ar, "ar_sft")
    assert stage_digest(config, "rl") != stage_digest(other_ar, "rl")
    assert stage_digest(config, "extract") != stage_digest(dataclasses.replace(config, seed=1), "extract")


def test_options_that_runs_of_earlier_versions_lacked_leave_their_digests_as_they_were():
    config = ExperimentConfig("x")
    # What it was before there were any of them, for a run that reads every token alike.
    before = dataclasses.replace(config, extraction=ExtractionConfig(by_place=False))
    assert stage_digest(before, "rl") == "6c4afe8d313de99f"

    def changed(part, **values):
        return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})

    loop = dataclasses.replace(config.distill.loop, steps=5)
    for stage, other in (
        ("ar_sft", changed("ar_sft", verbalized_samples=4)),
        ("ar_sft", changed("ar_sft", cut=(2, 9))),
        ("rl", changed("rl", ar_updates=2)),
        ("rl", changed("rl", policy=dataclasses.replace(config.rl.policy, drop_flat_groups=True))),
        ("rl", changed("distill", loop=loop)),
    ):
        assert stage_digest(other, stage) != stage_digest(config, stage)
    assert stage_digest(changed("distill", samples=3), "rl") == stage_digest(config, "rl")
    assert stage_digest(changed("distill", loop=loop), "ar_sft") == stage_digest(config, "ar_sft")


def test_a_chat_model_defines_the_evaluation_but_not_every_suite(tmp_path):
    plain, asking = (
        ExperimentConfig("x"),
        ExperimentConfig("x", evaluation=EvaluationConfig(chat_model="openai:m")),
    )
    assert stage_digest(plain, "evaluate") == stage_digest(asking, "evaluate")
    assert evaluation_digest(Run(plain, tmp_path)) != evaluation_digest(Run(asking, tmp_path))


def test_sizes_of_an_evaluation_are_positive():
    with pytest.raises(ValueError, match=r"evaluation\.rows is 0; expected a positive number"):
        EvaluationConfig(rows=0)


def test_missing_config_lists_its_neighbors():
    with pytest.raises(FileNotFoundError, match=r"configs/no\.py does not exist; there are: .*tiny\.py"):
        load_config(CONFIGS[0].parent / "no.py")


def test_config_file_without_get_config(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match="must define get_config"):
        load_config(path)


def test_directory_without_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run directory"):
        read_config(tmp_path / "config.json")


def test_a_place_among_processes_that_makes_no_sense_is_an_error():
    for value in ("localhost", "localhost:1,2,2", "localhost:1,2"):
        with pytest.raises(ValueError, match=f"--distributed {value}: expected HOST:PORT,PROCESSES,INDEX"):
            join_processes(["config.py", "--distributed", value])
    assert join_processes(["config.py", "--mesh.fsdp", "2"]) == ["config.py", "--mesh.fsdp", "2"]


@pytest.mark.parametrize("name", ["qwen2_5_7b", "gemma3_12b", "gemma3_27b", "llama3_3_70b"])
def test_large_recipes_pass_over_no_split_more_than_twice_and_name_a_corpus_and_a_writer(name):
    config = load_config(CONFIGS[0].with_name(f"{name}.py"))
    rows = config.corpus.max_documents * config.extraction.positions_per_document
    for stage, batch_size in (
        ("av_sft", config.av_sft.batch_size),
        ("ar_sft", config.ar_sft.batch_size),
        ("rl", config.rl.activations),
    ):
        epochs = getattr(config, stage).loop.steps * batch_size / (rows * config.corpus.fractions[stage])
        assert 0.5 < epochs < 2, stage
    assert "docstrings" not in config.corpus.mixture and config.writer.name == "chat"
    assert sum(config.corpus.fractions.values()) == pytest.approx(1)
    rates = config.rl.ar_optimizer.learning_rate / config.rl.av_optimizer.learning_rate
    assert rates == pytest.approx(5)
