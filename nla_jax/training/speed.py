"""How fast a step's phases run, and what share of the device's measured peak they use."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh


@functools.cache
def matmul_peak(dtype: str) -> float:
    """FLOP/s that one device reaches in large matrix products with operands of `dtype`, measured once a process."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    # A mesh of its own, because programs run on the devices of the mesh that is set.
    with jax.set_mesh(Mesh([jax.local_devices()[0]], ("one",))):
        square = jnp.ones((size, size), dtype)
        product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
        product(square).block_until_ready()
        seconds = []
        for _ in range(7):
            started = time.perf_counter()
            product(square).block_until_ready()
            seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


@dataclasses.dataclass
class Stopwatch:
    """Times the phases of a step, waiting for the results of each."""

    dtype: str
    """Operand dtype of the products, whose peak the utilisation refers to."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    flops: dict[str, float] = dataclasses.field(default_factory=dict)

    def __call__(self, phase: str, function: Callable, *args: Any) -> Any:
        """Return `function(*args)`, complete, and note how long it took; a phase in several parts adds up."""
        started = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
        return result

    def metrics(self) -> dict[str, float]:
        """`speed/PHASE_seconds` and, of phases with `flops` (model FLOPs), `speed/PHASE_mfu`, in 0..1."""
        metrics = {f"speed/{phase}_seconds": seconds for phase, seconds in self.seconds.items()}
        peak = matmul_peak(self.dtype) * jax.device_count()
        for phase, flops in self.flops.items():
            metrics[f"speed/{phase}_mfu"] = flops / self.seconds[phase] / peak
        return metrics
