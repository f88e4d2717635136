"""What the scripts of stages share: a config file, overrides by name, a run directory."""

import sys
from pathlib import Path

import jax
import tyro

from nla_jax.config import ExperimentConfig, load_config, read_config
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.stages import STAGE_NAMES, run_stages
from nla_jax.process import join_processes, use_compilation_cache
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


def run(stages: tuple[str, ...], description: str) -> None:
    """Run some stages of an experiment from the command line; without any, all."""
    stages = stages or STAGE_NAMES
    assert set(stages) <= set(STAGE_NAMES)
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
