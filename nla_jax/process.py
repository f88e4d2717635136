"""The process that a script runs in: its compiled programs on disk, its place among several processes, its progress
bars, memory that it hands back to the system, and the class of its machine."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

import jax
from tqdm import tqdm


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that a second run starts faster; an already configured cache stays.

    Programs that compile in a tenth of a second are kept as well: there are dozens of them.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = Path.home() / ".cache" / "nla_jax" / "compilations"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def join_processes(arguments: list[str]) -> list[str]:
    """Make this process one of several if `--distributed` is among the arguments; return the others.

    Raises:
      ValueError: a value that is not HOST:PORT,PROCESSES,INDEX.
    """
    if "--distributed" not in arguments:
        return arguments
    at = arguments.index("--distributed")
    value, end = (arguments[at + 1 : at + 2] or [""])[0], at + 2
    if not value or value.startswith("--"):
        jax.distributed.initialize()
        return arguments[:at] + arguments[at + 1 :]
    match = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", value)
    if match is None or not int(match[3]) < int(match[2]):
        raise ValueError(
            f"--distributed {value}: expected HOST:PORT,PROCESSES,INDEX with INDEX from 0 to PROCESSES-1, "
            "for instance 10.0.0.1:1234,2,0"
        )
    jax.distributed.initialize(match[1], int(match[2]), int(match[3]))
    return arguments[:at] + arguments[end:]


def progress_bar(desc: str | None, total: int, unit: str) -> tqdm:
    """A progress bar that disappears when it is full; hidden if `desc` is None, and in all processes but the first."""
    quiet = desc is None or jax.process_index() > 0
    return tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True, leave=False, disable=quiet)


def warn(message: str) -> None:
    """Print a warning on stderr, above whatever progress bars there are; of several processes the first does."""
    if jax.process_index() == 0:
        tqdm.write(f"warning: {message}", file=sys.stderr)


def tell(message: str) -> None:
    """Print a line of information on stderr as `warn` prints its warnings."""
    if jax.process_index() == 0:
        tqdm.write(message, file=sys.stderr)


def return_freed_memory() -> None:
    """Hand freed memory back to the system: glibc keeps the gigabytes that compiling a step takes and frees."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


CPU_INSTRUCTIONS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 with bfloat16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}
"""Flag of /proc/cpuinfo -> its name; matrix products of one class of machine are as fast as its best one."""


def machine_class() -> str:
    """The kind of machine that a figure was measured on, such as "CPU, 2 cores, x86_64 with AMX"."""
    devices = jax.devices()
    kind = f"{len(devices)} x {devices[0].device_kind}" if devices[0].platform != "cpu" else "CPU"
    described = Path("/proc/cpuinfo")
    flags = set(described.read_text().split()) if described.exists() else set()
    best = next((f" with {name}" for flag, name in CPU_INSTRUCTIONS.items() if flag in flags), "")
    return f"{kind}, {os.cpu_count()} cores, {platform.machine()}{best}"
