"""What happens to a process before a command begins: a restart for faster memory, and silence about missing TPUs.

All of it must come before jax is imported, and this module does not import it. Only `nla_jax.__main__` and scripts call
it: a program that calls a command's `main` itself keeps its process as it is.
"""

import builtins
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_GOOGLE = "0x1ae0"
"""The vendor of TPUs on the PCI bus."""


def use_huge_pages() -> None:
    """Start this process anew with an allocator that asks for huge pages, where Linux grants them on request.

    XLA's buffers on CPU are fresh memory in every step; touching it in pages of 4 KB takes a sixth of a training
    step. The C library reads the setting once, at the start of a process. Nothing happens where the process is
    somebody else's: see `is_own_process`.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and _TUNABLE not in tunables and is_own_process(sys.orig_argv):
        tunables = ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": tunables})


def is_own_process(arguments: Sequence[str]) -> bool:
    """Whether the interpreter runs a program of this library and nothing else, so that starting it anew loses nothing.

    The programs are `nla`, `python -m nla_jax` and the scripts in a checkout's experiments/. In a notebook, a
    debugger, a profiler or a program that runs one of these inside itself the answer is no.

    Args:
      arguments: the interpreter's own command line, as in `sys.orig_argv`.
    """
    monitoring = getattr(sys, "monitoring", None)  # since Python 3.12
    watched = sys.gettrace() or sys.getprofile() or (monitoring and any(map(monitoring.get_tool, range(6))))
    if watched or hasattr(builtins, "get_ipython"):
        return False
    option, program = _program(arguments)
    if option == "m":
        return program in ("nla_jax", "nla_jax.__main__")
    path = Path(program).resolve()
    checkout = Path(__file__).resolve().parents[2]
    if path.parent == checkout / "experiments":
        return path.suffix == ".py"
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    folders = [Path(sysconfig.get_path("scripts", scheme)).resolve() for scheme in schemes]
    return path.name == "nla" and path.parent in folders


def _program(arguments: Sequence[str]) -> tuple[str, str]:
    """What an interpreter was told to run: ("m", a module), ("c", code) or ("", a file); ("", "") for none."""
    rest = iter(arguments[1:])
    for argument in rest:
        if argument == "--check-hash-based-pycs":
            next(rest, "")
        elif not argument.startswith("-"):
            return "", argument
        elif not argument.startswith("--"):
            # Options of one letter may stand together; these four take all that follows, or the next argument.
            at = next((at for at, letter in enumerate(argument) if letter in "cmWX"), None)
            value = at and (argument[at + 1 :] or next(rest, ""))
            if at and argument[at] in "cm":
                return argument[at], value
    return "", ""


def silence_libtpu() -> None:
    """Keep libtpu's complaints out of the output of commands on machines without TPUs.

    libtpu comes with `jax[tpu]`, which plans for TPUs anywhere. Without a TPU it complains that nobody has told it
    which one there is; told one, it finds none and is quiet.
    """
    asked = {"JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"} & set(os.environ)
    if not asked and importlib.util.find_spec("libtpu") is not None and not _has_tpu():
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _has_tpu() -> bool:
    """Whether a device of Google's is on the PCI bus, where JAX looks as well."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)
