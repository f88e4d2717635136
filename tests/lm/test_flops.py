import dataclasses

import jax
import jax.numpy as jnp
import pytest

from nla_jax.lm.config import Experts
from nla_jax.lm.flops import active_weights, forward_flops
from nla_jax.lm.transformer import Transformer


def test_weights_of_a_block_by_hand(tiny_lm):
    # query and out 32 x 32, key and value 32 x 16, three feed-forward matrices 32 x 64; four blocks.
    assert active_weights(tiny_lm.config) == 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)


def test_only_visited_experts_count(tiny_lm):
    config = dataclasses.replace(
        tiny_lm.config, num_layers=1, experts=Experts(count=8, per_token=2, d_ff=64), expert_layers=(True,)
    )
    assert active_weights(config) == 2 * 32 * 32 + 2 * 32 * 16 + 2 * 3 * 32 * 64 + 32 * 8


def test_attention_and_head_by_hand(tiny_lm):
    config, weights = tiny_lm.config, active_weights(tiny_lm.config)
    # One row of 3 tokens sees 1 + 2 + 3 keys; two rows of 2 tokens after it see 4 + 5 each. 4 blocks, 32 channels.
    expected = 2 * weights * 7 + 4 * 4 * 32 * (6 + 2 * 9) + 2 * 32 * 512 * 4
    assert forward_flops(config, [(1, 3), (2, 2)], 4) == expected
    assert forward_flops(config, [(2, 2)], 0, seen=3) == 2 * weights * 4 + 4 * 4 * 32 * 2 * 9


def test_compiled_forward_needs_about_as_many(tiny_lm):
    """XLA counts masked keys, norms and rotations as well; with few tokens the products dominate."""
    tokens = jnp.zeros((8, 4), jnp.int32)
    run = jax.jit(lambda params: Transformer(tiny_lm.config).apply({"params": params}, tokens).final_BTD)
    counted = run.lower(tiny_lm.params).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(forward_flops(tiny_lm.config, [(8, 4)]), rel=0.2)
