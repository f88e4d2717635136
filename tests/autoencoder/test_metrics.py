import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_jax.autoencoder import metrics

RNG = np.random.default_rng(0)
MEAN = 3 * RNG.normal(size=16)
TARGET = (MEAN + RNG.normal(size=(40, 16))).astype(np.float32)
PREDICTION = (TARGET + 0.7 * RNG.normal(size=(40, 16))).astype(np.float32)


def numpy_directions(vectors):
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * np.sqrt(vectors.shape[1])


def test_normalize_by_hand():
    # ‖(3, 4)‖ = 5 and √d = √2; norm and dtype are float32's even for half-precision input.
    np.testing.assert_allclose(
        metrics.normalize(jnp.array([3.0, 4.0])), np.sqrt(2) * np.array([0.6, 0.8]), rtol=1e-6
    )
    assert metrics.normalize(jnp.ones(4, jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_array_equal(metrics.normalize(jnp.zeros(3)), np.zeros(3))


@pytest.mark.parametrize(
    ("prediction", "expected"), [([5, 0], 0), ([0, 2], 2), ([-1, 0], 4), ([3, 4], 0.8), ([0, 0], 1)]
)
def test_direction_mse_by_hand(prediction, expected):
    # 2(1 − cos) against (1, 0); (3, 4) has cos 0.6. A zero prediction has no direction: 1 is ‖h_n‖²/d.
    mse = metrics.direction_mse(jnp.array(prediction, jnp.float32), jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(mse, expected, atol=1e-6)


def test_direction_mse_equals_two_times_one_minus_cosine():
    cosine = np.sum(numpy_directions(PREDICTION) * numpy_directions(TARGET), axis=1) / 16
    np.testing.assert_allclose(metrics.direction_mse(PREDICTION, TARGET), 2 * (1 - cosine), atol=1e-6)


def test_fve_by_hand():
    # Errors 1 and 4, distances from the mean (1, 0) 1 + 4 and 0 + 4: 1 − 5/9.
    prediction, target = jnp.array([[1.0, 2.0], [1.0, 0.0]]), jnp.array([[2.0, 2.0], [1.0, 2.0]])
    np.testing.assert_allclose(metrics.fve(prediction, target, jnp.array([1.0, 0.0])), 1 - 5 / 9, rtol=1e-6)


def test_fve_nrm_by_hand():
    # Targets along both axes: μ_n = (√2/2, √2/2), each ‖h_n − μ_n‖² = 1.
    # One prediction is exact, one orthogonal with ‖ĥ_n − h_n‖² = 4: 1 − (4/2)/1.
    target = jnp.array([[3.0, 0.0], [0.0, 7.0]])
    mean = metrics.mean_of_normalized(target)
    np.testing.assert_allclose(mean, [np.sqrt(0.5)] * 2, rtol=1e-6)
    np.testing.assert_allclose(
        metrics.fve_nrm(jnp.array([[1.0, 0.0], [1.0, 0.0]]), target, mean), -1, rtol=1e-5
    )


def test_fves_match_float64_numpy():
    raw = 1 - np.sum((PREDICTION - TARGET) ** 2.0) / np.sum((TARGET - MEAN) ** 2)
    np.testing.assert_allclose(metrics.fve(PREDICTION, TARGET, MEAN.astype(np.float32)), raw, atol=1e-6)
    h, p = numpy_directions(TARGET), numpy_directions(PREDICTION)
    nrm = 1 - np.mean(np.linalg.norm(p - h, axis=1) ** 2) / np.mean(
        np.linalg.norm(h - h.mean(0), axis=1) ** 2
    )
    mean = metrics.mean_of_normalized(TARGET)
    np.testing.assert_allclose(metrics.fve_nrm(PREDICTION, TARGET, mean), nrm, atol=1e-6)
    np.testing.assert_allclose(jax.jit(metrics.fve_nrm)(PREDICTION, TARGET, mean), nrm, atol=1e-6)


def test_normalizing_the_mean_again_inflates_fve_nrm():
    mean = metrics.mean_of_normalized(TARGET)
    right = metrics.fve_nrm(PREDICTION, TARGET, mean)
    inflated = metrics.fve_nrm(PREDICTION, TARGET, metrics.normalize(mean))
    # By exactly as much as re-normalizing moves the mean: the denominator is smallest at the true one.
    denominator = metrics.fve_nrm_terms(PREDICTION, TARGET, mean)[1].mean()
    moved = jnp.mean((metrics.normalize(mean) - mean) ** 2)
    np.testing.assert_allclose((1 - right) / (1 - inflated), 1 + moved / denominator, rtol=1e-4)
    assert inflated > right + 1e-4


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-2, 1e4), st.floats(1e-2, 1e4))
def test_direction_mse_ignores_scale(seed, a, b):
    prediction, target = np.random.default_rng(seed).normal(size=(2, 5, 8)).astype(np.float32)
    expected = metrics.direction_mse(prediction, target)
    np.testing.assert_allclose(
        metrics.direction_mse(np.float32(a) * prediction, np.float32(b) * target), expected, atol=1e-5
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-2, 1e4))
def test_fve_of_the_mean_is_zero_and_of_the_target_one(seed, scale):
    target = (scale * np.random.default_rng(seed).normal(size=(6, 8))).astype(np.float32)
    mean = target.mean(0)
    np.testing.assert_allclose(metrics.fve(np.broadcast_to(mean, target.shape), target, mean), 0, atol=1e-6)
    assert metrics.fve(target, target, mean) == 1
    # The prediction's norm is free in fve_nrm, so a rescaled target is perfect too.
    np.testing.assert_allclose(
        metrics.fve_nrm(7 * target, target, metrics.mean_of_normalized(target)), 1, atol=1e-6
    )


def test_gradients_are_finite_at_the_zero_vector():
    gradients = jax.grad(lambda p, t: metrics.direction_mse(p, t).sum(), argnums=(0, 1))(
        jnp.zeros((2, 4)), jnp.array([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    )
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_least_squares_scale():
    # (1·4 + 2·2) / (1 + 4) = 1.6 by hand; and no nearby scalar fits better.
    assert metrics.least_squares_scale(jnp.array([[1.0, 2.0]]), jnp.array([[4.0, 2.0]])) == pytest.approx(1.6)
    scale = float(metrics.least_squares_scale(PREDICTION, TARGET))
    errors = [np.sum((s * PREDICTION - TARGET) ** 2.0) for s in (scale - 0.01, scale, scale + 0.01)]
    assert errors[1] == min(errors)
    assert metrics.least_squares_scale(jnp.zeros((2, 3)), jnp.ones((2, 3))) == 0


def test_failed_rows_count_as_the_mean():
    failed, mean = np.arange(40) % 4 == 0, TARGET.mean(0)
    prediction = metrics.substitute_failed(np.where(failed[:, None], np.nan, PREDICTION), failed, mean)
    numerator, denominator = metrics.fve_terms(prediction, TARGET, mean)
    np.testing.assert_array_equal(numerator[failed], denominator[failed])
    np.testing.assert_array_equal(prediction[~failed], PREDICTION[~failed])
    # Averaging over the readable rows alone would hide the failures.
    readable_only = metrics.fve(PREDICTION[~failed], TARGET[~failed], mean)
    assert metrics.fve(prediction, TARGET, mean) < readable_only - 0.05


def test_reward_by_hand():
    mse, failed = jnp.array([0.5, 1.0, jnp.nan]), jnp.array([False, False, True])
    np.testing.assert_allclose(metrics.reward(mse, failed), [-0.5, -1, -2])
    np.testing.assert_allclose(metrics.reward(mse, failed, kind="neg_log_mse"), [np.log(2), 0, -2], rtol=1e-6)
    hinge = metrics.reward(
        mse, failed, lengths=jnp.array([9, 14, 99]), length_hinge_start=10, length_hinge_slope=0.05
    )
    np.testing.assert_allclose(hinge, [-0.5, -1.2, -2], rtol=1e-6)
    perfect = metrics.reward(jnp.zeros(1), jnp.array([False]), kind="neg_log_mse")
    np.testing.assert_allclose(perfect, 6 * np.log(10), rtol=1e-6)


def test_reward_errors_name_the_remedy():
    mse, failed = jnp.ones(1), jnp.array([False])
    with pytest.raises(ValueError, match="'mse'; choose one of neg_mse, neg_log_mse"):
        metrics.reward(mse, failed, kind="mse")
    with pytest.raises(ValueError, match=r"length_hinge_start=5 needs .* lengths="):
        metrics.reward(mse, failed, length_hinge_start=5)
