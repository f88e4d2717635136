"""An NLA for layer 53 of Llama-3.3-70B: the recipe of qwen2_5_7b.py. Not run yet, see docs/paper_recipe.md."""

import dataclasses
from pathlib import Path

from nla_jax.autoencoder.verbalizer import InjectionConfig
from nla_jax.config import ExperimentConfig, load_config


def get_config() -> ExperimentConfig:
    recipe = load_config(Path(__file__).with_name("qwen2_5_7b.py"))
    return dataclasses.replace(
        recipe,
        name="llama3_3_70b",
        model=dataclasses.replace(recipe.model, path="meta-llama/Llama-3.3-70B-Instruct", layer=53),
        injection=InjectionConfig(scale=30.0),
    )
