import pytest

from nla_jax.planning.hlo import Collective
from nla_jax.planning.measure import Cost, extrapolate


def cost(blocks: int) -> Cost:
    collectives = (
        Collective("all-gather", ((1000, 8),), 32000.0, 4, 1),
        Collective("all-gather", ((8, 8),), 256.0, 4, 7 * blocks),
        Collective("all-reduce", ((blocks, 8),), 32.0 * blocks, 2, 1),  # all blocks' in one
    )
    sent = sum(collective.sent for collective in collectives)
    return Cost(0.0, 0.0, 0.0, 0.0, 10.0 * blocks, 1.0, 5.0 + blocks, sent, None, collectives, 1.0)


def test_costs_lie_on_a_line_and_collectives_add_up_to_what_is_sent():
    expected, found = cost(28), extrapolate({2: cost(2), 1: cost(1)}, 28)
    assert (found.flops, found.memory_traffic) == (280, 33)
    assert found.sent == pytest.approx(expected.sent)
    gathers = [c for c in found.collectives if c.kind == "all-gather"]
    assert [(c.shapes, c.times) for c in gathers] == [(((1000, 8),), 1), (((8, 8),), 196)]
    assert sum(c.sent for c in gathers) == pytest.approx(sum(c.sent for c in expected.collectives[:2]))
