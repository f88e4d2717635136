"""What a run takes on devices that are not there: memory, operations, traffic, and the speed they allow.

Every step is compiled ahead of time for the devices, from shapes alone: nothing is allocated, no weights are read and
no accelerator is needed. For TPUs pip install 'jax[tpu]'. GPUs are stood in for by simulated CPU devices: operations
and collectives then are a GPU program's, temporaries only like it.

examples:
  nla plan smollm2_135m_gpu --topology v5e:2x4
  nla plan qwen2_5_7b --topology v5e:4x4 --held
  nla plan qwen2_5_7b --topology v5e:4x4 --blocks 2 4 --mesh.fsdp 16
  nla plan smollm2_135m_gpu --devices 8 --hbm 80 --steps av_update
"""

import argparse
import sys
from pathlib import Path

import jax
import tyro

from nla_jax.commands import plain_errors
from nla_jax.commands.experiment import config_at, locate
from nla_jax.config import ExperimentConfig
from nla_jax.planning.architectures import read_architecture
from nla_jax.planning.chips import CHIPS, stand_in_devices, tpu_devices
from nla_jax.planning.plan import Plan, alternatives, held_by_step, make_plan
from nla_jax.planning.report import render, render_held
from nla_jax.planning.steps import STEPS, PromptLengths


def main(arguments: list[str]) -> None:
    """Parse the command line, compile, print, and explore if asked to."""
    # Plans never run on what is here.
    jax.config.update("jax_platforms", "cpu")
    with plain_errors():
        plan(*parse(arguments))


def parse(command_line: list[str]) -> tuple[argparse.Namespace, ExperimentConfig]:
    """Read the command line; what is not the planner's own overrides fields of the config."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="nla plan", description=__doc__, formatter_class=form, allow_abbrev=False
    )
    parser.add_argument(
        "config",
        help="a file with get_config(), the directory of a run, or a config that comes along; further --FIELD VALUE "
        "override its fields",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", help="a TPU slice: kind and shape in chips, as v5e:4x4 or v5p:2x2x4")
    where.add_argument("--devices", type=int, help="a number of GPUs")
    parser.add_argument("--hbm", type=float, default=80.0, help="GB of each GPU")
    parser.add_argument("--chip", default="h100", help=f"whose peaks bound GPUs: {', '.join(CHIPS)}")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="which to compile")
    parser.add_argument(
        "--blocks",
        nargs=2,
        type=int,
        default=(),
        help="compile at these two depths and extrapolate: seconds instead of minutes for large models",
    )
    parser.add_argument(
        "--held", action="store_true", help="compile nothing: what is held, from shapes alone"
    )
    parser.add_argument("--explore", action="store_true", help="turn each knob and plan the worst step again")
    parser.add_argument("--prefix", type=int, default=80, help="tokens of the AV's prompt before the marker")
    parser.add_argument("--tail", type=int, default=20, help="tokens of it after the marker")
    arguments, rest = parser.parse_known_args(command_line)
    default = config_at(locate(arguments.config))
    config = tyro.cli(ExperimentConfig, default=default, args=rest, prog=f"nla plan {arguments.config}")
    return arguments, config


def plan(arguments: argparse.Namespace, config: ExperimentConfig) -> None:
    """Compile the steps of a config for the devices that the arguments name, and print what they take."""
    if arguments.topology:
        chip, devices = tpu_devices(arguments.topology)
    else:
        chip, devices = stand_in_devices(arguments.devices, arguments.hbm * 1e9, arguments.chip)
    lm = read_architecture(config.model.path)
    lengths = PromptLengths(arguments.prefix, arguments.tail)

    title = (
        f"{config.name} ({Path(config.model.path).name}) on {arguments.topology or f'{len(devices)} GPUs'}\n"
    )
    if arguments.devices and config.model.remat and not config.model.scan_blocks:
        title += (
            "\nXLA:CPU, which stands in for the GPUs' compiler, keeps what remat would compute again, unless blocks "
            "are scanned: temporaries of updates are far too high without --model.scan-blocks.\n"
        )
    if arguments.held:
        held = held_by_step(config, lm, devices, steps=tuple(arguments.steps), lengths=lengths)
        print(title, render_held(held, chip), sep="\n")
        return

    def planned(config: ExperimentConfig, steps: tuple[str, ...]) -> Plan:
        return make_plan(
            config,
            lm,
            chip,
            devices,
            steps=steps,
            blocks=tuple(arguments.blocks),
            lengths=lengths,
            compiled=tell,
        )

    def tell(step: str, blocks: int, cost: object, text: str) -> None:
        print(f"compiled {step} with {blocks} blocks in {cost.compile_seconds:.0f} s", file=sys.stderr)

    found = planned(config, tuple(arguments.steps))
    print(title, render(found), sep="\n")
    if arguments.explore:
        worst = max(found.steps.values(), key=lambda step: step.peak).name
        print(f"\n{worst} with one knob turned, GiB at its peak and least ms:")
        for change, other in (("as it is", config), *alternatives(config, found)):
            try:
                step = planned(other, (worst,)).steps[worst]
                speed = "does not fit" if step.cost is None else f"{1e3 * step.cost.seconds(chip):.3g}"
                print(f"  {change:45} {step.peak / 2**30:8.2f} {speed:>12}")
            except ValueError as error:
                print(f"  {change:45} {error}")
