import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from nla_jax.training.state import (
    LossSums,
    OptimizerConfig,
    TooManyBadSteps,
    TrainState,
    check_bad_steps,
    restart,
    update,
)

RNG = np.random.default_rng(0)
BATCH = {"x": jnp.asarray(RNG.standard_normal((8, 3)), jnp.float32), "y": jnp.arange(8.0)}
PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.float32(0.1)}
OPTIMIZER = OptimizerConfig(learning_rate=0.1, warmup_steps=0, max_grad_norm=1.0).build()


def squared_error(params, piece):
    error = piece["x"] @ params["w"] + params["b"] - piece["y"]
    return LossSums((error**2).sum(), {"absolute": jnp.abs(error).sum()}, {"error": error})


def run(params=PARAMS, batch=BATCH, micro_batches=1, optimizer=OPTIMIZER, state=None):
    state = state or TrainState.create(params, optimizer)
    return jax.jit(lambda s: update(s, optimizer, squared_error, batch, jnp.float32(8), micro_batches))(state)


def test_plain_gradient_step_by_hand():
    # One weight, rows x = 1 and 3 with targets 0: mean of x²·w² has gradient 2·5·w = 10 at w = 1.
    batch = {"x": jnp.array([[1.0], [3.0]]), "y": jnp.zeros(2)}
    params = {"w": jnp.ones(1), "b": jnp.float32(0)}
    sgd = optax.sgd(0.01)
    state, metrics = update(TrainState.create(params, sgd), sgd, squared_error, batch, jnp.float32(2))
    np.testing.assert_allclose(state.params["w"], [0.9], rtol=1e-6)
    # The intercept's gradient is 2·(1 + 3)/2 = 4.
    np.testing.assert_allclose(state.params["b"], -0.04, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 5)
    np.testing.assert_allclose(metrics["absolute"], 2)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(116), rtol=1e-6)
    np.testing.assert_array_equal(metrics["error"], [1, 3])
    assert (state.step, state.bad_steps) == (1, 0)


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_micro_batches_change_nothing(micro_batches):
    (state, metrics), (expected_state, expected) = run(micro_batches=micro_batches), run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), metrics, expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), state.params, expected_state.params
    )
    np.testing.assert_allclose(metrics["error"], BATCH["x"] @ PARAMS["w"] + 0.1 - BATCH["y"], rtol=1e-5)


def test_micro_batches_that_do_not_divide_the_rows_are_an_error():
    with pytest.raises(ValueError, match="8 rows do not divide into micro_batches=3; use a divisor of 8"):
        run(micro_batches=3)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_update_with_gradients_that_are_not_finite_is_refused(micro_batches, bad):
    start, _ = run()
    poisoned = {**BATCH, "x": BATCH["x"].at[5, 1].set(bad)}
    refused, metrics = run(batch=poisoned, state=start, micro_batches=micro_batches)
    old, new = (start.params, start.opt_state), (refused.params, refused.opt_state)
    jax.tree.map(np.testing.assert_array_equal, new, old)
    assert (refused.step, refused.bad_steps, metrics["bad_steps"]) == (2, 1, 1)
    twice, _ = run(batch=poisoned, state=refused, micro_batches=micro_batches)
    assert twice.bad_steps == 2
    good, _ = run(state=twice, micro_batches=micro_batches)
    assert good.bad_steps == 0
    # As if the refused updates had never been tried.
    jax.tree.map(
        np.testing.assert_array_equal, good.params, run(state=start, micro_batches=micro_batches)[0].params
    )


def test_denominator_of_zero_gives_a_finite_update():
    state, metrics = update(
        TrainState.create(PARAMS, OPTIMIZER),
        OPTIMIZER,
        lambda params, piece: LossSums(0 * params["w"].sum()),
        BATCH,
        jnp.float32(0),
    )
    np.testing.assert_array_equal(state.params["w"], PARAMS["w"])
    assert metrics["loss"] == 0 and metrics["bad_steps"] == 0


def test_check_bad_steps_names_stage_count_limit_and_remedy():
    check_bad_steps({"bad_steps": 4.0}, "rl", 5)
    message = (
        r"the gradients of 5 updates in a row were not finite \(limit 5\); lower the learning rate or raise "
        r"rl\.loop\.max_bad_steps$"
    )
    with pytest.raises(TooManyBadSteps, match=message):
        check_bad_steps({"bad_steps": 5.0}, "rl", 5)


def steps_taken(config, steps):
    """Sizes of the updates of one weight under a constant gradient: Adam's is the learning rate itself."""
    optimizer = config.build()
    params, sizes = jnp.ones(()), []
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(jnp.ones(()), state, params)
        sizes.append(-float(updates))
    return sizes


def test_learning_rate_warms_up_and_stays():
    sizes = steps_taken(OptimizerConfig(learning_rate=0.1, warmup_steps=4), 7)
    np.testing.assert_allclose(sizes, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1], atol=1e-5)


@pytest.mark.parametrize("decay_steps", [None, 100])
def test_no_warm_up_starts_at_the_full_rate(decay_steps):
    sizes = steps_taken(OptimizerConfig(learning_rate=0.1, warmup_steps=0, decay_steps=decay_steps), 1)
    np.testing.assert_allclose(sizes, [0.1], rtol=1e-4)


def test_learning_rate_falls_to_a_tenth():
    sizes = steps_taken(OptimizerConfig(learning_rate=0.1, warmup_steps=2, decay_steps=5), 8)
    # The second update has the full rate. Halfway through the cosine, two later, it is the mean of 0.1 and 0.01.
    np.testing.assert_allclose(np.array(sizes)[[0, 1, 3, 5, 7]], [0.05, 0.1, 0.055, 0.01, 0.01], atol=1e-5)


def test_a_decay_that_ends_before_the_warm_up_is_refused():
    with pytest.raises(
        ValueError, match="decay_steps=5 ends the decay .* warmup_steps=10; decay over at least"
    ):
        OptimizerConfig(warmup_steps=10, decay_steps=5)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_warm_up_as_long_as_the_stage_ends_at_the_full_rate(steps):
    sizes = steps_taken(OptimizerConfig(learning_rate=0.1, warmup_steps=steps, decay_steps=steps), steps)
    np.testing.assert_allclose(sizes, 0.1 * np.arange(1, steps + 1) / steps, atol=1e-5)


def test_weight_decay_pulls_weight_matrices_alone():
    params = {
        "lm": {
            "embed": {"embedding": jnp.ones((4, 2))},
            "blocks_0": {
                "attention_norm": {"scale": jnp.ones(2)},
                "attention": {"query": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
                "mlp": {"gate": jnp.ones((3, 2, 2)), "up": {"lora_a": jnp.ones((2, 1))}},
            },
            "blocks": {
                "mlp_norm": {"scale": jnp.ones((5, 2))},
                "mlp": {"down": {"kernel": jnp.ones((5, 2, 2))}},
            },
            "lm_head": {"kernel": jnp.ones((2, 4))},
        },
        "head": {"kernel": jnp.eye(2)},
        "affine": {"kernel": jnp.eye(2), "bias": jnp.ones(2)},
    }
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5).build()
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    flat = {"/".join(path): np.unique(x) for path, x in flatten_dict(updates).items()}
    decayed = {path for path, values in flat.items() if values.any()}
    assert decayed == {
        "lm/blocks_0/attention/query/kernel",
        "lm/blocks_0/mlp/gate",
        "lm/blocks_0/mlp/up/lora_a",
        "lm/blocks/mlp/down/kernel",
    }
    for path in decayed:
        np.testing.assert_allclose(flat[path], [-0.05], rtol=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, max_grad_norm=1.0)
    grads = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    _, (_, adam) = config.build().update(grads, config.build().init(grads), grads)
    moments = adam[0].mu
    np.testing.assert_allclose([moments["a"][0], moments["b"][0]], [0.06, 0.08], rtol=1e-5)


def test_the_state_owns_its_parameters():
    """Steps donate the state, so that it must not share buffers with what it was created from."""
    params = {"w": jnp.ones(3)}
    state = TrainState.create(params, OPTIMIZER)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    assert state.params["w"].is_deleted() and not params["w"].is_deleted()


def test_a_restarted_state_keeps_its_moments_and_warms_up_again():
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=4).build()
    state = TrainState.create(PARAMS, optimizer)
    for _ in range(3):
        state, _ = run(optimizer=optimizer, state=state)
    again = restart(state)
    assert int(again.step) == 0
    _, (adam, _, schedule) = again.opt_state
    _, (before, _, _) = state.opt_state
    assert int(schedule.count) == 0 and int(adam.count) == 3
    jax.tree.map(np.testing.assert_array_equal, (adam.mu, adam.nu), (before.mu, before.nu))
    # The first step of a warm-up of four has a quarter of the rate that the fifth would have had.
    (after, _), (further, _) = run(optimizer=optimizer, state=again), run(optimizer=optimizer, state=state)
    moved, full = (x.params["w"] - state.params["w"] for x in (after, further))
    np.testing.assert_allclose(moved, full / 4, rtol=1e-3)
