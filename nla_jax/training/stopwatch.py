"""How fast a step's phases run, and what share of the device's measured peak they use."""

import concurrent.futures
import contextlib
import functools
import time
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nla_jax.sharding.placement import block_on_simulated_devices


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


class Stopwatch:
    """Times the phases of steps by when their results are ready, so that whoever dispatches them never waits.

    A thread waits instead, for one result after the other, in the order in which a device computes them.
    """

    def __init__(self, dtype: str):
        """Start.

        Args:
          dtype: operand dtype of the products, whose peak the utilisation refers to.
        """
        self.peak = matmul_peak(dtype) * jax.device_count()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "stopwatch")
        self._free = 0.0  # when the device had finished all that it was given

    def lap(self) -> "Lap":
        """The phases of one step, which begins now or when the device is done with the last one."""
        return Lap(self)

    def watch(self, dispatched: float, result: jax.Array) -> concurrent.futures.Future:
        """When the device could begin and when it ended what makes `result`, as a future."""

        def wait() -> tuple[float, float]:
            result.block_until_ready()
            began = max(dispatched, self._free)
            self._free = time.perf_counter()
            return began, self._free

        return self._thread.submit(wait)


class Lap:
    """The phases of one step."""

    def __init__(self, stopwatch: Stopwatch):
        self._stopwatch, self._dispatched = stopwatch, time.perf_counter()
        self._times: dict[str, concurrent.futures.Future] = {}
        self._host_seconds: dict[str, float] = {}

    def until(self, phase: str, result: jax.Array) -> None:
        """Tell that what was dispatched since the last call is `phase`, and over when `result` is there.

        The result must not be donated to a later program.
        """
        self._times[phase] = self._stopwatch.watch(self._dispatched, block_on_simulated_devices(result))
        self._dispatched = time.perf_counter()

    @contextlib.contextmanager
    def on_host(self, phase: str) -> Iterator[None]:
        """Time what the host does inside a `with`, whatever the device does meanwhile."""
        started = time.perf_counter()
        yield
        self._host_seconds[phase] = time.perf_counter() - started

    def metrics(self, flops: Mapping[str, float]) -> dict[str, float]:
        """Wait for the device's phases.

        Args:
          flops: model FLOPs by phase.

        Returns:
          `speed/PHASE_seconds` of every phase on the device, `speed/seconds` from the first one's beginning to the last
          one's end, `speed/PHASE_mfu` in 0..1 where FLOPs are given, and `speed/PHASE_seconds` of phases on the host.
        """
        times = {phase: future.result() for phase, future in self._times.items()}
        seconds = {phase: ended - began for phase, (began, ended) in times.items()}
        began, ended = zip(*times.values(), strict=True)
        metrics = {f"speed/{phase}_seconds": value for phase, value in seconds.items()}
        metrics["speed/seconds"] = max(ended) - min(began)
        for phase, count in flops.items():
            metrics[f"speed/{phase}_mfu"] = count / seconds[phase] / self._stopwatch.peak
        return metrics | {f"speed/{phase}_seconds": value for phase, value in self._host_seconds.items()}
