"""Measure an NLA on held-out documents, and write evaluation.json and report.html.

  evaluate.py RUN --suite all           a run's NLA, before and after joint training
  evaluate.py --av AV --ar AR --target LM --data DATA --out DIR [--judge AR] [--suite NAME ...]
              [--chat-model PROVIDER:MODEL]
                                        models that come without a run, such as released checkpoints

Suites: reconstruction controls prediction faithfulness degeneracy cost, all of them (all), and sanity.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from nla_jax.cli import main, use_huge_pages


def without_run() -> None:
    """Evaluate an AV and an AR from directories of their own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--av", required=True, help="directory or hub id of an AV with a nla_meta.yaml")
    parser.add_argument("--ar", required=True, help="the AR that belongs to it")
    parser.add_argument("--target", required=True, help="the language model that they explain")
    parser.add_argument(
        "--data", required=True, type=Path, help="held-out activations: a parquet file or a folder"
    )
    parser.add_argument("--out", required=True, type=Path, help="directory for what is written")
    parser.add_argument("--judge", help="an AR that never saw the AV's texts")
    parser.add_argument("--chat-model", default="", help="answers and checks as well: anthropic:MODEL, ...")
    parser.add_argument("--suite", nargs="+", default=["all"], help="suites, or all")
    args = parser.parse_args()
    # Takes seconds, so not before the process that stays.
    from nla_jax.data.dataset import load_dataset
    from nla_jax.evaluation.config import EvaluationConfig
    from nla_jax.pipeline.evaluate import evaluate_checkpoint
    from nla_jax.pipeline.export import CheckpointRun
    from nla_jax.pipeline.subject import reconstructor_of
    from nla_jax.process import use_compilation_cache

    try:
        use_compilation_cache()
        evaluation = EvaluationConfig(suites=tuple(args.suite), chat_model=args.chat_model)
        run = CheckpointRun(args.av, args.ar, args.target)
        run.config = dataclasses.replace(run.config, evaluation=evaluation)
        judge = reconstructor_of(CheckpointRun(args.av, args.judge, args.target)) if args.judge else None
        evaluate_checkpoint(run, load_dataset(args.data), args.out, judge=judge)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"open {(args.out / 'report.html').resolve()}")


if __name__ == "__main__":
    if "--av" in sys.argv:
        use_huge_pages()
        without_run()
    else:
        sys.argv = ["--evaluation.suites" if argument == "--suite" else argument for argument in sys.argv]
        main(__doc__, "evaluate", "report")
