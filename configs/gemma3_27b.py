"""An NLA for layer 41 of Gemma-3-27B: the recipe of qwen2_5_7b.py. Not run yet, see docs/paper_recipe.md."""

import dataclasses
from pathlib import Path

from nla_jax.autoencoder.verbalizer import InjectionConfig
from nla_jax.config import ExperimentConfig, load_config


def get_config() -> ExperimentConfig:
    recipe = load_config(Path(__file__).with_name("qwen2_5_7b.py"))
    return dataclasses.replace(
        recipe,
        name="gemma3_27b",
        model=dataclasses.replace(recipe.model, path="google/gemma-3-27b-it", layer=41),
        injection=InjectionConfig(scale=60000.0),
    )
