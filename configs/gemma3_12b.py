"""An NLA for layer 32 of Gemma-3-12B: the recipe of qwen2_5_7b.py. Not run yet, see docs/paper_recipe.md."""

import dataclasses
from pathlib import Path

from nla_jax.autoencoder.verbalizer import InjectionConfig
from nla_jax.config import ExperimentConfig, load_config


def get_config() -> ExperimentConfig:
    recipe = load_config(Path(__file__).with_name("qwen2_5_7b.py"))
    return dataclasses.replace(
        recipe,
        name="gemma3_12b",
        model=dataclasses.replace(recipe.model, path="google/gemma-3-12b-it", layer=32),
        injection=InjectionConfig(scale=80000.0),
    )
