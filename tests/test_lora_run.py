"""A run that trains adapters in place of all parameters."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from processes import ROOT, command, environment, finish
from safetensors.numpy import load_file
from test_end_to_end import corpus, read_metrics  # noqa: F401
from tiny_model import write_tiny_model

from nla_jax.config import ExperimentConfig, ModelConfig, read_config
from nla_jax.interop.meta import FILE_NAME
from nla_jax.interop.model_directories import load_verbalizer
from nla_jax.lm.files.peft import ADAPTER_CONFIG, ADAPTER_FILE, load_peft
from nla_jax.pipeline.export import export_run
from nla_jax.pipeline.load import load
from nla_jax.pipeline.run import Run
from nla_jax.training.checkpoint_files import describe
from nla_jax.training.loop import abstract
from nla_jax.training.round_programs import optimizers


@pytest.fixture(scope="module")
def adapted(shallow_model_dir, corpus, tmp_path_factory):  # noqa: F811
    run_dir = tmp_path_factory.mktemp("run") / "lora"
    more = ("--lora.rank", "4", "--lora.base-dtype", "bfloat16", "--evaluation.suites", "cost")
    finish(command("train_nla.py", shallow_model_dir, corpus, run_dir, *more))
    return run_dir


def test_checkpoints_hold_adapters_alone_and_joint_training_goes_on_with_their_moments(adapted):
    assert json.loads((adapted / "evaluation.json").read_text())["suites"]
    found = {description.path.parent.name: description for description in describe(adapted)}
    assert found.keys() == {"av_sft", "ar_sft", "rl"}
    for description in found.values():
        for held in description.trees.values():
            params = [path for path in held if path.startswith("params/")]
            assert all("lora" in path or path.startswith("params/head") for path in params)
    # Adam counts the steps of both stages: six of the warm start, six rounds.
    run = Run(read_config(adapted / "config.json"), adapted)
    assert run.models.bases.keys() == {"av", "ar"}
    like = {
        name: abstract(
            lambda name=name, optimizer=optimizer: run.models.initial_state(name, optimizer), run.mesh
        )
        for name, optimizer in optimizers(run.config.rl).items()
    }
    restored, _ = run.checkpoints("rl").restore(like)
    for state in restored.values():
        _, (adam, _, schedule) = state.opt_state
        assert (int(adam.count), int(schedule.count), int(state.step)) == (12, 6, 6)


def test_adapters_are_trained_and_the_reference_is_the_warm_start(adapted):
    metrics = read_metrics(adapted)
    assert metrics["av_sft", 6]["real_loss"] < metrics["av_sft", 0]["real_loss"]
    assert abs(metrics["rl", 1]["kl"]) < 1e-3


def test_export_of_adapters_and_of_the_whole(adapted, tmp_path):
    script = str(ROOT / "experiments" / "convert.py")
    finish([sys.executable, script, str(adapted), str(tmp_path / "adapters"), "--adapters"])
    run = Run(read_config(adapted / "config.json"), adapted)
    adapters, lora = load_peft(tmp_path / "adapters" / "av", run.models.lm_config)
    assert lora.rank == 4
    trained = run.models.trainable_params("rl", "av", run.checkpoints("rl").pinned())
    for name in ("lora_a", "lora_b"):
        ours = trained["lm"]["blocks_2"]["mlp"]["up"][name]
        np.testing.assert_array_equal(adapters["blocks_2"]["mlp"]["up"][name], ours)
    assert load_file(tmp_path / "adapters" / "ar" / "value_head.safetensors")["weight"].shape == (32, 32)
    finish([sys.executable, script, str(adapted), str(tmp_path / "whole")])
    tensors = load_file(tmp_path / "whole" / "av" / "model.safetensors")
    assert not any("lora" in name for name in tensors)
    up = run.models.target.params["blocks_2"]["mlp"]["up"]["kernel"].astype(np.float32)
    added = trained["lm"]["blocks_2"]["mlp"]["up"]
    expected = up + run.config.lora.scale * added["lora_a"] @ added["lora_b"]
    np.testing.assert_allclose(tensors["model.layers.2.mlp.up_proj.weight"].T, expected, rtol=1e-5, atol=1e-6)


def test_exported_adapters_are_the_runs_and_share_the_weights_of_the_target(adapted, tmp_path):
    config = read_config(adapted / "config.json")
    # The run rounded its base; who loads adapters takes the model as it is.
    exact = dataclasses.replace(config, lora=dataclasses.replace(config.lora, base_dtype="float32"))
    run = Run(exact, adapted)
    notes = export_run(run, tmp_path, adapters=True)
    assert any("adapters alone" in note for note in notes)
    assert {path.name for path in (tmp_path / "av").iterdir()} == {ADAPTER_CONFIG, ADAPTER_FILE, FILE_NAME}
    loaded = load(tmp_path, scan_blocks=False, quiet=True)
    of_target = loaded.target.params["blocks_1"]["mlp"]["up"]["kernel"]
    for params in (loaded.av_params, loaded.ar_params):
        assert params["lm"]["blocks_1"]["mlp"]["up"]["kernel"] is of_target
    assert loaded.autoencoder.reconstructor == run.models.autoencoder.reconstructor
    for name, params in (("av", loaded.av_params), ("ar", loaded.ar_params)):
        ours = run.models.model_params("rl", name, run.best_step())
        jax.tree.map(np.testing.assert_array_equal, ours, params)
    stacked = load(tmp_path, scan_blocks=True, quiet=True)
    vectors_ND = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    assert stacked.explain(vectors_ND).texts == loaded.explain(vectors_ND).texts
    rebuilt = (nla.reconstruct(["a text", "another"]) for nla in (stacked, loaded))
    np.testing.assert_allclose(*rebuilt, rtol=1e-5, atol=1e-5)
    script = str(ROOT / "experiments" / "verbalize.py")
    done = finish(
        [sys.executable, script, str(tmp_path), "The array has a shape.", "--position", "-1", "--json"]
    )
    assert [item["token"] for item in json.loads(done.stdout)] == ["."]
    # Without a base, the model that they name is loaded.
    alone = load_verbalizer(tmp_path / "av")
    jax.tree.map(np.testing.assert_array_equal, alone.params, loaded.av_params)


def test_adapters_on_another_model_are_refused(adapted, tmp_path):
    config = read_config(adapted / "config.json")
    export_run(Run(config, adapted), tmp_path / "adapters", adapters=True)
    wide = write_tiny_model(tmp_path / "wide", d_model=48, num_layers=3)
    with pytest.raises(
        ValueError, match=r"wide says d_model 48, nla_meta.yaml says 32; give the model that it adapts"
    ):
        load(tmp_path / "adapters", target=str(wide))
    deep = write_tiny_model(tmp_path / "deep", d_ff=80, num_layers=3)
    with pytest.raises(
        ValueError, match=r"lora_A.weight is \(4, 64\), expected \(4, 80\) for this model; load its own"
    ):
        load(tmp_path / "adapters", target=str(deep))


def test_inspection_lists_what_there_is_and_finds_damage(adapted, tmp_path):
    script = [sys.executable, str(ROOT / "experiments" / "inspect_checkpoint.py")]
    out = finish([*script, str(adapted), "--leaves"]).stdout
    header, *lines = [line.split() for line in out.split("\n\n")[0].splitlines()]
    assert header[:2] == ["stage", "step"]
    assert [line[:2] for line in lines[:2]] == [["ar_sft", "6"], ["av_sft", "6"]]
    assert {line[0] for line in lines[2:]} == {"rl"} and any("yes" in line for line in lines[2:])
    assert "64 documents of " in out
    assert "av/params/lm/blocks_0/attention/query/lora_a: float32 (32, 4)" in out
    assert "every number is as it was saved" in finish([*script, str(adapted), "--verify"]).stdout
    failed = subprocess.run(
        [*script, str(tmp_path)], env=environment(1), capture_output=True, text=True, cwd=ROOT
    )
    assert failed.returncode == 1 and "error: no complete checkpoint in" in failed.stderr


def test_a_run_without_adapters_has_none_to_export(shallow_model_dir, tmp_path):
    config = ExperimentConfig("x", model=ModelConfig(path=str(shallow_model_dir), layer=1))
    with pytest.raises(ValueError, match=r"was trained without adapters \(lora.rank=0\)"):
        export_run(Run(config, tmp_path), tmp_path / "out", adapters=True)
