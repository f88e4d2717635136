"""What the commands that run stages share: a config, overrides by name, a run directory."""

import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nla_jax.commands import plain_errors
from nla_jax.files import absolute, as_path, in_bucket
from nla_jax.shipped import find_config, shipped_configs

if TYPE_CHECKING:
    from nla_jax.config import ExperimentConfig
    from nla_jax.files import AnyPath

PREEMPTED = 75
"""Exit status after SIGTERM, once the state is saved: EX_TEMPFAIL, "try again" to many schedulers."""
_USAGE = """usage: {program} CONFIG [--run-dir DIR] [--distributed [HOST:PORT,PROCESSES,INDEX]] [--FIELD VALUE ...]

{description}

CONFIG    a Python file with get_config(), the directory of a run, or one of the configs that come with the library:
          {configs}
--run-dir where everything is written, a folder or gs://BUCKET/NAME, default runs/NAME; an existing run goes on where it
          stopped
--distributed
          one process of several that run the same command: without a value on Cloud TPU, SLURM and Kubernetes,
          which tell a process its place; all need the run directory
--FIELD   any config field by its dotted name, for instance --rl.loop.steps 50

`{program} CONFIG --help` lists all fields with their values in that config."""


def locate(name: str) -> "AnyPath":
    """The directory of the run or the file of the config that a command line names.

    Raises:
      FileNotFoundError: there is neither.
    """
    path = as_path(name)
    if path.is_dir() and (name not in shipped_configs() or (path / "config.json").exists()):
        return path
    if in_bucket(path):
        raise FileNotFoundError(
            f"there is no run at {path}; give the address of one, or a config on this machine: files of Python are "
            "not run from a bucket"
        )
    return find_config(name)


def config_at(place: "AnyPath") -> "ExperimentConfig":
    """The config of the run or the file that `locate` found.

    Raises:
      FileNotFoundError: a directory that holds no run.
      ValueError: a file that holds no config.
    """
    from nla_jax.config import load_config, read_config

    return read_config(place / "config.json") if place.is_dir() else load_config(place)


def parse(arguments: list[str], program: str) -> tuple["ExperimentConfig", "AnyPath"]:
    """Read the config or the run named first, apply the overrides, and settle the run directory.

    Exits with a message on an unknown field or a value of the wrong type.

    Args:
      arguments: what stands after the command.
      program: the command, for the help.

    Raises:
      FileNotFoundError: there is no such config.
      ValueError: --run-dir without a directory, an option of an earlier version, or a file that holds no config.
    """
    import tyro

    from nla_jax.config import ExperimentConfig

    given, rest = locate(arguments[0]), arguments[1:]
    if {"--tensorboard", "--no-tensorboard"} & set(rest):
        raise ValueError(
            "--tensorboard has become one of several trackers: give --tracker tensorboard, or none"
        )
    config = config_at(given)
    run_dir = given if given.is_dir() else as_path(f"runs/{config.name}")
    if "--run-dir" in rest:
        at = rest.index("--run-dir")
        if at + 1 == len(rest):
            raise ValueError("--run-dir needs a directory")
        run_dir, rest = as_path(rest[at + 1]), rest[:at] + rest[at + 2 :]
    config = tyro.cli(ExperimentConfig, default=config, args=rest, prog=f"{program} {arguments[0]}")
    return config, run_dir


def run(arguments: list[str], *, stages: Sequence[str] = (), program: str, description: str | None) -> None:
    """Run stages as a command line says.

    Args:
      arguments: what stands after the command.
      stages: names in `nla_jax.pipeline.stages.STAGE_NAMES`; all of them if none is given.
      program: the command, for the help.
      description: what it does, for the help; a docstring is None under `python -OO`.

    Raises:
      SystemExit: status 0 or 2 after the help, `PREEMPTED` after SIGTERM, else with the message of an error.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        configs = textwrap.fill(", ".join(shipped_configs()), 110, subsequent_indent=" " * 10)
        print(_USAGE.format(program=program, description=description or "", configs=configs))
        raise SystemExit(0 if arguments else 2)
    if not arguments[0].startswith("-"):
        # A name that is not there is answered at once: what follows takes seconds.
        with plain_errors():
            locate(arguments[0])
    import jax

    from nla_jax.pipeline.run import Run
    from nla_jax.pipeline.stages import STAGE_NAMES, run_stages
    from nla_jax.process import join_processes, use_compilation_cache
    from nla_jax.training.loop import Preempted

    stages = stages or STAGE_NAMES
    with plain_errors():
        try:
            use_compilation_cache()
            config, run_dir = parse(join_processes(arguments), program)
            run_stages(Run(config, run_dir), stages)
        except Preempted as stop:
            print(f"{stop}; the same command goes on from there", file=sys.stderr)
            raise SystemExit(PREEMPTED) from stop
        if jax.process_index() > 0:
            return
        print(f"everything is in {absolute(run_dir)}")
        if "report" in stages:
            print(f"open {absolute(run_dir) / 'report.html'}")
