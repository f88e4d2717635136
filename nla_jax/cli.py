"""The command line that every script in experiments/ shares: a config file, overrides by name, a run directory."""

import os
import sys
from pathlib import Path

import jax
import tyro

from nla_jax.config import STAGES, ExperimentConfig, load_config
from nla_jax.run import Run
from nla_jax.stages.pipeline import run_stages

_USAGE = """usage: {script} CONFIG [--run-dir DIR] [--FIELD VALUE ...]

{description}

CONFIG    a Python file with get_config(), for instance one of configs/
--run-dir where everything is written, default runs/NAME; an existing run goes on where it stopped
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


def parse(description: str, arguments: list[str]) -> tuple[ExperimentConfig, Path]:
    """Read the config file named first, apply the overrides, and settle the run directory.

    Exits with a message on an unknown field or a value of the wrong type.
    """
    script = Path(sys.argv[0]).name
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE.format(script=script, description=description))
        raise SystemExit(0 if arguments else 2)
    config, rest = load_config(arguments[0]), arguments[1:]
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
        config, run_dir = parse(description, sys.argv[1:])
        run_stages(Run(config, run_dir), stages)
        print(f"everything is in {run_dir.resolve()}")
        if "report" in stages:
            print(f"open {run_dir.resolve() / 'report.html'}")
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
