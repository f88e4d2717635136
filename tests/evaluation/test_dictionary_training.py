import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.autoencoder import metrics
from nla_jax.evaluation.dictionary_training import (
    DictionaryConfig,
    dictionary_step,
    initial_state,
    train_dictionary,
)

D = 16
CONFIG = DictionaryConfig(width=4, k=2, steps=300, batch_size=128, learning_rate=3e-3, idle_rows=2000)


def step(state, rows, config):
    return jax.jit(functools.partial(dictionary_step, config=config))(state, rows)


def rows_of_pairs(count=1200, directions=24):
    """Sums of two of a few random directions."""
    rng = np.random.default_rng(0)
    direction_FD = rng.normal(size=(directions, D))
    direction_FD /= np.linalg.norm(direction_FD, axis=1, keepdims=True)
    strength = np.zeros((count, directions))
    for row in strength:
        row[rng.choice(directions, 2, replace=False)] = rng.uniform(1, 2, 2)
    return (10 * strength @ direction_FD).astype(np.float32)


def test_sums_of_few_directions_are_found():
    rows = rows_of_pairs()
    dictionary, last = train_dictionary(rows[:1000], CONFIG, seed=0, source="pairs")
    held_out = rows[1000:]
    strengths = dictionary.strengths(held_out)
    rebuilt = dictionary.decode(strengths, held_out)
    mean = np.asarray(metrics.mean_of_normalized(rows[:1000]))
    assert metrics.fve_nrm(rebuilt, held_out, mean) > 0.75
    assert ((strengths > 0).sum(axis=1) <= 2).all()
    np.testing.assert_allclose(np.linalg.norm(dictionary.decode_FD, axis=1), 1, rtol=1e-5)
    assert last["loss"] < 0.25 and (dictionary.features, dictionary.source) == (64, "pairs")


def test_one_step_by_hand():
    """One row, one coordinate's direction active: the loss is what the code leaves of the normalized row."""
    config = dataclasses.replace(CONFIG, width=1, k=1, auxiliary_weight=0.0)
    state = initial_state(config, jnp.zeros(2), jax.random.key(0))
    params = {"W_enc": jnp.eye(2), "b_enc": jnp.zeros(2), "W_dec": jnp.eye(2), "b_dec": jnp.zeros(2)}
    state = state.replace(params=params, moments=config.optimizer().init(params))
    # (3, 4) becomes √2 (0.6, 0.8); the code keeps the second coordinate and leaves √2 0.6, whose mean square is 0.36.
    new, measured = step(state, jnp.float32([[3, 4]]), config)
    np.testing.assert_allclose(measured["loss"], 0.36, rtol=1e-5)
    assert new.idle_F.tolist() == [1, 0] and measured["dead"] == 0


def test_dead_features_alone_learn_what_is_left_over():
    config = dataclasses.replace(CONFIG, width=2, k=1, idle_rows=5, auxiliary_weight=1.0)
    state = initial_state(config, jnp.zeros(4), jax.random.key(1))
    rows = jnp.asarray(np.random.default_rng(2).normal(size=(32, 4)), jnp.float32)
    _, none = step(state, rows, config)
    assert none["auxiliary"] == 0 and none["dead"] == 0
    dead = state.replace(idle_F=state.idle_F.at[3].set(5))
    _, some = step(dead, rows, config)
    # The dead feature writes where its own pre-activation is positive, and the error is that of the residual.
    h = np.asarray(metrics.normalize(rows))
    before = h @ np.asarray(state.params["W_enc"])
    code = np.where(before == before.max(axis=1, keepdims=True), np.maximum(before, 0), 0)
    decode = np.asarray(state.params["W_dec"])
    left = h - code @ decode - np.maximum(before[:, 3:4], 0) * decode[3]
    np.testing.assert_allclose(some["auxiliary"], np.mean(left**2), rtol=1e-4)
    assert some["dead"] == 1 / 8


def test_recipes_that_are_refused():
    with pytest.raises(ValueError, match="k of a dictionary is 0; expected a positive"):
        DictionaryConfig(k=0)
    with pytest.raises(ValueError, match="k=65 features of 64 cannot be active"):
        train_dictionary(rows_of_pairs(100), dataclasses.replace(CONFIG, k=65), seed=0, source="")
    with pytest.raises(ValueError, match="there are 2 training rows for a dictionary of k=2"):
        train_dictionary(rows_of_pairs(2), CONFIG, seed=0, source="")
