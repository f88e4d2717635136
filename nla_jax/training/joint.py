"""Joint training: GRPO for the AV on the AR's reconstruction, regression for the AR, no gradient between them.

One round: sample groups of explanations, turn them into texts on the host while the device asks the reference for
their log-probs, let one AR update score and learn from them at once (its errors before the update are the rewards),
then one policy update of the AV. Nothing but the texts waits for the device.
Shape letters: N activations, G group, B = N * G rollouts, T time, D model.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.metrics import reward
from nla_jax.autoencoder.verbalizer import Verbalizer
from nla_jax.lm.lora import FrozenBase, with_adapters
from nla_jax.lm.packing import token_budget
from nla_jax.lm.sampling import Samples
from nla_jax.sharding.aliasing import jit_aliasing
from nla_jax.sharding.mesh import BATCH, tree_shardings
from nla_jax.sharding.placement import block_on_simulated_devices, place_process_rows, process_rows
from nla_jax.training.grpo import PolicyLossConfig, Rollouts, grpo_step, reference_log_probs
from nla_jax.training.guards import GuardConfig
from nla_jax.training.loop import LoopConfig, States, Step, scalars
from nla_jax.training.state import OptimizerConfig
from nla_jax.training.stopwatch import Lap, Stopwatch
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
    length_buckets: int = 8
    """Programs that an update is compiled to at most, for batches with more or fewer tokens, so that padding costs
    little; 1 compiles one, for full length, which pays off in short runs. On one device only."""
    gather_weights: bool = True
    """Whether the AV that samples is whole along the mesh's fsdp axis: a copy, gathered once a round and not in every
    token step. The embedding, which is looked up, stays split. False saves the copy's memory; what is in compute dtype,
    as a base of adapters may be, is not copied then."""
    guards: GuardConfig = GuardConfig()


def sampling_weights(verbalizer: Verbalizer, params: Any, mesh: Mesh, *, gather: bool) -> Any:
    """The AV as it samples, with `gather` whole along fsdp; what is in compute dtype and in place stays as it is."""
    weights = verbalizer.for_decoding(params)
    if mesh.size == 1:
        return weights
    given, one = {id(x) for x in jax.tree.leaves(params)}, jax.lax.optimization_barrier(jnp.float32(1))

    def moved(x: jax.Array, split: NamedSharding, wanted: NamedSharding) -> jax.Array:
        if id(x) in given and split == wanted:
            return x
        # Split as it came first: it moves in compute dtype then.
        x = jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, split), wanted)
        # What is gathered cannot be a program's result on TPU. XLA would copy it, everything at the very end, when all
        # of it is there twice; a product is made at once.
        return x if split == wanted else x * one.astype(x.dtype)

    gathered = gather and mesh.shape["fsdp"] > 1
    shardings = (tree_shardings(weights, mesh, gathered=moves) for moves in (False, gathered))
    return jax.tree.map(moved, weights, *shardings)


def make_round(
    config: RLConfig,
    codec: Autoencoder,
    reference_params: Any,
    mesh: Mesh,
    key: jax.Array,
    bases: Mapping[str, FrozenBase] | None = None,
) -> Step:
    """Compile one round of joint training as a step for `run_stage`.

    Args:
      config: static.
      codec: static.
      reference_params: the warm-start AV, best as `Verbalizer.frozen` gives it.
      mesh: rollouts are split over its data and fsdp axes.
      key: round i samples with fold_in(key, i).
      bases: the frozen weights of "av" and "ar" where what is trained are adapters.

    Returns:
      (states {"av", "ar"}, batch {"activations_BD"}, round) -> (states, metrics to come). The metrics add
      reward_mean, reward_std (within groups), failed_fraction and length_mean to those of the two updates, and the
      speed of the phases: prefill, decode, reference (where the KL is k3), ar_update (which gives the rewards) and
      av_update on the device, texts on the host.
    """
    verbalizer, G, T = codec.verbalizer, config.group, codec.max_explanation_tokens
    temperature, pieces = config.policy.temperature, config.micro_batches
    av_base, ar_base = ((bases or {}).get(model) for model in ("av", "ar"))
    stopwatch, read = Stopwatch(verbalizer.config.dtype), jax.jit(verbalizer.read)

    @jit_aliasing
    def copied(base, trained):
        return sampling_weights(verbalizer, with_adapters(base, trained), mesh, gather=config.gather_weights)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, BATCH))
    def write(params, past, final_ND, key):
        return verbalizer.write(params, past, final_ND, key, group=G, max_tokens=T, temperature=temperature)

    @functools.partial(jax.jit, static_argnames="tokens")
    def refer(params, activations_ND, samples, tokens):
        tokens_NGT, lengths_NG = samples.tokens_BT.reshape(-1, G, T), samples.lengths_B.reshape(-1, G)
        static = {"verbalizer": verbalizer, "temperature": temperature, "micro_batches": pieces}
        return reference_log_probs(params, activations_ND, tokens_NGT, lengths_NG, tokens=tokens, **static)

    def budget(lengths_B, max_length: int) -> int | None:
        if mesh.size > 1 or config.length_buckets == 1:
            return None
        buckets = config.length_buckets
        return token_budget(np.asarray(lengths_B), max_length, micro_batches=pieces, buckets=buckets)

    @jax.jit
    def score(activations_ND, samples, mse_B, weights_B, reference_NGT):
        failed_B = weights_B == 0
        rewards_NG = reward(
            mse_B,
            failed_B,
            kind=config.reward,
            lengths=samples.lengths_B,
            length_hinge_start=config.length_hinge_start,
            length_hinge_slope=config.length_hinge_slope,
        ).reshape(-1, G)
        rollouts = Rollouts(
            activations_ND,
            samples.tokens_BT.reshape(-1, G, T),
            samples.lengths_B.reshape(-1, G),
            samples.log_probs_BT.reshape(-1, G, T),
            rewards_NG,
            reference_NGT,
        )
        metrics = {
            "reward_mean": rewards_NG.mean(),
            "reward_std": rewards_NG.std(axis=1).mean(),
            "failed_fraction": failed_B.mean(),
            "length_mean": samples.lengths_B.mean(),
        }
        return rollouts, metrics

    av_step = jit_step(
        grpo_step,
        verbalizer=verbalizer,
        optimizer=config.av_optimizer.build(),
        config=config.policy,
        micro_batches=pieces,
    )
    ar_step = jit_step(
        ar_mse_step,
        reconstructor=codec.reconstructor,
        optimizer=config.ar_optimizer.build(),
        micro_batches=pieces,
    )

    def sample(params: Any, activations_ND: jax.Array, key: jax.Array, lap: Lap) -> Samples:
        # What is a copy lives as long as this call.
        weights = block_on_simulated_devices(copied(av_base, params))
        past, final_ND = read(weights, activations_ND)
        lap.until("prefill", final_ND)
        samples = write(weights, past, final_ND, key)
        lap.until("decode", samples.lengths_B)
        return samples

    def run_round(states: States, batch: dict[str, np.ndarray], index: int):
        lap = stopwatch.lap()
        activations_ND = place_process_rows(batch["activations_BD"], config.activations, mesh)
        samples = sample(states["av"].params, activations_ND, jax.random.fold_in(key, index), lap)
        reference_NGT, answer_tokens = None, budget(samples.lengths_B, T)
        if config.policy.kl == "k3":
            reference_NGT = refer(reference_params, activations_ND, samples, tokens=answer_tokens)
            lap.until("reference", reference_NGT)
        jax.block_until_ready(samples)
        started = time.perf_counter()
        activations_BD = np.repeat(batch["activations_BD"], G, axis=0)
        rows = codec.encode(activations_BD, codec.decode(*process_rows(samples.answers)))
        ar_batch = ReconstructorBatch(**place_process_rows(rows, len(samples.lengths_B), mesh))
        texts_seconds = time.perf_counter() - started
        prompt_tokens = budget(rows["lengths_B"], codec.max_reconstructor_tokens)
        ar, ar_metrics = ar_step(states["ar"], ar_batch, ar_base, tokens=prompt_tokens)
        lap.until("ar_update", ar_metrics["loss"])
        mse_B, weights_B = ar_metrics["mse_nrm_B"], ar_batch.weights_B
        rollouts, scores = block_on_simulated_devices(
            score(activations_ND, samples, mse_B, weights_B, reference_NGT)
        )
        av, av_metrics = av_step(states["av"], rollouts, reference_params, av_base, tokens=answer_tokens)
        lap.until("av_update", av_metrics["loss"])

        def metrics() -> dict[str, float]:
            named = {f"av_{name}": av_metrics[name] for name in ("loss", "grad_norm")}
            named |= {f"ar_{name}": ar_metrics[name] for name in ("loss", "grad_norm")}
            named |= {name: x for name, x in av_metrics.items() if name not in ("loss", "grad_norm")}
            bad_steps = max(int(x["bad_steps"]) for x in (av_metrics, ar_metrics))
            row = scalars(named | scores | {"bad_steps": bad_steps})
            N = len(activations_ND)
            answers = verbalizer.forward_flops(N, N * G, row["length_mean"])
            flops = {
                "prefill": verbalizer.forward_flops(N, N, 0),
                "decode": verbalizer.decode_flops(N * G, row["length_mean"]),
                "reference": answers,
                "ar_update": 3 * codec.reconstructor.forward_flops(N * G, rows["lengths_B"].mean()),
                "av_update": 3 * answers,
            }
            if reference_NGT is None:
                flops["av_update"] += flops.pop("reference")
            row |= lap.metrics(flops) | {"speed/texts_seconds": texts_seconds}
            tokens = row["length_mean"] * N * G
            row["speed/decode_tokens_per_second"] = tokens / row["speed/decode_seconds"]
            row["speed/rollouts_per_second"] = N * G / row["speed/seconds"]
            return row

        return {"av": av, "ar": ar}, metrics

    return run_round


def optimizers(config: RLConfig) -> dict[str, optax.GradientTransformation]:
    """The optimizer of each trained model, by its name in the states."""
    return {"av": config.av_optimizer.build(), "ar": config.ar_optimizer.build()}
