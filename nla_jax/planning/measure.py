"""Compile a step for devices that are not there, and read off what it takes."""

import dataclasses
import math
import time
from collections import Counter
from typing import Any

import jax

from nla_jax.planning.chips import Chip
from nla_jax.planning.flops import matmul_flops
from nla_jax.planning.hlo import Collective, read_traffic
from nla_jax.planning.steps import Step


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one run of a compiled step takes on each device; bytes, operations and seconds."""

    arguments: float
    outputs: float
    """Results that take memory of their own: those that reuse a donated argument's are left out."""
    temporaries: float
    code: float
    flops: float
    """Matrix products of the traced program, split evenly over the devices."""
    redundancy: float
    """XLA's count of all operations over the even share of the matrix products: 1 where nothing is done twice."""
    memory_traffic: float
    sent: float
    """Bytes sent to other devices."""
    optimal_seconds: float | None
    """XLA's own estimate of the operations that it has a figure for, with the bodies of loops counted once; None where
    the backend gives none."""
    collectives: tuple[Collective, ...]
    compile_seconds: float

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Seconds that the chip's peaks allow at best, by what limits them."""
        return {
            "compute": self.flops * self.redundancy / chip.flops,
            "memory": self.memory_traffic / chip.bandwidth,
            "links": self.sent / chip.links,
        }

    def seconds(self, chip: Chip) -> float:
        """The largest bound: what the step takes if everything else hides behind it."""
        return max(self.bounds(chip).values())


def measure(step: Step, mesh: jax.sharding.Mesh) -> tuple[Cost, str]:
    """Compile a step; returns its cost and the compiled text.

    Raises:
      MemoryError: XLA found that the program does not fit, in XLA's words.
    """
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = step.function.trace(*step.arguments)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise MemoryError(str(error).splitlines()[0]) from error
            raise
    text = compiled.as_text()
    traffic, memory, analysis = read_traffic(text), compiled.memory_analysis(), compiled.cost_analysis()
    jaxpr, share = traced.jaxpr.jaxpr, 1 / mesh.size
    once = matmul_flops(jaxpr, once=True) * share
    cost = Cost(
        arguments=float(memory.argument_size_in_bytes),
        outputs=float(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        temporaries=float(memory.temp_size_in_bytes),
        code=float(memory.generated_code_size_in_bytes),
        flops=matmul_flops(jaxpr) * share,
        redundancy=max(_number(analysis, "flops") / once, 1.0) if once else 1.0,
        memory_traffic=traffic.memory,
        sent=sum((collective.sent for collective in traffic.collectives), 0.0),
        optimal_seconds=_optimal(analysis.get("optimal_seconds", 0.0)),
        collectives=traffic.collectives,
        compile_seconds=time.perf_counter() - started,
    )
    return cost, text


def extrapolate(costs: dict[int, Cost], blocks: int) -> Cost:
    """The cost at a number of blocks, on the line through the costs at two smaller ones."""
    (few, low), (many, high) = sorted(costs.items())
    ahead = (blocks - few) / (many - few)

    def line(a: Any, b: Any) -> Any:
        return None if a is None or b is None else max(a + (b - a) * ahead, 0.0)

    values = {
        field.name: line(getattr(low, field.name), getattr(high, field.name))
        for field in dataclasses.fields(Cost)
        if field.name != "collectives"
    }
    # Ratios do not lie on a line, and neither do seconds that were spent.
    values |= {
        "redundancy": high.redundancy,
        "compile_seconds": low.compile_seconds + high.compile_seconds,
    }
    return Cost(collectives=_on_the_line(low.collectives, high.collectives, ahead), **values)


def _on_the_line(
    low: tuple[Collective, ...], high: tuple[Collective, ...], ahead: float
) -> tuple[Collective, ...]:
    """Different collectives of either program, with the runs of each moved to the line."""
    few, many = map(_runs, (low, high))
    moved = {c: round(few[c] + (many[c] - few[c]) * ahead) for c in few | many}
    return tuple(dataclasses.replace(c, times=times) for c, times in moved.items() if times > 0)


def _runs(collectives: tuple[Collective, ...]) -> Counter[Collective]:
    """How often each different one runs."""
    runs = Counter()
    for collective in collectives:
        runs[dataclasses.replace(collective, times=0)] += collective.times
    return runs


def _optimal(total: float) -> float | None:
    """XLA's sum without the -1 that stands for every operation it has no figure for; the others stay below 1 s."""
    return total - math.floor(total) or None if total < 0 else total or None


def _number(analysis: dict[str, float], name: str) -> float:
    return max(analysis.get(name, 0.0), 0.0)
