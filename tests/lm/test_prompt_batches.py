import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.lm.prompt_batches import batches_by_length, filled, pad, positions, rounded_up, row_batches


def sizes(*arguments):
    return [(len(rows_B), real) for rows_B, real in row_batches(*arguments)]


def test_rows_come_in_batches_of_few_sizes():
    assert sizes(0, 64) == []
    assert sizes(1, 64) == [(1, 1)]
    assert sizes(2, 64) == [(4, 2)] and sizes(4, 64) == [(4, 4)]
    assert sizes(5, 64) == [(16, 5)] and sizes(16, 64) == [(16, 16)]
    assert sizes(17, 64) == [(64, 17)]
    assert sizes(130, 64) == [(64, 64), (64, 64), (4, 2)]
    # No batch is larger than a whole one.
    assert sizes(5, 8) == [(8, 5)] and sizes(3, 4) == [(4, 3)] and sizes(9, 4) == [(4, 4), (4, 4), (1, 1)]


def test_sizes_are_multiples_of_the_devices():
    assert sizes(1, 64, 8) == [(8, 1)] and sizes(9, 64, 8) == [(16, 9)] and sizes(2, 64, 3) == [(6, 2)]


@pytest.mark.parametrize("count", [1, 3, 16, 21, 64, 65])
def test_every_row_has_one_place(count):
    kept = [rows_B[:real] for rows_B, real in row_batches(count, 16, 2)]
    assert np.concatenate(kept).tolist() == list(range(count))
    # The rest of a batch is its last row.
    assert all((rows_B[real:] == rows_B[real - 1]).all() for rows_B, real in row_batches(count, 16, 2))


def test_lengths_are_rounded_up():
    assert [rounded_up(n, (4, 8)) for n in (0, 4, 5, 8, 9)] == [4, 4, 8, 8, 8]


def test_batches_of_like_lengths():
    lengths = [10, 200, 32, 33, 5]
    found = list(batches_by_length(lengths, 256))
    # Lengths up to 32: rows 0, 2 and 4, for which four rows are compiled; then 512, more than the budget, one by one.
    assert found == [([0, 2, 4], 4, 32), ([1], 1, 512), ([3], 1, 128)]
    assert filled([0, 2, 4], 4) == [0, 2, 4, 4]


def test_positions_and_padding():
    tokens_BT, lengths_B = pad([[7, 8], [9]], 3)
    assert tokens_BT.tolist() == [[7, 8, 0], [9, 0, 0]] and lengths_B.tolist() == [2, 1]
    at_BT = np.asarray(positions(jnp.asarray(tokens_BT), jnp.asarray(lengths_B), jnp.array([0, 5])))
    assert at_BT[0, :2].tolist() == [0, 1] and at_BT[1, 0] == 5
    assert len({at_BT[0, 2], at_BT[1, 1], at_BT[1, 2]}) == 1 and at_BT[0, 2] not in range(1000)
