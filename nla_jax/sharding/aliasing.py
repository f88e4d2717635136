"""`jax.jit` that returns unchanged arguments as the same arrays and not as copies."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class _Passthrough:
    """A mark among a function's results that stands for leaf `index` of its arguments."""

    index: int = flax.struct.field(pytree_node=False)


def mark_passthrough(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for tracing, with a mark in place of every result that is one of its arguments, unchanged."""

    @functools.wraps(function)
    def marked(*args: Any) -> Any:
        marks = {id(x): _Passthrough(index) for index, x in enumerate(jax.tree.leaves(args))}
        return jax.tree.map(lambda x: marks.get(id(x), x), function(*args))

    return marked


class AliasingFunction:
    """A compiled function that returns unchanged arguments as the same arrays; `jit_aliasing` makes it.

    Attributes:
      program: the jitted function behind it, to trace and to lower. It computes only the results that changed; marks
        without arrays stand among them for the arguments that are returned unchanged.
    """

    def __init__(self, function: Callable[..., Any]):
        self.program = jax.jit(mark_passthrough(function))

    def __call__(self, *args: Any) -> Any:
        """The function's results; arguments that it returns unchanged are the same arrays."""
        arguments = jax.tree.leaves(args)

        def result(x: Any) -> Any:
            return arguments[x.index] if isinstance(x, _Passthrough) else x

        return jax.tree.map(result, self.program(*args), is_leaf=lambda x: isinstance(x, _Passthrough))


def jit_aliasing(function: Callable[..., Any]) -> AliasingFunction:
    """Like `jax.jit`, but arguments returned unchanged are returned as the same arrays, not copies.

    The results of `jax.jit` are copies, even those of the identity.
    """
    return AliasingFunction(function)
