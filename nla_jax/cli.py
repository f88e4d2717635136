"""Where every script that trains begins. It imports next to nothing, since it may start the process anew."""

import os
import sys


def use_huge_pages() -> None:
    """Start this process anew with an allocator that asks for huge pages, where Linux grants them on request.

    XLA's buffers on CPU are fresh memory in every step; touching it in pages of 4 KB takes a sixth of a training
    step. The C library reads the setting once, at the start of a process.
    """
    setting = "glibc.malloc.hugetlb=1"
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in tunables:
        tunables = ":".join(filter(None, (tunables, setting)))
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": tunables})


def main(description: str, *stages: str) -> None:
    """Run some stages of an experiment from the command line, all of them if none is named.

    Args:
      description: of the script, for its help.
      stages: names in `nla_jax.config.STAGES`.
    """
    use_huge_pages()
    # Takes seconds, so not before the process that stays.
    from nla_jax.pipeline import command_line

    command_line.run(stages, description)
