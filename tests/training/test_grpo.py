import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.autoencoder.prompts import PromptTemplates, build_verbalizer_prompt
from nla_jax.autoencoder.verbalizer import InjectionConfig, Verbalizer, token_mask
from nla_jax.training.grpo import (
    PolicyLossConfig,
    Rollouts,
    group_advantages,
    grpo_step,
    k3,
    kl_of_answers,
    policy_objective,
    reference_log_probs,
)
from nla_jax.training.state import OptimizerConfig, TrainState
from nla_jax.training.supervised import jit_step

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0).build()
N, G, T = 4, 2, 10
compiled = functools.cache(jit_step)


def test_group_advantages_by_hand():
    rewards = jnp.array([[1.0, 3.0], [5.0, 5.0]])
    np.testing.assert_allclose(group_advantages(rewards, normalize_std=False), [[-1, 1], [0, 0]])
    # The first group's standard deviation is 1; the second's is 0, and ε keeps it finite.
    np.testing.assert_allclose(group_advantages(rewards, epsilon=0.25), [[-0.8, 0.8], [0, 0]], rtol=1e-6)


def test_advantages_of_a_batch_keep_how_much_groups_differ():
    rewards = jnp.array([[1.0, 3.0], [4.0, 10.0]])
    # Centered they are ±1 and ±3, with a mean square of 5.
    expected = np.array([[-1, 1], [-3, 3]]) / np.sqrt(5)
    np.testing.assert_allclose(group_advantages(rewards, std_of="batch", epsilon=0.0), expected, rtol=1e-6)


def test_k3_by_hand_and_clamped():
    log_q = jnp.log(jnp.array([0.5, 0.1]))
    log_p = jnp.log(jnp.array([0.25, 0.1]))
    # δ = log 2: 2 − log 2 − 1.
    np.testing.assert_allclose(k3(log_p, log_q), [1 - np.log(2), 0], atol=1e-6)
    np.testing.assert_allclose(k3(jnp.array([-50.0]), jnp.array([0.0])), np.exp(12) - 13, rtol=1e-5)
    np.testing.assert_allclose(k3(jnp.array([0.0]), jnp.array([-50.0])), np.exp(-12) + 11, rtol=1e-6)


def test_k3_is_unbiased():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    expectation = (p * np.asarray(k3(jnp.log(p), jnp.log(q)))).sum()
    np.testing.assert_allclose(expectation, (p * np.log(p / q)).sum(), rtol=1e-5)


def test_kl_of_answers_by_hand():
    log_p, log_q = jnp.log(jnp.array([[[0.5, 0.2, 0.9]]])), jnp.log(jnp.array([[[0.25, 0.4, 0.0]]]))
    # Tokens of ratios 2 and 1/2; what stands after the length counts for nothing, infinite or not.
    np.testing.assert_allclose(kl_of_answers(log_p, log_q, jnp.array([[1]])), [[np.log(2)]], rtol=1e-6)
    np.testing.assert_allclose(kl_of_answers(log_p, log_q, jnp.array([[2]])), [[0]], atol=1e-7)


LOGITS, REFERENCE = jnp.array([1.0, 0.3, -0.5, 0.1]), jnp.array([0.2, 0.8, 0.1, -1.0])


def kl_to_reference(logits):
    log_p = jax.nn.log_softmax(logits)
    return (jnp.exp(log_p) * (log_p - jax.nn.log_softmax(REFERENCE))).sum()


def kl_from_reference(logits):
    log_q = jax.nn.log_softmax(REFERENCE)
    return (jnp.exp(log_q) * (log_q - jax.nn.log_softmax(logits))).sum()


def test_the_gradient_of_k3_is_that_of_the_kl_from_the_reference_to_the_policy():
    drawn = jax.nn.softmax(LOGITS)  # The tokens are sampled: their distribution is no part of the gradient.

    def loss(logits):
        return (drawn * k3(jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE))).sum()

    gradient = jax.grad(loss)(LOGITS)
    np.testing.assert_allclose(loss(LOGITS), kl_to_reference(LOGITS), rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(kl_from_reference)(LOGITS), atol=1e-6)
    assert np.abs(gradient - jax.grad(kl_to_reference)(LOGITS)).max() > 0.03


@pytest.mark.parametrize("ratio", ["ppo", "cispo", "reinforce"])
def test_the_gradient_of_a_kl_in_the_reward_is_that_of_the_kl_from_the_policy_to_the_reference(ratio):
    config = PolicyLossConfig(ratio=ratio, kl="reward", normalize_std=False)
    # All groups of two answers of one token, each with its probability.
    pairs_NG = jnp.array([(a, b) for a in range(4) for b in range(4)])
    drawn_N = jax.nn.softmax(LOGITS)[pairs_NG].prod(axis=1)
    old_NG, reference_NG = (jax.nn.log_softmax(x)[pairs_NG] for x in (LOGITS, REFERENCE))
    penalties_NG = 0.7 * kl_of_answers(old_NG[..., None], reference_NG[..., None], jnp.ones((16, 2), int))
    advantages_NG = group_advantages(-penalties_NG, normalize_std=False)

    def loss(logits):
        loss_NG = policy_objective(jax.nn.log_softmax(logits)[pairs_NG], old_NG, advantages_NG, config)
        return (drawn_N * loss_NG.mean(axis=1)).sum()

    # A mean over two answers holds half of each one's own reward, which halves the gradient.
    expected = 0.7 / 2 * jax.grad(kl_to_reference)(LOGITS)
    np.testing.assert_allclose(jax.grad(loss)(LOGITS), expected, atol=1e-6)


# Ratios 0.5, 1.1 and 2 against the borders 0.8 and 1.3.
RATIOS = jnp.array([0.5, 1.1, 2.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # ppo: −min(ρA, clip(ρ)A); the gradient ρA vanishes where the clipped branch is the smaller one.
        ("ppo", 1.0, [-0.5, -1.1, -1.3], [-0.5, -1.1, 0.0]),
        ("ppo", -1.0, [0.8, 1.1, 2.0], [0.0, 1.1, 2.0]),
        # cispo: −clip(ρ)·A·log p, with the clipped ratio a constant.
        ("cispo", 2.0, [1.6, 2.2, 2.6], [-1.6, -2.2, -2.6]),
        ("cispo", -1.0, [-0.8, -1.1, -1.3], [0.8, 1.1, 1.3]),
        # reinforce: −A·log p.
        ("reinforce", 2.0, [2.0, 2.0, 2.0], [-2.0, -2.0, -2.0]),
    ],
)
def test_policy_objective_by_hand(ratio, advantage, loss, gradient):
    config = PolicyLossConfig(ratio=ratio, clip_low=0.2, clip_high=0.3)
    log_probs = jnp.full(3, -1.0)
    old = log_probs - jnp.log(RATIOS)

    def objective(log_probs):
        return policy_objective(log_probs, old, jnp.full(3, advantage), config)

    np.testing.assert_allclose(objective(log_probs), loss, rtol=1e-5)
    np.testing.assert_allclose(
        jax.grad(lambda x: objective(x).sum())(log_probs), gradient, rtol=1e-5, atol=1e-7
    )


@pytest.fixture(scope="module")
def policy(tiny_lm):
    """A one-block verbalizer, its parameters, another policy's, and rollouts sampled from the first."""
    config = dataclasses.replace(tiny_lm.config, num_layers=1)
    lm_params = {name: tiny_lm.params[name] for name in ("embed", "blocks_0", "final_norm")}
    prompt = build_verbalizer_prompt(
        tiny_lm.tokenizer, PromptTemplates(verbalizer="Vector: {injection_char}")
    )
    verbalizer = Verbalizer(config, prompt, InjectionConfig(), scale=3.0)
    params = verbalizer.init(lm_params)
    other = jax.tree.map(lambda x: x * 1.05, params)
    rng = np.random.default_rng(0)
    activations = jnp.asarray(rng.standard_normal((N, 32)), jnp.float32)
    samples = jax.jit(
        lambda p: verbalizer.sample(p, activations, jax.random.key(0), group=G, max_tokens=T, temperature=3.0)
    )(params)
    # Shorten some rows, so that means over tokens and over rows differ.
    lengths = jnp.minimum(samples.lengths_B, jnp.asarray(rng.integers(3, T + 1, N * G)))
    rollouts = Rollouts(
        activations,
        samples.tokens_BT.reshape(N, G, T),
        lengths.reshape(N, G),
        samples.log_probs_BT.reshape(N, G, T),
        jnp.asarray(rng.standard_normal((N, G)), jnp.float32),
    )
    return verbalizer, params, other, rollouts


def run(policy, reference=None, rollouts=None, *, start=None, micro_batches=1, **config):
    verbalizer, params, _, own = policy
    step = compiled(
        grpo_step,
        verbalizer=verbalizer,
        optimizer=OPTIMIZER,
        config=PolicyLossConfig(temperature=3.0, **config),
        micro_batches=micro_batches,
    )
    return step(TrainState.create(start or params, OPTIMIZER), rollouts or own, reference or params)


@pytest.mark.parametrize("kl", ["k3", "exact", "reward"])
def test_policy_that_is_its_own_reference_and_sampler(policy, kl):
    metrics = run(policy, kl=kl)[1]
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-5)
    assert metrics["sampler_trainer_logprob_diff"] < 1e-4
    assert metrics["clip_fraction"] == 0
    assert metrics["entropy"] > 0.1


@pytest.mark.parametrize("kl", ["k3", "exact", "reward"])
def test_loss_and_metrics_equal_a_plain_average_over_tokens(policy, kl):
    verbalizer, params, other, rollouts = policy
    config = PolicyLossConfig(kl=kl, kl_coefficient=0.5, temperature=3.0)
    held_to = jax.tree.map(lambda x: x * 0.97, params)
    metrics = run(policy, held_to, start=other, kl=kl, kl_coefficient=0.5)[1]
    flat = rollouts.tokens_NGT.reshape(-1, T), rollouts.lengths_NG.reshape(-1)
    mask = np.asarray(token_mask(flat[1], T), bool)

    def log_softmax(params):
        head = params["lm"]["embed"]["embedding"].T
        hidden = jax.jit(verbalizer.hidden)(params, rollouts.activations_ND, *flat)
        return jax.nn.log_softmax(hidden @ head / 3.0)

    new, reference = log_softmax(other), log_softmax(held_to)
    chosen, chosen_reference = (
        jnp.take_along_axis(x, flat[0][..., None], 2)[..., 0] for x in (new, reference)
    )
    old = rollouts.log_probs_NGT.reshape(-1, T)
    ratio, rewards = jnp.exp(chosen - old), rollouts.rewards_NG
    if kl == "reward":
        penalties = 0.5 * jnp.where(mask, old - chosen_reference, 0).sum(axis=1).reshape(N, G)
        assert jnp.abs(penalties).max() > 1e-2
        np.testing.assert_allclose(metrics["kl_penalty"], penalties.mean(), rtol=1e-3)
        rewards = rewards - penalties
    advantages = group_advantages(rewards).reshape(-1, 1)
    expected_kl = (
        (jnp.exp(new) * (new - reference)).sum(-1) if kl == "exact" else k3(chosen, chosen_reference)
    )
    loss = (
        -jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages)
        + (0 if kl == "reward" else config.kl_coefficient) * expected_kl
    )
    np.testing.assert_allclose(metrics["loss"], loss[mask].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], expected_kl[mask].mean(), rtol=1e-3)
    np.testing.assert_allclose(metrics["entropy"], -(jnp.exp(new) * new).sum(-1)[mask].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["clip_fraction"], (jnp.abs(ratio - 1) > 0.2)[mask].mean(), atol=1e-6)
    assert 0 < metrics["clip_fraction"] < 1 and metrics["kl"] > 1e-3
    np.testing.assert_allclose(
        metrics["sampler_trainer_logprob_diff"], jnp.abs(jnp.log(ratio))[mask].mean(), rtol=1e-3
    )


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_change_nothing(policy, micro_batches):
    left = run(policy, policy[2], micro_batches=micro_batches, kl="exact")
    right = run(policy, policy[2], kl="exact")
    for a, b in ((left[1], right[1]), (left[0].opt_state, right[0].opt_state)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


@pytest.mark.parametrize(("micro_batches", "kl"), [(1, "k3"), (2, "k3"), (2, "reward")])
def test_known_log_probs_of_the_reference_change_nothing(policy, micro_batches, kl):
    verbalizer, _, other, rollouts = policy
    static = {"verbalizer": verbalizer, "temperature": 3.0, "micro_batches": micro_batches}
    known = jax.jit(functools.partial(reference_log_probs, **static))(
        other, rollouts.activations_ND, rollouts.tokens_NGT, rollouts.lengths_NG
    )
    right = run(policy, other, micro_batches=micro_batches, kl=kl)
    # The parameters given with them are not read.
    given = rollouts.replace(reference_log_probs_NGT=known)
    left = run(policy, rollouts=given, micro_batches=micro_batches, kl=kl)
    assert right[1]["kl"] > 1e-3
    for a, b in ((left[1], right[1]), (left[0].opt_state, right[0].opt_state)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def test_step_is_deterministic(policy):
    jax.tree.map(np.testing.assert_array_equal, run(policy), run(policy))


def test_a_compiled_step_takes_arguments_by_the_names_of_the_step(policy):
    verbalizer, params, other, rollouts = policy
    step = compiled(
        grpo_step,
        verbalizer=verbalizer,
        optimizer=OPTIMIZER,
        config=PolicyLossConfig(temperature=3.0),
        micro_batches=1,
    )
    by_position = step(TrainState.create(params, OPTIMIZER), rollouts, other, None)
    state = TrainState.create(params, OPTIMIZER)
    by_name = step(state=state, rollouts=rollouts, reference_params=other, base=None, token_budget=None)
    jax.tree.map(np.testing.assert_array_equal, by_name, by_position)
    assert jax.tree.leaves(state.params)[0].is_deleted()
    assert step.__name__ == "grpo_step" and step.__doc__ == grpo_step.__doc__
    with pytest.raises(TypeError, match="multiple values for keyword argument 'micro_batches'"):
        step(TrainState.create(params, OPTIMIZER), rollouts, other, micro_batches=2)


def test_tokens_after_a_length_do_not_matter(policy):
    rollouts = policy[3]
    after = jnp.arange(T) >= rollouts.lengths_NG[..., None]
    assert after.any()
    noisy = rollouts.replace(
        tokens_NGT=jnp.where(after, 77, rollouts.tokens_NGT),
        log_probs_NGT=jnp.where(after, -3.0, rollouts.log_probs_NGT),
    )
    left, right = run(policy, rollouts=noisy), run(policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), left[1], right[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), left[0].opt_state, right[0].opt_state
    )


def test_equal_rewards_give_no_update_without_kl(policy):
    rollouts = policy[3].replace(rewards_NG=jnp.full((N, G), 0.5))
    assert run(policy, rollouts=rollouts, kl_coefficient=0.0)[1]["grad_norm"] == 0


DROPPING = {"drop_flat_groups": True, "kl_coefficient": 0.5, "micro_batches": 2}


def test_groups_that_are_dropped_change_nothing(policy):
    rollouts = policy[3].replace(rewards_NG=policy[3].rewards_NG.at[1].set(0.5).at[2].set(-2.0))
    left = run(policy, policy[2], rollouts, **DROPPING)
    assert left[1]["flat_groups"] == 0.5
    kept = jax.tree.map(lambda x: x[jnp.array([0, 3])], rollouts)
    right = run(policy, policy[2], kept, kl_coefficient=0.5)
    for name in ("loss", "kl", "entropy", "grad_norm"):
        np.testing.assert_allclose(left[1][name], right[1][name], rtol=1e-4, atol=1e-6)


def test_a_round_whose_groups_are_all_dropped_leaves_the_policy_as_it_is(policy):
    rollouts = policy[3].replace(rewards_NG=jnp.full((N, G), 0.5))
    state, metrics = run(policy, policy[2], rollouts, **DROPPING)
    assert metrics["grad_norm"] == 0 and metrics["flat_groups"] == 1 and metrics["bad_steps"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, policy[1])


def test_update_raises_the_probability_of_what_was_rewarded(policy):
    verbalizer, params, _, rollouts = policy
    flat = rollouts.tokens_NGT.reshape(-1, T), rollouts.lengths_NG.reshape(-1)
    mask = token_mask(flat[1], T)

    @jax.jit
    def weighted(params):
        log_prob = verbalizer.statistics(params, rollouts.activations_ND, *flat, 3.0).log_prob
        return (log_prob * mask * group_advantages(rollouts.rewards_NG).reshape(-1, 1)).sum()

    assert weighted(run(policy)[0].params) > weighted(params) + 0.1
