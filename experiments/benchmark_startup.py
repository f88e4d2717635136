"""How long a shell command takes to explain a sentence: cold and warm, as a whole and by its phases.

`nla explain demo TEXT` is timed as a process of its own, first with an empty cache of compiled programs, then with a
full one. The phases are those of the same work in a process of ours, after the whole runs, with the cache full.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nla_jax.commands.startup import silence_libtpu
from nla_jax.process import machine_class

TEXT = "The Eiffel Tower stands in the city of"
PHASES = """
import json, sys, time
started = time.perf_counter()
def phase(name):
    global started
    now = time.perf_counter()
    seconds[name], started = now - started, now
seconds = {}
from nla_jax.pipeline.load import load
from nla_jax.process import use_compilation_cache
phase("imports")
use_compilation_cache()
nla = load("demo", quiet=True)
phase("target, adapters, training mean")
activations = nla.activations(sys.argv[1])
phase("activations")
explanations = nla.explain(activations)
phase("explanations")
nla.score(activations, explanations)
phase("reconstructions and scores")
print(json.dumps(seconds))
"""


def timed(arguments: list[str], cache: str) -> tuple[float, str]:
    """Seconds that a Python process takes with its compiled programs in `cache`, and what it prints."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"the command {arguments} failed: {done.stderr.strip().splitlines()[-1]}")
    return seconds, done.stdout


def main() -> None:
    """Time cold and warm runs, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each kind, of which the median counts")
    parser.add_argument("--text", default=TEXT, help="what is explained")
    parser.add_argument("--json", type=Path, help="write every time there, for write_figures.py")
    args = parser.parse_args()
    command = ["-m", "nla_jax", "explain", "demo", args.text]
    cold, warm, phases = [], [], []
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(timed(command, cache)[0])
            warm.append(timed(command, cache)[0])
            phases.append(json.loads(timed(["-c", PHASES, args.text], cache)[1]))
    print(f"nla explain demo {args.text!r}, median of {args.repeat} (least to most), seconds")
    for name, seconds in (("cold", cold), ("warm", warm)):
        print(f"  {name:34}{statistics.median(seconds):6.1f}  ({min(seconds):.1f} to {max(seconds):.1f})")
    print("phases of a warm run, seconds")
    for name in phases[0]:
        print(f"  {name:34}{statistics.median(run[name] for run in phases):6.1f}")
    if args.json:
        measured = {"machine": machine_class(), "cold": cold, "warm": warm, "phases": phases}
        args.json.write_text(json.dumps(measured, indent=1), encoding="utf-8")


if __name__ == "__main__":
    silence_libtpu()
    main()
