"""Measure an NLA on held-out documents, and write evaluation.json and report.html.

  nla evaluate RUN --suite all          a run's NLA, before and after joint training
  nla evaluate --av AV --ar AR --target LM --data DATA --out DIR [--judge AR] [--suite NAME ...]
               [--rows N] [--chat-model PROVIDER:MODEL]
                                        models that come without a run, such as released checkpoints

Suites: reconstruction controls prediction faithfulness degeneracy cost sanity, or all of them (all). The last is about
the evaluation itself: whether it finds planted cheaters out.
"""

import argparse
from collections.abc import Iterator

from nla_jax.commands import experiment, path_argument, plain_errors


def main(arguments: list[str]) -> None:
    """Evaluate a run, or models that come without one if --av is among the arguments."""
    if any(argument.split("=")[0] == "--av" for argument in arguments):
        without_run(arguments)
    else:
        stages = ("evaluate", "report")
        experiment.run(
            list(_overrides(arguments)), stages=stages, program="nla evaluate", description=__doc__
        )


def _overrides(arguments: list[str]) -> Iterator[str]:
    """The arguments, with --suite spelled as the config field that it stands for."""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option == "--suite":
            yield "--evaluation.suites"
            yield from [value] if equals else []
        else:
            yield argument


def without_run(arguments: list[str]) -> None:
    """Evaluate an AV and an AR from directories of their own."""
    parser = argparse.ArgumentParser(
        prog="nla evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--av", required=True, help="directory or hub id of an AV with a nla_meta.yaml")
    parser.add_argument("--ar", required=True, help="the AR that belongs to it")
    parser.add_argument("--target", required=True, help="the language model that they explain")
    parser.add_argument(
        "--data", required=True, type=path_argument, help="held-out activations: a parquet file or a folder"
    )
    parser.add_argument("--out", required=True, type=path_argument, help="directory for what is written")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="what weights are kept in"
    )
    parser.add_argument("--judge", help="an AR that never saw the AV's texts")
    parser.add_argument("--chat-model", default="", help="answers and checks as well: anthropic:MODEL, ...")
    parser.add_argument("--suite", nargs="+", default=["all"], help="suites, or all")
    parser.add_argument(
        "--rows", type=int, help="activations that are measured, of all documents (default: 256)"
    )
    args = parser.parse_args(arguments)
    # These take seconds, and the help needs none of them.
    from nla_jax.data.dataset import load_dataset
    from nla_jax.evaluation.config import EvaluationConfig
    from nla_jax.files import absolute
    from nla_jax.pipeline.evaluate import evaluate_nla
    from nla_jax.pipeline.load import load
    from nla_jax.process import use_compilation_cache

    with plain_errors():
        use_compilation_cache()
        sizes = {} if args.rows is None else {"rows": args.rows}
        evaluation = EvaluationConfig(suites=tuple(args.suite), chat_model=args.chat_model, **sizes)
        nla = load(args.av, ar=args.ar, target=args.target, judge=args.judge, dtype=args.dtype)
        evaluate_nla(nla, load_dataset(args.data), args.out, evaluation)
    print(f"open {absolute(args.out) / 'report.html'}")
