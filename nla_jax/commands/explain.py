"""Explain the activations of a text with a trained NLA, token by token."""

import argparse
import json
from pathlib import Path

from nla_jax.commands import plain_errors


def main(arguments: list[str]) -> None:
    """Parse the command line, explain, print."""
    parser = argparse.ArgumentParser(prog="nla explain", description=__doc__)
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        help="run directory, for instance runs/smollm2_135m_cpu, or one that `nla convert` wrote",
    )
    parser.add_argument("--av", help="instead of a run: directory or hub id of an AV with a nla_meta.yaml")
    parser.add_argument("--ar", help="the AR that belongs to it")
    parser.add_argument(
        "--target", help="the language model that they explain; adapters name the one they were made for"
    )
    parser.add_argument("text", help="any text")
    parser.add_argument(
        "--position", type=int, action="append", help="token index (repeatable; -1 is the last)"
    )
    parser.add_argument("--samples", type=int, default=1, help="explanations a position")
    parser.add_argument("--temperature", type=float, help="default: 0, or 1 with several samples")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_intermixed_args(arguments)
    # These take seconds, and the help needs none of them.
    from nla_jax.analysis.explain import Explainer, as_records
    from nla_jax.config import read_config
    from nla_jax.interop.meta import FILE_NAME
    from nla_jax.pipeline.export import CheckpointRun
    from nla_jax.pipeline.run import Run
    from nla_jax.process import use_compilation_cache

    if (args.run is None) != bool(args.av and args.ar) or (args.run and (args.av or args.ar)):
        parser.error("give either a directory or both of --av and --ar")
    if args.run and (args.run / "av" / FILE_NAME).is_file():
        args.av, args.ar = args.run / "av", args.run / "ar"
    elif args.run and args.target:
        parser.error(f"{args.run} is a run, which knows its own target; leave --target out")
    temperature = float(args.samples > 1) if args.temperature is None else args.temperature
    with plain_errors():
        use_compilation_cache()
        if args.av:
            run = CheckpointRun(args.av, args.ar, args.target)
        else:
            run = Run(read_config(args.run / "config.json"), args.run)
        explainer = Explainer(run)
        found = explainer.explain(args.text, args.position, samples=args.samples, temperature=temperature)
    if args.json:
        print(json.dumps(as_records(found), indent=1, ensure_ascii=False))
        return
    for item in found:
        print(f"{item.position:4d} {item.token!r}  cosine {item.cosine:.3f}  fve {item.fve_nrm:+.3f}")
        print(f"     {item.explanation or '(no closed explanation)'}")
