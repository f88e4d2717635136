"""How fast a large data set is written, opened and read in a shuffled order, and what memory that takes.

Writes shards of random activations in bfloat16 with texts, opens them as training does, and draws batches in two
orders: that of training, which mixes rows within windows of row groups, and one that mixes all rows at once, for which
all files stay mapped. The files are put out of the system's cache before each, so that the disk is measured. Prints
one table; the data are deleted.
"""

import argparse
import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from benchmarks.measure import markdown, progress

from nla_jax.data import batches, store
from nla_jax.data.dataset import write_shard
from nla_jax.data.manifest import Manifest
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.data.store import open_dataset

BATCH = 256


def write(folder: Path, rows: int, width: int, shard_rows: int) -> None:
    """Write shards of rows; the vectors of a few thousand rows are repeated, so that making them costs nothing."""
    vectors = np.random.default_rng(0).standard_normal((shard_rows, width), np.float32)
    extraction = Extraction("none", width, 1, "synthetic", CorpusSlice(0, rows), 6)
    for number, start in enumerate(range(0, rows, shard_rows)):
        count = min(shard_rows, rows - start)
        columns = {
            "activation_vector": vectors[:count],
            "n_raw_tokens": np.arange(start, start + count),
            "activation_layer": np.ones(count, np.int64),
            "doc_id": [f"document-{row // 6}" for row in range(start, start + count)],
            "detokenized_text_truncated": [
                f"the context of row {row}" for row in range(start, start + count)
            ],
        }
        sidecar = Sidecar("set", "base", count, extraction, storage="bfloat16")
        write_shard(folder / f"base-{number:05d}.parquet", columns, sidecar)
        progress(f"{start + count:,} of {rows:,} rows written")
    Manifest.of(folder).save(folder)


def forget(folder: Path) -> None:
    """Put the files of a folder out of the system's cache."""
    for path in folder.glob("*.parquet"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(field: str) -> float:
    """GB of this process's memory by a field of /proc/self/status."""
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def draw(folder: Path, seconds: float, *, windowed: bool) -> None:
    """Open the data set and draw batches for some seconds; print what was measured as JSON."""
    if not windowed:
        # All row groups stay mapped, and the system reads the pages of single rows alone.
        batches.WINDOW_ROWS, store._ROWS_HELD, mmap.MADV_WILLNEED = 1 << 40, 1 << 40, mmap.MADV_RANDOM
    before, started = memory("VmRSS"), time.perf_counter()
    data = open_dataset(folder)
    opened = time.perf_counter() - started
    source = batches.StoredActivations(data)
    drawn = batches.training_batches(source, BATCH, 0)
    next(drawn)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        count += len(next(drawn)["activations_BD"])
    rate = count / (time.perf_counter() - started)
    peak = memory("VmHWM") - before
    print(json.dumps({"open_seconds": opened, "rows_per_second": rate, "rows_drawn": count, "peak_gb": peak}))


def main() -> None:
    """Write, and draw in each order in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--d", type=int, default=1024, help="width of the activations")
    parser.add_argument("--shard-rows", type=int, default=16_384)
    parser.add_argument("--seconds", type=float, default=30, help="how long each order is drawn")
    parser.add_argument("--folder", type=Path, help="where the data are written, beside other files")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--draw", choices=("windows", "all rows"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        draw(args.folder, args.seconds, windowed=args.draw == "windows")
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, started = Path(name), time.perf_counter()
        write(folder, args.rows, args.d, args.shard_rows)
        seconds = time.perf_counter() - started
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
        figures = {
            "rows": args.rows,
            "d": args.d,
            "written_gb": size,
            "write_rows_per_second": args.rows / seconds,
        }
        for order in ("windows", "all rows"):
            forget(folder)
            command = [
                sys.executable,
                __file__,
                "--draw",
                order,
                "--folder",
                name,
                "--seconds",
                str(args.seconds),
            ]
            figures[order] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    print(
        f"{args.rows:,} rows of d = {args.d} in bfloat16: {size:.1f} GB, {args.rows / seconds:,.0f} rows/s written\n"
    )
    lines = [
        (order, *(f"{figures[order][name]:,.2f}" for name in ("open_seconds", "rows_per_second", "peak_gb")))
        for order in ("windows", "all rows")
    ]
    print(markdown(("order", "opened in (s)", "rows/s drawn", "peak memory (GB)"), lines))


if __name__ == "__main__":
    main()
