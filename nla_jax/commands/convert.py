"""Export AV and AR of a run in the reference project's layout, or show how the tensors of a model are named.

A run becomes DIRECTORY/av and DIRECTORY/ar; adapters are merged into the weights, or with --adapters written alone, in
PEFT's format. Models in that layout need no conversion: `nla explain` reads them as they are.
"""

import argparse
import json
from typing import TYPE_CHECKING

from nla_jax.commands import path_argument, plain_errors

if TYPE_CHECKING:
    from nla_jax.files import AnyPath


def main(arguments: list[str]) -> None:
    """Parse the command line, export, print."""
    parser = argparse.ArgumentParser(
        prog="nla convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=path_argument, help="run directory; with --dry-run also a model directory"
    )
    parser.add_argument(
        "directory", type=path_argument, nargs="?", help="where to write; not needed with --dry-run"
    )
    parser.add_argument("--warm-start", action="store_true", help="export the models before joint training")
    parser.add_argument("--step", type=int, help="round of joint training; default: the best by the judge")
    parser.add_argument(
        "--adapters", action="store_true", help="write the adapters alone (runs with lora.rank)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the names of the tensors, write nothing"
    )
    args = parser.parse_args(arguments)
    if args.directory is None and not args.dry_run:
        parser.error("give a directory to write to, or --dry-run")
    # These take seconds, and the help needs none of them.
    from nla_jax.config import read_config
    from nla_jax.files import absolute
    from nla_jax.pipeline.export import export_run
    from nla_jax.pipeline.run import Run
    from nla_jax.process import use_compilation_cache

    with plain_errors():
        use_compilation_cache()
        if args.dry_run:
            show(args.source)
            return
        run = Run(read_config(args.source / "config.json"), args.source)
        stage = "warm_start" if args.warm_start else "rl"
        form = {"adapters": args.adapters, "dtype": args.dtype}
        notes = export_run(run, args.directory, stage=stage, step=args.step, **form)
    print(f"AV and AR are in {absolute(args.directory)}")
    for note in notes:
        print(f"the reference's client cannot use the AV as it is: {note}")


def show(source: "AnyPath") -> None:
    """Print the tensors of a run's two models, or of one model directory."""
    from nla_jax.config import read_config
    from nla_jax.interop.meta import FILE_NAME, NLAMeta
    from nla_jax.interop.tensor_names import tensor_names
    from nla_jax.lm.files.configs import config_from_hf
    from nla_jax.pipeline.run import Run

    if (source / FILE_NAME).is_file():
        meta = NLAMeta.load(source)
        config = config_from_hf(json.loads((source / "config.json").read_bytes()))
        models = {meta.role: config if meta.role == "av" else config.truncated(meta.layer)}
    else:
        run = Run(read_config(source / "config.json"), source)
        models = {
            "av": run.models.base_config,
            "ar": run.models.base_config.truncated(run.config.model.layer),
        }
    for role, config in models.items():
        print(f"{role.upper()}: {config.family}, {config.num_layers} blocks")
        for name in tensor_names(config, role):
            print(f"  {name}")
