"""Kill a run at random moments, half of them while it saves, and compare what it ends with to a run left alone.

`python tests/random_kills.py OUT --kills 30` takes half an hour on two cores; pytest runs four chosen kills.
`data_kills.py` does the same to the stages that make data.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from processes import ROOT, command, environment, finish
from test_end_to_end import read_metrics, write_corpus
from tiny_model import write_tiny_model

from nla_jax.training.checkpoint_files import Description, describe, verify

HIGH_RATE = ("--av-sft.optimizer.learning-rate", "1e-2")
"""The tiny model learns to end its answers then, so that rewards differ and joint training has something to lose."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="an empty directory")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out.resolve()
    model, corpus = write_tiny_model(out / "model"), write_corpus(out / "texts.jsonl")
    rounds = 10 * args.kills
    lengths = {"--av-sft.loop.steps": 60, "--ar-sft.loop.steps": 60, "--rl.loop.steps": rounds}
    more = (*HIGH_RATE, *(str(word) for pair in lengths.items() for word in pair))
    first = first_save(command("train_nla.py", model, corpus, out / "alone", *more), out / "alone")
    alone = read_metrics(out / "alone")
    rows = [alone["rl", step] for step in range(1, rounds + 1)]
    varied = sum(row["reward_std"] > 0 for row in rows)
    failed = sum(row["failed_fraction"] for row in rows) / rounds
    print(
        f"the first save comes after {first:.0f} s; rewards differ within groups in {varied} of {rounds} rounds, "
        f"{failed:.0%} of the answers fail",
        flush=True,
    )
    run_dir, rng = out / "killed", random.Random(args.seed)
    arguments = command("train_nla.py", model, corpus, run_dir, *more)
    saving = checked = 0
    for number in range(args.kills):
        # One in six dies before its first save. The others come eight steps further on the average.
        steps, pause = (0, rng.uniform(0, first)) if number % 6 == 0 else (rng.randrange(16), rng.random())
        was_saving = kill(arguments, run_dir, steps, pause, in_save=number % 2 == 1)
        saving += was_saving
        for description in complete(run_dir):
            verify(description)
            checked += 1
        print(f"kill {number + 1}: {'in a save' if was_saving else 'between'}, {latest(run_dir)}", flush=True)
    finish(arguments)
    same = read_metrics(run_dir) == alone
    print(
        f"{args.kills} kills, {saving} in saves; {checked} checkpoints read, none damaged; same metrics: {same}"
    )
    raise SystemExit(not same)


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, env=environment(1), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def first_save(arguments: list[str], run_dir: Path) -> float:
    """Let a run come to its end; seconds until its first checkpoint."""
    process, started, first = start(arguments), time.perf_counter(), None
    while process.poll() is None:
        if first is None and any((run_dir / "checkpoints").glob("*/*")):
            first = time.perf_counter() - started
        time.sleep(0.05)
    if process.returncode or first is None:
        raise SystemExit(f"the run that was left alone failed; see for yourself: {' '.join(arguments)}")
    return first


def kill(arguments: list[str], run_dir: Path, steps: int, pause: float, *, in_save: bool) -> bool:
    """Start the run; kill it so many saved steps and seconds later, or in the first save from then on.

    Returns whether it was saving.
    """
    before, started, process = sum(latest(run_dir).values()), time.time(), start(arguments)
    reached = started if steps == 0 else None

    def is_saving() -> bool:
        # What an earlier kill left behind is older.
        return any(map(is_fresh, (run_dir / "checkpoints").glob("*/*tmp*")))

    def is_fresh(path: Path) -> bool:
        try:
            return path.stat().st_mtime > started
        except FileNotFoundError:
            return False

    while reached is None or time.time() - reached < pause or (in_save and not is_saving()):
        if process.poll() is not None:
            raise SystemExit("the run ended before all kills; give it more steps or fewer kills")
        if reached is None and sum(latest(run_dir).values()) - before >= steps:
            reached = time.time()
        time.sleep(0.001)
    found = is_saving()
    process.send_signal(signal.SIGKILL)
    process.wait()
    return found


def complete(run_dir: Path) -> list[Description]:
    try:
        return describe(run_dir)
    except FileNotFoundError:
        return []


def latest(run_dir: Path) -> dict[str, int]:
    """The last saved step of each stage."""
    return {
        path.name: max((int(p.name) for p in path.iterdir() if p.name.isdecimal()), default=0)
        for path in sorted((run_dir / "checkpoints").glob("*"))
    }


if __name__ == "__main__":
    main()
