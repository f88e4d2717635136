"""Kill a run at random moments, half of them while it saves, and compare what it ends with to a run left alone.

`python tests/random_kills.py OUT --kills 30` takes about a quarter of an hour; pytest runs four chosen kills.
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
from test_end_to_end import STAGES, read_metrics, write_corpus
from tiny_model import write_tiny_model

from nla_jax.training.checkpoint_files import Description, describe, verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="an empty directory")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out.resolve()
    model, corpus = write_tiny_model(out / "model"), write_corpus(out / "texts.jsonl")
    longer = [word for stage in STAGES for word in (f"--{stage.replace('_', '-')}.loop.steps", "200")]
    first = first_save(command("train_nla.py", model, corpus, out / "alone", *longer), out / "alone")
    print(f"the first save comes after {first:.0f} s", flush=True)
    run_dir, rng = out / "killed", random.Random(args.seed)
    arguments = command("train_nla.py", model, corpus, run_dir, *longer)
    saving = checked = 0
    for number in range(args.kills):
        was_saving = kill(arguments, run_dir, first * rng.uniform(0.4, 1.1), in_save=number % 2 == 1)
        saving += was_saving
        for description in complete(run_dir):
            verify(description)
            checked += 1
        print(
            f"kill {number + 1}: {'in a save' if was_saving else 'between'}, {progress(run_dir)}", flush=True
        )
    finish(arguments)
    same = read_metrics(run_dir) == read_metrics(out / "alone")
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


def kill(arguments: list[str], run_dir: Path, after: float, *, in_save: bool) -> bool:
    """Start the run and kill it `after` so many seconds, or in the first save from then on; whether it was saving."""
    started, process = time.time(), start(arguments)

    def is_saving() -> bool:
        # What an earlier kill left behind is older.
        return any(map(is_fresh, (run_dir / "checkpoints").glob("*/*tmp*")))

    def is_fresh(path: Path) -> bool:
        try:
            return path.stat().st_mtime > started
        except FileNotFoundError:
            return False

    while time.time() - started < after or (in_save and not is_saving()):
        if process.poll() is not None:
            raise SystemExit("the run ended before all kills; give it more steps or fewer kills")
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


def progress(run_dir: Path) -> str:
    return ", ".join(
        f"{path.name} {max((int(p.name) for p in path.iterdir() if p.name.isdecimal()), default=0)}"
        for path in sorted((run_dir / "checkpoints").glob("*"))
    )


if __name__ == "__main__":
    main()
