"""Matrix products of a traced program, counted before any compiler touches it."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def matmul_flops(jaxpr: Jaxpr, *, once: bool = False) -> float:
    """Operations of all matrix products on all devices together; a multiplication with its addition counts as 2.

    The body of a loop counts as often as it runs. A loop with a condition is taken to run as often as it can: the
    largest number in its condition. Work that a rematerialized block does twice counts twice.

    Args:
      jaxpr: the traced program.
      once: count the bodies of loops once, as XLA's own cost analysis does.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracting, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracting)
            total += 2.0 * inner * equation.outvars[0].aval.size
        elif name == "while":
            body = matmul_flops(parameters["body_jaxpr"].jaxpr, once=once)
            total += body * (1 if once else _largest_number(parameters["cond_jaxpr"]))
        elif name in ("cond", "platform_index"):
            branches = parameters.get("branches", ())
            total += max((matmul_flops(branch.jaxpr, once=once) for branch in branches), default=0.0)
        else:
            inside = sum(matmul_flops(inner, once=once) for inner in _jaxprs(parameters))
            total += inside * _repeats(name, parameters, once)
    return total


def _repeats(name: str, parameters: dict[str, Any], once: bool) -> int:
    if name == "scan":
        return 1 if once else parameters["length"]
    if name == "shard_map":
        return parameters["mesh"].size
    if name == "pallas_call":
        # XLA sees all steps of the grid as one opaque custom call.
        return math.prod(parameters["grid_mapping"].grid)
    return 1


def _jaxprs(parameters: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in parameters.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part


def _largest_number(condition: ClosedJaxpr) -> int:
    numbers = [
        int(variable.val)
        for equation in condition.jaxpr.eqns
        for variable in equation.invars
        if isinstance(variable, Literal) and getattr(variable.val, "ndim", 0) == 0
    ]
    return max(numbers, default=1)
