"""Kill the stages that make data at random moments, and compare what they end with to data made without a kill.

`python tests/data_kills.py OUT --kills 10` kills the stage extract ten times and then the stage explain ten times, on
a tiny model. The tests of both stages kill them within their process, where a file would be renamed.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from processes import ROOT, environment, finish
from tiny_model import write_tiny_model

from nla_jax.data.dataset import load_dataset
from nla_jax.data.manifest import verify_dataset
from nla_jax.files import as_path

STAGES = {"extract": ("base",), "explain": ("av_sft", "ar_sft", "rl", "held_out")}
"""The stages, with the data sets that each writes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="an empty directory")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out.resolve()
    model = write_tiny_model(out / "model")
    rng = random.Random(args.seed)
    for stage, said in kill_stages(model, out, args.documents, args.kills, rng):
        print(f"{stage}: {said}", flush=True)


def kill_stages(
    model: Path, out: Path, documents: int, kills: int, rng: random.Random
) -> Iterable[tuple[str, str]]:
    """Make data twice, once with kills; yields each stage with what happened to it, and fails where data differ."""

    def arguments(stage: str, run_dir: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "nla_jax", "stage", stage, "tiny", "--run-dir", str(run_dir)),
            *("--model.path", str(model), "--corpus.max-documents", str(documents)),
            *("--extraction.shard-documents", "4", "--extraction.layers", "0"),
        ]

    alone, killed = out / "alone", out / "killed"
    for stage, names in STAGES.items():
        started = time.perf_counter()
        finish(arguments(stage, alone))
        seconds = time.perf_counter() - started
        counts = []
        for _ in range(kills):
            counts.append(kill(arguments(stage, killed), killed / "data" / names[0], rng, seconds))
        finish(arguments(stage, killed))
        for name in names:
            compare(killed / "data" / name, alone / "data" / name)
        yield stage, f"{kills} kills, with {counts} files then there; the same rows as without"


def kill(arguments: list[str], folder: Path, rng: random.Random, seconds: float) -> int:
    """Start a stage and kill it, while it starts or soon after it has written one to three files more.

    Args:
      arguments: the command.
      folder: where its files go.
      rng: decides about the moment.
      seconds: how long the whole stage takes.

    Returns:
      How many files are there then.
    """

    def files() -> int:
        return len(list(folder.glob("*.parquet")))

    before, more = files(), rng.randrange(4)
    process = subprocess.Popen(
        arguments, env=environment(1), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    moment = time.monotonic() + (3 * seconds + 60 if more else rng.random() * seconds)
    while process.poll() is None and files() < before + max(more, 1) and time.monotonic() < moment:
        time.sleep(0.001)
    time.sleep(rng.random() * 0.01)
    if process.poll() is not None:
        raise SystemExit(f"a stage ended before it was killed, with {files()} files; give it more documents")
    process.send_signal(signal.SIGKILL)
    process.wait()
    return files()


def compare(folder: Path, other: Path) -> None:
    """Fail unless two data sets are whole and have the same rows, to the last bit."""
    assert verify_dataset(as_path(str(folder))) == verify_dataset(as_path(str(other))) > 0
    left, right = load_dataset(folder), load_dataset(other)
    assert left.activations.tobytes() == right.activations.tobytes(), f"{folder} has other activations"
    for name in ("doc_ids", "contexts", "explanations", "extra"):
        assert getattr(left, name) == getattr(right, name), f"{folder} has other {name}"
    names = [sorted(path.name for path in where.glob("*.parquet")) for where in (folder, other)]
    assert names[0] == names[1], f"{folder} has other files"


if __name__ == "__main__":
    main()
