"""`jax.jit` that returns unchanged arguments as the same arrays and not as copies."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class _Passthrough:
    """Stands for a leaf of the arguments among a function's results."""

    index: int = flax.struct.field(pytree_node=False)


def mark_passthrough(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, to be traced, with a mark in place of every result that is an argument as it came."""

    @functools.wraps(function)
    def marked(*args: Any) -> Any:
        given = {id(x): _Passthrough(index) for index, x in enumerate(jax.tree.leaves(args))}
        return jax.tree.map(lambda x: given.get(id(x), x), function(*args))

    return marked


class AliasingFunction:
    """A compiled function that returns unchanged arguments as the same arrays; `jit_aliasing` makes it.

    Attributes:
      program: the jitted function behind it, to trace and to lower. It computes what changes alone: marks without
        arrays stand among its results for the arguments that come back as they are.
    """

    def __init__(self, function: Callable[..., Any]):
        self.program = jax.jit(mark_passthrough(function))

    def __call__(self, *args: Any) -> Any:
        """The function's results, with arguments that it does not change put back in place of their marks."""
        given = jax.tree.leaves(args)

        def result(x: Any) -> Any:
            return given[x.index] if isinstance(x, _Passthrough) else x

        return jax.tree.map(result, self.program(*args), is_leaf=lambda x: isinstance(x, _Passthrough))


def jit_aliasing(function: Callable[..., Any]) -> AliasingFunction:
    """`jax.jit` for functions that change a part of their arguments: what they return as it came is the same array.

    The results of `jax.jit` are copies, even those of the identity.
    """
    return AliasingFunction(function)
