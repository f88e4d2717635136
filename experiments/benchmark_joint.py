"""Compare settings of joint training, each from the data and the warm starts of one run, and tell which go on gaining.

Each setting is a run directory of its own beside the others, which links to what it shares with the run: its data, and
the warm starts that the setting leaves as they are. Stages that it changes (ar_sft, distill) are run before. After
every setting the table, the figures and the plot are written anew. The command goes on where it was killed, and a
setting that fails is told and left out.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from benchmarks.measure import markdown

from nla_jax.commands import plain_errors
from nla_jax.commands.experiment import parse
from nla_jax.config import ExperimentConfig, read_config, save_config
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.stages import STAGES
from nla_jax.process import machine_class

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SETTINGS = {
    "as_it_is": "",
    "ar_twice": "--rl.ar-updates 2",
    "ar_twice_writer": "--rl.ar-updates 2 --rl.writer-share 0.5",
    "ar_four_times_writer": "--rl.ar-updates 4 --rl.replay-rounds 8 --rl.writer-share 0.25",
    "std_of_batch": "--rl.policy.std-of batch --rl.policy.drop-flat-groups",
    "cispo": "--rl.policy.ratio cispo",
    "no_kl": "--rl.policy.kl-coefficient 0",
    "group_8": "--rl.group 8",
    "activations_16": "--rl.activations 16",
    "av_rate_1e-4": "--rl.av-optimizer.learning-rate 1e-4",
    "balanced": "--rl.balance-places --ar-sft.balance-places",
    "cut": "--rl.cut 4 24 --ar-sft.cut 4 24",
    "own_texts": "--ar-sft.verbalized-samples 4",
    "best_of_8": "--distill.loop.steps 50 --distill.loop.evaluate-every 25",
}
"""Settings by name, as they are given on the command line."""
SHOWN = {
    "judge": "judge_fve_nrm",
    "own": "own_fve_nrm",
    "repeated": "repeated",
    "copied": "copied",
}
"""Columns of the table, with the metrics whose values at the last evaluation they hold."""
LAST = 3
"""Evaluations whose mean is told beside the best one, which is chosen by the same noise that it is told with."""


def prepared(base: Run, directory: Path, overrides: Sequence[str]) -> Run:
    """The run of a setting, with links to everything of the base run that it shares.

    Raises:
      ValueError: the setting changes data or the AV's warm start, which are the base run's; or the directory holds
        results of another one.
    """
    config, _ = parse([str(base.directory), *overrides], "benchmark_joint.py")
    if stage_digest(config, "av_sft") != stage_digest(base.config, "av_sft"):
        raise ValueError(
            f"{shlex.join(overrides)} changes the data or the AV's warm start, which all settings share; give "
            "options of ar_sft, distill and rl alone"
        )
    (directory / "data").mkdir(parents=True, exist_ok=True)
    (directory / "checkpoints").mkdir(exist_ok=True)
    of_stage = {"data/verbalized": "ar_sft", "data/distilled": "distill"}
    of_stage |= {f"checkpoints/{stage}": stage for stage in ("av_sft", "ar_sft", "distill")}
    for path in sorted([*(base.directory / "data").iterdir(), *(base.directory / "checkpoints").iterdir()]):
        name = path.relative_to(base.directory).as_posix()
        stage = of_stage.get(name, "explain" if name.startswith("data/") else None)
        is_shared = stage is not None and stage_digest(config, stage) == stage_digest(base.config, stage)
        if is_shared and not (directory / name).exists():
            (directory / name).symlink_to(path.absolute())
    run = Run(config, directory)
    for stage in STAGES:
        if stage.name != "evaluate":
            stage.is_done(run)
    save_config(config, directory / "config.json")
    return run


def train(run: Run) -> None:
    """Run what is missing of the setting's stages, each in a process of its own, which gives its memory back.

    Raises:
      CalledProcessError: a stage failed.
    """
    for stage in STAGES:
        if stage.name in ("ar_sft", "distill", "rl") and not stage.is_done(run):
            command = [sys.executable, "-m", "nla_jax", "stage", stage.name, str(run.directory)]
            subprocess.run(command, check=True)


def curve(rows: Sequence[Mapping[str, Any]], config: ExperimentConfig) -> list[dict[str, float]]:
    """The evaluations of joint training, each with the rollouts and the seconds that it took until then."""
    rounds = sorted((row for row in rows if row["stage"] == "rl"), key=lambda row: row["step"])
    seconds = np.array([row.get("speed/seconds", 0.0) for row in rounds])
    if len(seconds) > 2:
        seconds[1] = np.median(seconds[1:])  # The first round compiles.
    total = np.cumsum(seconds)
    return [
        {
            **{name: value for name, value in row.items() if isinstance(value, int | float)},
            "rollouts": row["step"] * config.rl.activations * config.rl.group,
            "seconds": float(total[number]),
        }
        for number, row in enumerate(rounds)
        if "judge_fve_nrm" in row
    ]


def table(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The settings as markdown, best first by the mean of their last evaluations."""
    places = sorted({name for points in curves.values() for name in points[-1] if "judge_fve_nrm_" in name})
    shown = SHOWN | {place.removeprefix("judge_fve_nrm_"): place for place in places}
    columns = ["setting", "rollouts", "seconds", "judge at 0", "best", f"mean of last {LAST}", *shown]
    ranked = sorted(curves.items(), key=lambda item: -_mean_of_last(item[1]))

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    rows = [
        [
            name,
            str(points[-1]["rollouts"]),
            f"{points[-1]['seconds']:.0f}",
            cell(points[0]["judge_fve_nrm"]),
            cell(max(point["judge_fve_nrm"] for point in points)),
            cell(_mean_of_last(points)),
            *[cell(points[-1].get(metric)) for metric in shown.values()],
        ]
        for name, points in ranked
    ]
    return markdown(columns, rows)


def _mean_of_last(points: Sequence[Mapping[str, float]]) -> float:
    return float(np.mean([point["judge_fve_nrm"] for point in points[-LAST:]]))


def plot(curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw the judge against rollouts and seconds, at each place that has a figure, and repetition and copying."""
    places = sorted({name for points in curves.values() for name in points[-1] if "judge_fve_nrm_" in name})
    panels = [("judge_fve_nrm", "rollouts"), ("judge_fve_nrm", "seconds")]
    panels += [(metric, "rollouts") for metric in ("repeated", "copied", *places)]
    figure, axes = plt.subplots(
        -(-len(panels) // 2), 2, figsize=(12, 4 * -(-len(panels) // 2)), squeeze=False
    )
    for ax, (metric, against) in zip(axes.flat, panels, strict=False):
        for number, (name, points) in enumerate(curves.items()):
            known = [point for point in points if metric in point]
            style = {"linestyle": ("-", "--", ":")[number // 10 % 3], "marker": "o", "markersize": 3}
            ax.plot([p[against] for p in known], [p[metric] for p in known], label=name, **style)
        ax.set(xlabel=against, ylabel=metric)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def write(out: Path, curves: Mapping[str, Sequence[Mapping[str, float]]], notes: Mapping[str, Any]) -> None:
    """Write table.md, figures.json and curves.png."""
    text = table(curves)
    (out / "table.md").write_text(text + "\n")
    (out / "figures.json").write_text(json.dumps({**notes, "curves": curves}, indent=1))
    plot(curves, out / "curves.png")
    print(text, flush=True)


def main() -> None:
    """Parse the command line and compare the settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="directory of a run whose av_sft and ar_sft are done")
    parser.add_argument("out", type=Path, help="where everything goes that is computed")
    parser.add_argument("--rounds", type=int, default=64, help="rounds of each setting")
    parser.add_argument(
        "--evaluations", type=int, default=8, help="evaluations of each, beside that of the start"
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument(
        "--add", nargs=2, action="append", default=[], metavar=("NAME", "OPTIONS"),
        help='a further setting, such as --add hot "--rl.policy.temperature 1.2"; it may be given several times',
    )  # fmt: skip
    args = parser.parse_args()
    if not (args.run / "config.json").is_file():
        parser.error(f"{args.run} is not the directory of a run; train one with `nla train CONFIG`")
    base = Run(read_config(args.run / "config.json"), args.run)
    every = str(max(args.rounds // args.evaluations, 1))
    loop = ["--rl.loop.steps", str(args.rounds), "--rl.loop.evaluate-every", every]
    loop += ["--rl.loop.checkpoint-every", every]
    settings, curves, failed = {name: SETTINGS[name] for name in args.settings} | dict(args.add), {}, {}
    # Whatever is wrong with a setting is told before the first of them takes its time.
    with plain_errors():
        runs = {
            name: prepared(base, args.out / name, [*loop, *shlex.split(options)])
            for name, options in settings.items()
        }
    for name, run in runs.items():
        print(f"{name}: {settings[name] or 'no option'}", flush=True)
        try:
            train(run)
        except subprocess.CalledProcessError as error:
            failed[name] = str(error)
            print(f"{name} failed and is left out: {error}", file=sys.stderr, flush=True)
        else:
            curves[name] = curve(run.log.rows(), run.config)
        if curves:
            write(args.out, curves, {"machine": machine_class(), "rounds": args.rounds, "failed": failed})


if __name__ == "__main__":
    main()
