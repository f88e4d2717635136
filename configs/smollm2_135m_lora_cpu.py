"""The NLA of smollm2_135m_cpu.py by adapters in place of all parameters, with learning rates to match."""

import dataclasses
from pathlib import Path

from nla_jax.config import ExperimentConfig, load_config
from nla_jax.lm.lora import LoraConfig


def get_config() -> ExperimentConfig:
    recipe = load_config(Path(__file__).with_name("smollm2_135m_cpu.py"))

    def rate(learning_rate, optimizer):
        return dataclasses.replace(optimizer, learning_rate=learning_rate)

    return dataclasses.replace(
        recipe,
        name="smollm2_135m_lora_cpu",
        lora=LoraConfig(rank=8),
        av_sft=dataclasses.replace(recipe.av_sft, optimizer=rate(2e-3, recipe.av_sft.optimizer)),
        ar_sft=dataclasses.replace(recipe.ar_sft, optimizer=rate(1.5e-3, recipe.ar_sft.optimizer)),
        rl=dataclasses.replace(
            recipe.rl,
            av_optimizer=rate(1e-4, recipe.rl.av_optimizer),
            ar_optimizer=rate(1.5e-4, recipe.rl.ar_optimizer),
        ),
    )
