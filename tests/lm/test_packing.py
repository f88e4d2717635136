import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_jax.lm.attention import PAD_POSITION
from nla_jax.lm.packing import Packing, budget_for_lengths

P = PAD_POSITION
POSITIONS = (jnp.array([[0, 1, 2]]), jnp.array([[3, 4, P], [3, P, P]]))
VALUES = (jnp.arange(3.0).reshape(1, 3, 1), jnp.arange(3.0, 9.0).reshape(2, 3, 1))


def test_all_tokens_or_those_that_are_not_padding():
    whole, dense, roomy = (Packing.of(POSITIONS, budget) for budget in (None, 6, 8))
    assert whole.join(VALUES).ravel().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert dense.join(VALUES).ravel().tolist() == [0, 1, 2, 3, 4, 6]
    assert dense.join(POSITIONS).ravel().tolist() == [0, 1, 2, 3, 4, 3]
    # What room is left over is filled up with padding.
    assert roomy.join(VALUES).ravel().tolist() == [0, 1, 2, 3, 4, 6, 5, 7]
    for one, expected in zip(dense.split(dense.join(VALUES)), VALUES, strict=True):
        assert one.shape == expected.shape
    assert dense.split(dense.join(VALUES))[1].ravel().tolist() == [3, 4, 0, 6, 0, 0]
    assert all(map(np.array_equal, whole.split(whole.join(VALUES)), VALUES))


def test_a_stream_without_room_for_all_is_not_complete():
    assert Packing.of(POSITIONS, 6).is_complete and Packing.of(POSITIONS).is_complete
    assert not Packing.of(POSITIONS, 5).is_complete


def test_gradients_go_back_to_the_tokens_they_belong_to():
    weights = jnp.arange(1.0, 7.0).reshape(6, 1, 1)
    gradient = jax.grad(lambda values: (Packing.of(POSITIONS, 6).join(values) * weights).sum())(VALUES)
    assert gradient[1].ravel().tolist() == [4, 5, 0, 6, 0, 0]


@pytest.mark.parametrize(
    ("lengths", "options", "budget"),
    [
        ([3, 3, 3, 3], {"buckets": 4}, 12),
        ([3, 3, 3, 2], {"buckets": 4}, 12),
        ([4, 4, 4, 4], {"buckets": 4}, None),
        ([1, 0, 1, 1], {"buckets": 4}, 4),  # a row of no tokens counts as one
        ([1, 1, 3, 1], {"buckets": 8, "micro_batches": 2}, 4),
        ([1, 1, 1, 1], {"buckets": 1}, None),
    ],
)
def test_budgets_by_hand(lengths, options, budget):
    assert budget_for_lengths(np.array(lengths), 4, **options) == budget


@given(
    lengths=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    buckets=st.integers(1, 12),
    micro_batches=st.sampled_from([1, 2, 3]),
)
def test_a_budget_holds_every_micro_batch_and_little_more(lengths, buckets, micro_batches):
    rows = 6 // micro_batches
    needed = np.maximum(lengths, 1).reshape(micro_batches, rows).sum(axis=1).max()
    budget = budget_for_lengths(np.array(lengths), 9, micro_batches=micro_batches, buckets=buckets)
    budget = rows * 9 if budget is None else budget
    assert needed <= budget <= rows * 9 and budget - needed <= rows * 9 / buckets + 1


def test_there_are_no_more_budgets_than_buckets():
    found = {budget_for_lengths(np.array([a, b, 1, 1]), 25, buckets=4) for a in range(26) for b in range(26)}
    assert len(found) <= 4
