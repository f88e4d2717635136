"""Compare evaluated runs: every figure that they share, with paired intervals on the rows that they share."""

import argparse
import dataclasses

from nla_jax.commands import path_argument, plain_errors


def main(arguments: list[str]) -> None:
    """Parse the command line, compare every run with the first, print."""
    parser = argparse.ArgumentParser(prog="nla compare", description=__doc__)
    parser.add_argument("runs", type=path_argument, nargs="+", help="directories of evaluated runs")
    parser.add_argument("--table", action="append", help="only this table (repeatable), such as systems")
    parser.add_argument("--json", type=path_argument, help="write the figures to this file as well")
    args = parser.parse_args(arguments)
    if len(args.runs) < 2:
        parser.error("give at least two runs")
    # Takes seconds, and the help needs none of it.
    from nla_jax.evaluation.compare import compare, rendered
    from nla_jax.files import write_json

    first, *others = args.runs
    records = []
    with plain_errors():
        for other in others:
            found = [d for d in compare(first, other) if args.table is None or d.table in args.table]
            print(rendered(found, (first.name, other.name)), end="\n\n")
            records += [{"first": str(first), "other": str(other), **dataclasses.asdict(d)} for d in found]
        if args.json:
            write_json(args.json, records)
