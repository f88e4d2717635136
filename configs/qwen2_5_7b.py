"""An NLA for layer 20 of Qwen2.5-7B-Instruct by full fine-tuning, as docs/paper_recipe.md tells. Not run yet.

Sizes, rates and schedules are those that the reference project published for this model, with half its batches and the
rates of its warm starts scaled by the square root of that. Its authors call them a working point and no optimum.
"""

from nla_jax.autoencoder.verbalizer import InjectionConfig
from nla_jax.chat.config import ChatConfig
from nla_jax.config import ExperimentConfig, ModelConfig, ReconstructorWarmStartConfig, WarmStartConfig
from nla_jax.data.corpora.config import CorpusConfig
from nla_jax.data.extraction import ExtractionConfig
from nla_jax.data.writers.chat import ChatWriterConfig
from nla_jax.data.writers.config import WriterConfig
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.sharding.mesh import MeshConfig
from nla_jax.training.loop import LoopConfig
from nla_jax.training.round_programs import RLConfig
from nla_jax.training.state import OptimizerConfig


def get_config() -> ExperimentConfig:
    loop = LoopConfig(steps=2000, evaluate_every=250, checkpoint_every=500)
    optimizer = OptimizerConfig(learning_rate=1.4e-5, warmup_steps=100, decay_steps=2000)
    return ExperimentConfig(
        name="qwen2_5_7b",
        # Sends less a round than fsdp alone, and leaves room for the copy that samples; 1 for a single device.
        mesh=MeshConfig(tensor=4),
        model=ModelConfig(
            path="Qwen/Qwen2.5-7B-Instruct",
            layer=20,
            dtype="bfloat16",
            attention_dtype="bfloat16",
            remat=True,
        ),
        # A million rows: a quarter for each warm start, and about one epoch in every stage.
        corpus=CorpusConfig(
            sources=("hf:HuggingFaceFW/fineweb:sample-10BT:train", "hf:allenai/WildChat-1M:train"),
            weights=(0.7, 0.3),
            max_documents=100_000,
            duplicates="near",
            min_characters=400,
            av_sft=0.25,
            ar_sft=0.25,
            rl=0.48,
            held_out=0.02,
        ),
        extraction=ExtractionConfig(
            max_tokens=512,
            positions_per_document=10,
            batch_size=64,
            storage="bfloat16",
            # Texts are asked for shard by shard: few and large ones, for the sake of message batches.
            shard_documents=4096,
        ),
        writer=WriterConfig(
            name="chat", chat=ChatWriterConfig(chat=ChatConfig(model="anthropic:claude-haiku-4-5"))
        ),
        injection=InjectionConfig(scale=150.0),
        # The writer is asked for at most 110 words; with their closing they have to fit.
        max_explanation_tokens=160,
        max_reconstructor_tokens=192,
        av_sft=WarmStartConfig(loop, batch_size=128, optimizer=optimizer),
        ar_sft=ReconstructorWarmStartConfig(loop, batch_size=128, optimizer=optimizer),
        rl=RLConfig(
            loop=LoopConfig(steps=4000, evaluate_every=100, checkpoint_every=100),
            activations=128,
            group=8,
            micro_batches=8,
            av_optimizer=OptimizerConfig(learning_rate=1e-5),
            ar_optimizer=OptimizerConfig(learning_rate=5e-5),
            # Rewards lengthen texts; those that reach the cut have failed.
            length_hinge_start=140,
        ),
        evaluation=EvaluationConfig(rows=1024, monitor_rows=256, batch_size=128),
    )
