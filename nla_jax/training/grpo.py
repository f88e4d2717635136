"""Group-relative policy optimization of the AV (Shao et al. 2024), with a KL penalty to the warm-start AV.

Everything here is a pure function of recorded rollouts, so a step can be replayed and tested without sampling.
Shape letters: N activations, G group, B = N * G rollouts, T time.
"""

import dataclasses
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from nla_jax.autoencoder.verbalizer import Verbalizer, token_mask
from nla_jax.lm.logits import exact_kl
from nla_jax.lm.lora import FrozenBase, with_adapters
from nla_jax.training.state import LossSums, TrainState, update
from nla_jax.training.supervised import Given

MAX_LOG_RATIO = 12.0
"""Clamp of the log-ratio in the k3 estimator: rare tokens spike beyond it, a tighter clamp takes the brake away."""

FLAT_STD = 1e-4
"""Standard deviation of a group's rewards up to which they count as equal."""


@dataclasses.dataclass(frozen=True)
class PolicyLossConfig:
    """The policy gradient and its brakes."""

    ratio: Literal["ppo", "cispo", "reinforce"] = "ppo"
    """ppo clips the ratio inside a minimum; cispo clips it as a constant weight; reinforce ignores it."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    normalize_std: bool = True
    """Divide a group's centered rewards by a standard deviation."""
    std_of: Literal["group", "batch"] = "group"
    """Whose standard deviation that is. group gives every activation the same weight, however little its explanations
    differ. batch takes that of all centered rewards of a round, so that groups count by how much there is to choose."""
    drop_flat_groups: bool = False
    """Leave out groups whose rewards are all the same, to within `FLAT_STD`: neither their tokens nor their KL count.
    They have no advantages, so what they add to a round's mean is the pull to the reference alone."""
    kl: Literal["k3", "exact", "reward"] = "k3"
    """What holds the policy π near the reference q.

    k3 adds `exp(δ) − δ − 1` of each sampled token to the loss, with δ = log q − log π. Its mean is KL(π ‖ q). Its
    gradient `(1 − q/π) ∇log π` has the mean `−Σ q ∇log π`, which is that of KL(q ‖ π): it keeps up what the reference
    writes, and hardly pulls back what only the policy writes.

    exact adds KL(π ‖ q) over the vocabulary at each sampled place to the loss, with its own gradient there.

    reward takes `kl_coefficient · Σ (log π − log q)` over an answer's tokens off its reward, before a group's rewards
    are compared. The policy gradient's mean is then that of KL(π ‖ q) of whole answers.
    """
    kl_coefficient: float = 0.01
    """Weight of the KL in nats: against a token's loss for k3 and exact, against an answer's reward for reward (where
    `normalize_std` divides it by the group's standard deviation as well)."""
    temperature: float = 1.0
    """Temperature of the policy that is sampled and trained."""

    @property
    def kl_is_sampled(self) -> bool:
        """Whether the KL is of the sampled tokens, so that it takes of the reference their log-probs alone."""
        return self.kl != "exact"


@flax.struct.dataclass
class Rollouts:
    """Recorded explanations of N activations, groups adjacent along G."""

    activations_ND: Float[Given, "N D"]
    tokens_NGT: Int[Given, "N G T"]
    lengths_NG: Int[Given, "N G"]
    log_probs_NGT: Float[Given, "N G T"]
    """The sampler's, under the policy that wrote the tokens."""
    rewards_NG: Float[Given, "N G"]
    reference_log_probs_NGT: Float[Given, "N G T"] | None = None
    """Those of the reference, if they are known already (`reference_log_probs`)."""


def group_advantages(
    rewards_NG: Float[Array, "N G"],
    *,
    normalize_std: bool = True,
    std_of: str = "group",
    epsilon: float = 1e-4,
) -> Float[Array, "N G"]:
    """`(r − mean) / (std + ε)` with the mean of each group, or `r − mean` alone.

    Args:
      rewards_NG: rewards of N groups.
      normalize_std: whether to divide.
      std_of: whose standard deviation divides: each "group"'s own, or that of all centered rewards of the "batch".
      epsilon: ε.
    """
    centered_NG = rewards_NG - rewards_NG.mean(axis=1, keepdims=True)
    if not normalize_std:
        return centered_NG
    return centered_NG / (centered_NG.std(axis=1 if std_of == "group" else None, keepdims=True) + epsilon)


def k3(log_probs: Float[Array, "*B"], reference_log_probs: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Schulman's k3 estimate of KL(policy || reference) a token: `exp(δ) − δ − 1`, δ = log q − log p, clamped."""
    delta = jnp.clip(reference_log_probs - log_probs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.exp(delta) - delta - 1


def kl_of_answers(
    log_probs_NGT: Float[Array, "N G T"],
    reference_log_probs_NGT: Float[Array, "N G T"],
    lengths_NG: Int[Array, "N G"],
) -> Float[Array, "N G"]:
    """Unbiased estimate of KL(policy || reference) of whole answers in nats: `Σ log p − log q` over their tokens."""
    T = log_probs_NGT.shape[-1]
    is_token_NGT = token_mask(lengths_NG.reshape(-1), T).reshape(log_probs_NGT.shape) > 0
    return jnp.where(is_token_NGT, log_probs_NGT - reference_log_probs_NGT, 0).sum(axis=-1)


def policy_objective(
    log_probs: Float[Array, "*B"],
    old_log_probs: Float[Array, "*B"],
    advantages: Float[Array, "*#B"],
    config: PolicyLossConfig,
) -> Float[Array, "*B"]:
    """The loss of each token, to be minimized, without the KL term."""
    if config.ratio == "reinforce":
        return -advantages * log_probs
    ratio = jnp.exp(log_probs - old_log_probs)
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    if config.ratio == "cispo":
        return -jax.lax.stop_gradient(clipped) * advantages * log_probs
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def reference_log_probs(
    reference_params: Any,
    activations_ND: Float[Array, "N D"],
    tokens_NGT: Int[Array, "N G T"],
    lengths_NG: Int[Array, "N G"],
    *,
    verbalizer: Verbalizer,
    temperature: float = 1.0,
    micro_batches: int = 1,
    token_budget: int | None = None,
) -> Float[Array, "N G T"]:
    """Log-probabilities of sampled tokens under the reference, for `Rollouts`; they wait for no reward."""

    def of_piece(piece: tuple[Array, Array, Array]) -> Array:
        activations_MD, tokens_MGT, lengths_MG = piece
        tokens_BT = tokens_MGT.reshape(-1, tokens_MGT.shape[-1])
        statistics = verbalizer.statistics(
            reference_params, activations_MD, tokens_BT, lengths_MG.reshape(-1), temperature, token_budget
        )
        return statistics.log_prob.reshape(tokens_MGT.shape)

    rows = activations_ND, tokens_NGT, lengths_NG
    if micro_batches == 1:
        return of_piece(rows)
    pieces = tuple(x.reshape(micro_batches, -1, *x.shape[1:]) for x in rows)
    return jax.lax.map(of_piece, pieces).reshape(tokens_NGT.shape)


def grpo_step(
    state: TrainState,
    rollouts: Rollouts,
    reference_params: Any,
    base: FrozenBase | None = None,
    *,
    verbalizer: Verbalizer,
    optimizer: optax.GradientTransformation,
    config: PolicyLossConfig,
    micro_batches: int = 1,
    token_budget: int | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One policy update from recorded rollouts; the loss is averaged over all answer tokens, of groups that count.

    Cut answers count like any other: they keep their (worst) reward and are trained on.

    Args:
      state: the AV's; donated by `jit_step`.
      rollouts: what was sampled, with rewards.
      reference_params: the frozen warm-start AV; not read if the rollouts hold its log-probs, unless the KL is exact.
      base: the frozen weights, where the state's are adapters.
      verbalizer: static.
      optimizer: static.
      config: static.
      micro_batches: divides N.
      token_budget: static; how many tokens a micro-batch's answers have at most (`packing.budget_for_lengths`).

    Returns:
      The new state and metrics: loss, kl and entropy (nats a token; kl by k3, or exact), clip_fraction, and
      sampler_trainer_logprob_diff, the mean absolute difference between the sampler's and the trainer's
      log-probs of the same tokens under the same weights; flat_groups, the share of groups whose rewards are all the
      same. With the KL in the reward also kl_penalty, what it takes off an answer's reward on the average; the loss
      holds no other KL then.
    """
    rewards_NG, of_rewards = rollouts.rewards_NG, {}
    if config.kl == "reward":
        if rollouts.reference_log_probs_NGT is None:
            known = reference_log_probs(
                reference_params,
                rollouts.activations_ND,
                rollouts.tokens_NGT,
                rollouts.lengths_NG,
                verbalizer=verbalizer,
                temperature=config.temperature,
                micro_batches=micro_batches,
                token_budget=token_budget,
            )
            rollouts = rollouts.replace(reference_log_probs_NGT=known)
        penalties_NG = config.kl_coefficient * kl_of_answers(
            rollouts.log_probs_NGT, rollouts.reference_log_probs_NGT, rollouts.lengths_NG
        )
        rewards_NG, of_rewards = rewards_NG - penalties_NG, {"kl_penalty": penalties_NG.mean()}
    advantages_NG = group_advantages(rewards_NG, normalize_std=config.normalize_std, std_of=config.std_of)
    is_flat_N = rewards_NG.std(axis=1) <= FLAT_STD
    of_rewards["flat_groups"] = is_flat_N.mean()
    counts_N = jnp.where(is_flat_N & config.drop_flat_groups, 0.0, 1.0)

    def sums(params: Any, piece: tuple[Rollouts, Array, Array]) -> LossSums:
        recorded, advantages, counts = piece
        params = with_adapters(base, params)
        T = recorded.tokens_NGT.shape[-1]
        tokens_BT = recorded.tokens_NGT.reshape(-1, T)
        lengths_B, group = recorded.lengths_NG.reshape(-1), recorded.lengths_NG.shape[1]
        mask_BT = token_mask(lengths_B, T) * jnp.repeat(counts, group)[:, None]
        old_BT = recorded.log_probs_NGT.reshape(-1, T)

        def run(av_params: Any):
            final_BTD = verbalizer.hidden(
                av_params, recorded.activations_ND, tokens_BT, lengths_B, token_budget
            )
            return final_BTD, verbalizer.head_statistics(
                av_params, final_BTD, tokens_BT, lengths_B, config.temperature, token_budget
            )

        final_BTD, policy = run(params)
        if config.kl_is_sampled:
            reference_NGT = recorded.reference_log_probs_NGT
            if reference_NGT is None:
                reference_NGT = run(reference_params)[1].log_prob
            kl_BT = k3(policy.log_prob, jax.lax.stop_gradient(reference_NGT.reshape(-1, T)))
        else:
            reference_final_BTD, _ = jax.lax.stop_gradient(run(reference_params))
            kl_BT = exact_kl(
                params["lm"],
                reference_params["lm"],
                verbalizer.config,
                final_BTD,
                reference_final_BTD,
                temperature=config.temperature,
            )
        loss_BT = policy_objective(policy.log_prob, old_BT, advantages.reshape(-1, 1), config)
        log_ratio_BT = policy.log_prob - old_BT
        ratio_BT = jnp.exp(log_ratio_BT)
        clipped_BT = (ratio_BT < 1 - config.clip_low) | (ratio_BT > 1 + config.clip_high)
        reported = {
            "kl": kl_BT,
            "entropy": policy.entropy,
            "clip_fraction": clipped_BT,
            "sampler_trainer_logprob_diff": jnp.abs(log_ratio_BT),
        }
        if config.kl != "reward":
            loss_BT = loss_BT + config.kl_coefficient * kl_BT
        total = (loss_BT * mask_BT).sum()
        return LossSums(total, {name: (x * mask_BT).sum() for name, x in reported.items()})

    denominator = (rollouts.lengths_NG * counts_N[:, None]).sum()
    pieces = rollouts, advantages_NG, counts_N
    state, metrics = update(state, optimizer, sums, pieces, denominator, micro_batches)
    return state, metrics | of_rewards
