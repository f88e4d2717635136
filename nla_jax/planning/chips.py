"""The chips that runs are planned for, and devices to compile for, which need not be present."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device."""

    flops: float
    """bfloat16 operations a second."""
    bandwidth: float
    """Bytes a second to and from its memory."""
    memory: float
    """Bytes of memory that programs can use."""
    links: float
    """Bytes a second that the device can send to its neighbours, over all links together."""


# FLOPs, bandwidths and links: the pages "TPU v5e", "TPU v5p" and "TPU v6e" of docs.cloud.google.com/tpu/docs, whose
# interconnect figures are bidirectional (400, 1200 and 800 GB/s): half goes out. Memory: what XLA's own message says a
# program may use, a little less than the 16, 95 and 32 GB on those pages. GPUs: NVIDIA's data sheets (dense FLOPs).
CHIPS = {
    "v5e": Chip(197e12, 819e9, 15.75 * GIB, 200e9),
    "v5p": Chip(459e12, 2765e9, 95.74 * GIB, 600e9),
    "v6e": Chip(918e12, 1638e9, 31.25 * GIB, 400e9),
    "a100": Chip(312e12, 2039e9, 80e9, 300e9),
    "h100": Chip(989e12, 3350e9, 80e9, 450e9),
    "h200": Chip(989e12, 4800e9, 141e9, 450e9),
}
TPUS = {"v5e": "v5e:4x4", "v5p": "v5p:4x4x4", "v6e": "v6e:2x4"}
"""Kinds of TPU, each with an example of a topology."""


def tpu_devices(topology: str) -> tuple[Chip, Sequence[jax.Device]]:
    """The chip and the devices of a TPU slice, which libtpu can compile for although there is none here.

    Args:
      topology: kind and shape, as in "v5e:4x4" (16 chips) or "v5p:2x2x1" (4 chips).

    Raises:
      ValueError: the kind is unknown, or no slice has that shape.
      ModuleNotFoundError: libtpu is not installed.
    """
    kind, _, shape = topology.partition(":")
    examples = ", ".join(TPUS.values())
    if kind not in TPUS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(
            f"topology {topology!r} is unknown; give a kind ({', '.join(TPUS)}) and a shape in chips, as in {examples}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "libtpu is not installed, and without it nothing can be compiled for a TPU; "
            f"pip install 'jax[tpu]=={jax.__version__}'"
        )
    # Otherwise libtpu asks the cloud which machine this is, and keeps other plans out as if it used chips.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    # A slice is made of hosts with 2 x 2 chips; a single chip is a host of its own.
    single = {"chips_per_host_bounds": (1, 1, 1)} if set(shape.split("x")) == {"1"} else {}
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **single)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"there is no topology {topology!r} ({error}); shapes that exist are like those of {examples}"
        ) from error
    return CHIPS[kind], description.devices


def stand_in_devices(count: int, memory: float, chip: str) -> tuple[Chip, Sequence[jax.Device]]:
    """`count` CPU devices that stand in for GPUs of the given memory; XLA:CPU then plans the memory.

    Raises:
      ValueError: the chip is unknown; or JAX's devices exist already, and are not `count`.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip {chip!r} is unknown; known: {', '.join(CHIPS)}")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if jax.device_count() != count:
            raise ValueError(f"JAX already runs with {jax.device_count()} devices, not {count}") from error
    return dataclasses.replace(CHIPS[chip], memory=memory), jax.devices("cpu")
