"""An NLA for layer 20 of Qwen2.5-7B-Instruct by full fine-tuning. Not run yet; docs/scaling.md tells how to plan it."""

from nla_jax.autoencoder.verbalizer import InjectionConfig
from nla_jax.config import ExperimentConfig, ModelConfig, ReconstructorWarmStartConfig, WarmStartConfig
from nla_jax.data.extraction import ExtractionConfig
from nla_jax.sharding.mesh import MeshConfig
from nla_jax.training.joint import RLConfig
from nla_jax.training.loop import LoopConfig


def get_config() -> ExperimentConfig:
    loop = LoopConfig(steps=2000, evaluate_every=250, checkpoint_every=500)
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
        extraction=ExtractionConfig(max_tokens=512, positions_per_document=12, batch_size=64),
        injection=InjectionConfig(scale=150.0),
        max_explanation_tokens=128,
        max_reconstructor_tokens=160,
        av_sft=WarmStartConfig(loop, batch_size=128),
        ar_sft=ReconstructorWarmStartConfig(loop, batch_size=128),
        rl=RLConfig(
            loop=LoopConfig(steps=4000, evaluate_every=100, checkpoint_every=100),
            activations=128,
            group=8,
            micro_batches=8,
        ),
    )
