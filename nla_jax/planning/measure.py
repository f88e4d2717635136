"""The cost of a step: it is compiled for devices that need not be present, and its memory and speed are read off."""

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
    """The cost of one run of a compiled step on each device, in bytes, operations and seconds."""

    arguments: float
    """Bytes of the arguments."""
    outputs: float
    """Bytes of the results that take memory of their own; results that reuse a donated argument are left out."""
    temporaries: float
    """Bytes of intermediate results."""
    code: float
    """Bytes of the program itself."""
    flops: float
    """Operations of the traced program's matrix products, split evenly over the devices."""
    redundancy: float
    """XLA's count of all operations divided by the even share of the matrix products: 1 where nothing is done twice."""
    memory_traffic: float
    """Bytes read from and written to main memory."""
    sent: float
    """Bytes sent to other devices."""
    optimal_seconds: float | None
    """XLA's own estimate, over the operations that it has a figure for, with the bodies of loops counted once; None
    where the backend gives none."""
    collectives: tuple[Collective, ...]
    compile_seconds: float

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Least seconds that each of the chip's peaks allows: compute, memory and links."""
        return {
            "compute": self.flops * self.redundancy / chip.flops,
            "memory": self.memory_traffic / chip.bandwidth,
            "links": self.sent / chip.links,
        }

    def seconds(self, chip: Chip) -> float:
        """The largest of the bounds: the step's seconds if all other work runs at the same time."""
        return max(self.bounds(chip).values())


def measure(step: Step, mesh: jax.sharding.Mesh) -> tuple[Cost, str]:
    """Compile a step, and return its cost and the compiled text.

    Raises:
      MemoryError: XLA found that the program does not fit; the message is XLA's.
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
    # Ratios are not linear in the number of blocks; the seconds of both compilations were spent.
    values |= {
        "redundancy": high.redundancy,
        "compile_seconds": low.compile_seconds + high.compile_seconds,
    }
    return Cost(collectives=_on_the_line(low.collectives, high.collectives, ahead), **values)


def _on_the_line(
    low: tuple[Collective, ...], high: tuple[Collective, ...], ahead: float
) -> tuple[Collective, ...]:
    """The collectives of both programs, each with its number of runs extrapolated."""
    few, many = map(_runs, (low, high))
    moved = {c: round(few[c] + (many[c] - few[c]) * ahead) for c in few | many}
    return tuple(dataclasses.replace(c, times=times) for c, times in moved.items() if times > 0)


def _runs(collectives: tuple[Collective, ...]) -> Counter[Collective]:
    """Each different collective -> how often it runs."""
    runs = Counter()
    for collective in collectives:
        runs[dataclasses.replace(collective, times=0)] += collective.times
    return runs


def _optimal(total: float) -> float | None:
    """XLA's sum of seconds without the -1 that it adds for every operation it has no figure for; None if that is all.

    The sum of the other operations is taken to be below 1 s.
    """
    return total - math.floor(total) or None if total < 0 else total or None


def _number(analysis: dict[str, float], name: str) -> float:
    return max(analysis.get(name, 0.0), 0.0)
