"""Every stage in a minute on a tiny model: for checking an installation. Give the model with --model.path."""

from nla_jax.autoencoder.prompts import PromptTemplates
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
from nla_jax.training.guards import GuardConfig
from nla_jax.training.loop import LoopConfig
from nla_jax.training.round_programs import RLConfig


def get_config() -> ExperimentConfig:
    loop = LoopConfig(steps=6, evaluate_every=3, checkpoint_every=2)
    return ExperimentConfig(
        name="tiny",
        model=ModelConfig(layer=1),
        corpus=CorpusConfig(max_documents=64, av_sft=0.3, ar_sft=0.3, rl=0.2, held_out=0.2),
        extraction=ExtractionConfig(max_tokens=64, batch_size=8, shard_documents=32),
        # A small tokenizer spells words letter by letter; longer texts would not fit into an answer.
        writer=WriterConfig(predictive=PredictiveConfig(ending_words=1, next_words=1, topic_words=0)),
        templates=PromptTemplates(closing="<|im_end|>"),
        max_explanation_tokens=40,
        max_reconstructor_tokens=96,
        av_sft=WarmStartConfig(loop, batch_size=8, length_buckets=1),
        ar_sft=ReconstructorWarmStartConfig(loop, batch_size=8, length_buckets=1),
        # A random model closes no answer, so all rewards are the same.
        rl=RLConfig(loop=loop, length_buckets=1, guards=GuardConfig(patience=100)),
        evaluation=EvaluationConfig(rows=16, monitor_rows=8, batch_size=8, bootstrap_samples=100),
    )
