"""Joint training: GRPO for the AV on the AR's reconstruction, regression for the AR, no gradient between them.

One round: sample groups of explanations, decode them, let one AR update score and learn from them at once (its
errors before the update are the rewards), then one policy update of the AV.
Shape letters: N activations, G group, B = N * G rollouts, T time, D model.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from nla_jax.autoencoder.metrics import reward
from nla_jax.autoencoder.prompts import decode_responses
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import Verbalizer
from nla_jax.data.batches import reconstructor_rows
from nla_jax.mesh import shard_batch
from nla_jax.training.grpo import PolicyLossConfig, Rollouts, grpo_step
from nla_jax.training.loop import LoopConfig, States
from nla_jax.training.state import OptimizerConfig
from nla_jax.training.supervised import ReconstructorBatch, ar_mse_step, jit_step


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Joint training of AV and AR."""

    loop: LoopConfig = LoopConfig(steps=100, evaluate_every=10, checkpoint_every=10)
    """A step is a round: one batch of rollouts, one AV and one AR update."""
    activations: int = 8
    """Activations a round."""
    group: int = 4
    """Explanations an activation."""
    micro_batches: int = 1
    """Pieces each update is cut into; divides `activations`."""
    policy: PolicyLossConfig = PolicyLossConfig()
    av_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-5)
    ar_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-5)
    reward: Literal["neg_mse", "neg_log_mse"] = "neg_mse"
    length_hinge_start: int | None = None
    """Tokens from which on each further one costs `length_hinge_slope` reward; start it before the cut."""
    length_hinge_slope: float = 0.02


@dataclasses.dataclass(frozen=True)
class TextCodec:
    """How texts become AR prompts and sampled answers become texts."""

    tokenizer: PreTrainedTokenizerBase
    verbalizer: Verbalizer
    reconstructor: Reconstructor
    max_explanation_tokens: int
    max_reconstructor_tokens: int

    def decode(self, samples: Any) -> list[str | None]:
        """Texts of sampled answers, None where extraction fails."""
        arrays = (np.asarray(x) for x in (samples.tokens_BT, samples.lengths_B, samples.closed_B))
        return decode_responses(self.tokenizer, self.verbalizer.prompt, *arrays)

    def encode(self, activations_BD: np.ndarray, texts: Sequence[str | None]) -> dict[str, np.ndarray]:
        """AR rows of texts."""
        prompt, length = self.reconstructor.prompt, self.max_reconstructor_tokens
        return dict(reconstructor_rows(activations_BD, texts, self.tokenizer, prompt, length))


def make_round(
    config: RLConfig, codec: TextCodec, reference_params: Any, mesh: Mesh, key: jax.Array
) -> Callable[[States, dict[str, np.ndarray], int], tuple[States, dict[str, Any]]]:
    """Compile one round of joint training as a step for `run_stage`.

    Args:
      config: static.
      codec: static.
      reference_params: the warm-start AV, best as `Verbalizer.frozen` gives it.
      mesh: rollouts are split over its data and fsdp axes.
      key: round i samples with fold_in(key, i).

    Returns:
      (states {"av", "ar"}, batch {"activations_BD"}, round) -> (states, metrics). The metrics add reward_mean,
      reward_std (within groups), failed_fraction and length_mean to those of the two updates.
    """
    verbalizer, G, T = codec.verbalizer, config.group, codec.max_explanation_tokens

    @jax.jit
    def sample(params, activations_ND, key):
        temperature = config.policy.temperature
        return verbalizer.sample(params, activations_ND, key, group=G, max_tokens=T, temperature=temperature)

    @jax.jit
    def rewards(mse_B, failed_B, lengths_B):
        return reward(
            mse_B,
            failed_B,
            kind=config.reward,
            lengths=lengths_B,
            length_hinge_start=config.length_hinge_start,
            length_hinge_slope=config.length_hinge_slope,
        )

    av_step = jit_step(
        grpo_step,
        verbalizer=verbalizer,
        optimizer=config.av_optimizer.build(),
        config=config.policy,
        micro_batches=config.micro_batches,
    )
    ar_step = jit_step(
        ar_mse_step,
        reconstructor=codec.reconstructor,
        optimizer=config.ar_optimizer.build(),
        micro_batches=config.micro_batches,
    )

    def run_round(states: States, batch: dict[str, np.ndarray], index: int):
        activations_ND = shard_batch(batch["activations_BD"], mesh)
        samples = sample(states["av"].params, activations_ND, jax.random.fold_in(key, index))
        texts = codec.decode(samples)
        rows = codec.encode(np.repeat(batch["activations_BD"], G, axis=0), texts)
        ar, ar_metrics = ar_step(states["ar"], ReconstructorBatch(**shard_batch(rows, mesh)))
        failed_B = jnp.asarray(rows["weights_B"] == 0)
        rewards_NG = rewards(ar_metrics["mse_nrm_B"], failed_B, samples.lengths_B).reshape(-1, G)
        rollouts = Rollouts(
            activations_ND,
            samples.tokens_BT.reshape(-1, G, T),
            samples.lengths_B.reshape(-1, G),
            samples.log_probs_BT.reshape(-1, G, T),
            rewards_NG,
        )
        av, av_metrics = av_step(states["av"], rollouts, reference_params)
        metrics = {f"av_{name}": av_metrics[name] for name in ("loss", "grad_norm")}
        metrics |= {f"ar_{name}": ar_metrics[name] for name in ("loss", "grad_norm")}
        metrics |= {name: value for name, value in av_metrics.items() if name not in ("loss", "grad_norm")}
        metrics["bad_steps"] = jnp.maximum(av_metrics["bad_steps"], ar_metrics["bad_steps"])
        metrics["reward_mean"] = rewards_NG.mean()
        metrics["reward_std"] = rewards_NG.std(axis=1).mean()
        metrics["failed_fraction"] = failed_B.mean()
        metrics["length_mean"] = samples.lengths_B.mean()
        return {"av": av, "ar": ar}, metrics

    return run_round


def optimizers(config: RLConfig) -> dict[str, optax.GradientTransformation]:
    """The optimizer of each trained model, by its name in the states."""
    return {"av": config.av_optimizer.build(), "ar": config.ar_optimizer.build()}
