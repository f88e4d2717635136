"""The command line that every script in experiments/ shares: a config file, overrides by name, a run directory."""

import os
import re
import sys
from pathlib import Path

import jax
import tyro

from nla_jax.config import STAGES, ExperimentConfig, load_config, read_config
from nla_jax.run import Run
from nla_jax.stages.pipeline import run_stages
from nla_jax.training.loop import Preempted

PREEMPTED = 75
"""Exit status after SIGTERM, once the state is saved: EX_TEMPFAIL, "try again" to many schedulers."""
_USAGE = """usage: {script} CONFIG [--run-dir DIR] [--distributed [HOST:PORT,PROCESSES,INDEX]] [--FIELD VALUE ...]

{description}

CONFIG    a Python file with get_config(), for instance one of configs/, or the directory of a run
--run-dir where everything is written, default runs/NAME; an existing run goes on where it stopped
--distributed
          one process of several that run the same command (docs/scaling.md): without a value on Cloud TPU, SLURM and
          Kubernetes, which tell a process its place; all need the run directory
--FIELD   any config field by its dotted name, for instance --rl.loop.steps 50

`{script} CONFIG --help` lists all fields with their values in that config."""


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


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that a second run starts faster; an already configured cache stays."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = Path.home() / ".cache" / "nla_jax" / "compilations"
        jax.config.update("jax_compilation_cache_dir", str(folder))


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


def parse(description: str, arguments: list[str]) -> tuple[ExperimentConfig, Path]:
    """Read the config file or the run named first, apply the overrides, and settle the run directory.

    Exits with a message on an unknown field or a value of the wrong type.
    """
    script = Path(sys.argv[0]).name
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE.format(script=script, description=description))
        raise SystemExit(0 if arguments else 2)
    given, rest = Path(arguments[0]), arguments[1:]
    if given.is_dir():
        config, run_dir = read_config(given / "config.json"), given
    else:
        config = load_config(given)
        run_dir = Path("runs") / config.name
    if "--run-dir" in rest:
        at = rest.index("--run-dir")
        if at + 1 == len(rest):
            raise ValueError("--run-dir needs a directory")
        run_dir, rest = Path(rest[at + 1]), rest[:at] + rest[at + 2 :]
    config = tyro.cli(ExperimentConfig, default=config, args=rest, prog=f"{script} {arguments[0]}")
    return config, run_dir


def main(stages: tuple[str, ...], description: str) -> None:
    """Run some stages of an experiment from the command line."""
    assert set(stages) <= set(STAGES)
    use_huge_pages()
    try:
        use_compilation_cache()
        config, run_dir = parse(description, join_processes(sys.argv[1:]))
        run_stages(Run(config, run_dir), stages)
        if jax.process_index() > 0:
            return
        print(f"everything is in {run_dir.resolve()}")
        if "report" in stages:
            print(f"open {run_dir.resolve() / 'report.html'}")
    except Preempted as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(PREEMPTED) from stop
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
