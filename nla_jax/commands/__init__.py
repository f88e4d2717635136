"""The commands behind `nla`: a module each, whose `main(arguments)` reads what stands after the command's name.

This file and `nla_jax.__main__` import next to nothing, so that the help and a restart of the process are quick.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nla_jax.files import AnyPath

COMMANDS = {
    "train": "train, measure and report an NLA: all stages in order",
    "stage": "one stage alone: extract, explain, av_sft, ar_sft, distill, rl, evaluate or report",
    "explain": "explain a text's activations with a trained NLA",
    "evaluate": "measure a run or released models on held-out documents, and write the report",
    "compare": "put evaluated runs side by side",
    "convert": "export a run's models, merged or as adapters",
    "plan": "what a run takes on TPUs or GPUs that are not there",
    "data": "look at data sets, bring your own, share them, and tell what texts for them will cost",
    "inspect": "what the checkpoints of a run hold, and whether it can be read",
    "completion": "print a script that completes all of this in bash, zsh or fish",
}
"""The modules of this package that are commands, each with its line in the help."""


def path_argument(text: str) -> "AnyPath":
    """The path of an argument, for `argparse`, which then tells why a place cannot be reached.

    Raises:
      ArgumentTypeError: as `as_path`.
    """
    from nla_jax.files import as_path

    try:
        return as_path(text)
    except (ValueError, ModuleNotFoundError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a text in which the cells of a column begin under each other."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows)


_STORE_CLIENTS = ("gcsfs", "google", "s3fs", "botocore", "aiohttp")
"""Packages that reach object stores, and whose errors share no class: a refused login, a bucket that is not there."""


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn the errors that a wrong input raises into one line on stderr, "error: MESSAGE", and exit status 1.

    Raises:
      SystemExit: the block raised ValueError, OSError, RuntimeError, ModuleNotFoundError or an object store's error.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _STORE_CLIENTS:
            raise
        raise SystemExit(f"error: the object store refused: {error}") from error
