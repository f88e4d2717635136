import jax.numpy as jnp
import numpy as np

from nla_jax.lm.config import RopeScaling
from nla_jax.lm.rotary import rotary, scaled


def test_rotary_by_hand():
    # Two pairs; position 3 turns them by 3 and 0.3 radians.
    x = jnp.array([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    turned = rotary(x, jnp.array([[3]]), jnp.array([1.0, 0.1]))[0, 0, 0]
    np.testing.assert_allclose(turned, [np.cos(3), -2 * np.sin(0.3), np.sin(3), 2 * np.cos(0.3)], atol=1e-6)


def test_entries_past_the_rotated_ones_stay():
    x = jnp.arange(1.0, 7.0).reshape(1, 1, 1, 6)
    turned = rotary(x, jnp.array([[5]]), jnp.array([0.2, 0.02]))[0, 0, 0]
    np.testing.assert_array_equal(turned[4:], [5, 6])
    assert not np.allclose(turned[:4], x[0, 0, 0, :4])


def test_linear_scaling_divides():
    np.testing.assert_allclose(scaled(jnp.array([1.0, 0.3]), RopeScaling("linear", 4.0)), [0.25, 0.075])


def test_llama3_scaling_by_hand():
    # 10, 2.5 and 0.5 turns within 100 positions: kept, half way between 1 and 4 turns, divided by 8.
    frequency = jnp.array([10, 2.5, 0.5]) * 2 * np.pi / 100
    factors = scaled(frequency, RopeScaling("llama3", 8.0, 1.0, 4.0, 100)) / frequency
    np.testing.assert_allclose(factors, [1, (1 + 1 / 8) / 2, 1 / 8], rtol=1e-6)
