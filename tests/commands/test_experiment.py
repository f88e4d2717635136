import dataclasses

import pytest
from processes import ROOT

from nla_jax.commands.experiment import parse
from nla_jax.config import save_config
from nla_jax.files import write_text

TINY = str(ROOT / "configs" / "tiny.py")


def test_prompt_options_from_the_command_line():
    config, _ = parse([TINY, "--templates.no-chat", "--templates.marker", "㊗"], "nla train")
    assert (config.templates.chat, config.templates.marker) == (False, "㊗")
    config, _ = parse([TINY, "--templates.marker", "None"], "nla train")
    assert (config.templates.chat, config.templates.marker) == (True, None)


def test_command_line_overrides_by_name(tmp_path):
    changes = ["--rl.loop.steps", "7", "--run-dir", str(tmp_path), "--injection.layer", "-1"]
    config, run_dir = parse([TINY, *changes], "nla train")
    assert (config.rl.loop.steps, config.injection.layer, run_dir) == (7, -1, tmp_path)


def test_unknown_override_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        parse([TINY, "--rl.loop.stepz", "7"], "nla train")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "stepz" in message and "rl.loop.steps" in message


def test_a_shipped_config_is_known_by_its_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, run_dir = parse(["tiny"], "nla train")
    assert config == parse([TINY], "nla train")[0]
    assert str(run_dir) == "runs/tiny"


def test_the_directory_of_a_run_goes_before_a_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    config, run_dir = parse(["tiny"], "nla train")
    assert (config.name, str(run_dir)) == ("tiny", "runs/tiny")
    save_config(dataclasses.replace(config, seed=17), tmp_path / "tiny" / "config.json")
    config, run_dir = parse(["tiny"], "nla train")
    assert (config.seed, str(run_dir)) == (17, "tiny")


def test_a_config_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tyni does not exist.*: gemma3_12b, .*, tiny$"):
        parse(["tyni"], "nla train")
    with pytest.raises(
        FileNotFoundError, match=r"elsewhere/tiny\.py does not exist.*; tiny alone is one of them"
    ):
        parse(["elsewhere/tiny.py"], "nla train")
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"beside it there are: .*mine\.py"):
        parse([str(tmp_path / "other.py")], "nla train")


def test_a_tracker_is_chosen_by_name_and_its_earlier_option_is_answered():
    assert parse([TINY, "--tracker", "trackio"], "nla train")[0].tracker == "trackio"
    with pytest.raises(ValueError, match="--tensorboard has become .* give --tracker tensorboard"):
        parse([TINY, "--tensorboard"], "nla train")


def test_a_run_directory_that_is_left_out_is_asked_for():
    with pytest.raises(ValueError, match="--run-dir needs a directory"):
        parse([TINY, "--run-dir"], "nla train")


def test_a_run_in_a_bucket_is_given_by_its_address(bucket):
    config, run_dir = parse([TINY, "--run-dir", f"{bucket}/run"], "nla train")
    assert str(run_dir) == "gs://bucket/run"
    save_config(dataclasses.replace(config, seed=17), run_dir / "config.json")
    config, run_dir = parse([f"{bucket}/run"], "nla train")
    assert (config.seed, str(run_dir)) == (17, "gs://bucket/run")
    write_text(f"{bucket}/mine.py", "")
    for name in ("mine.py", "nothing"):
        with pytest.raises(
            FileNotFoundError, match=f"no run at gs://bucket/{name}; .* not run from a bucket"
        ):
            parse([f"{bucket}/{name}"], "nla train")
