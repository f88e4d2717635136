"""Look at data sets, bring your own, share them, compute shared ones anew, and tell what texts for them will cost.

A sparse dictionary can be trained on the activations of a run as well.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from nla_jax.commands import aligned, path_argument, plain_errors

if TYPE_CHECKING:
    from nla_jax.chat.estimates import Estimate
    from nla_jax.files import AnyPath
    from nla_jax.pipeline.estimate import TextsEstimate

ACTIONS = {
    "inspect": "Show what data sets hold, and write one HTML page about them.",
    "import": "Make data sets of vectors and texts that were made elsewhere.",
    "share": "Write a data set with a data card, with its vectors or without them.",
    "rebuild": "Compute the vectors of data that were shared without them, and check them row by row.",
    "dictionary": "Train a sparse dictionary on a run's training activations, and look at it on held-out ones.",
    "estimate": "Tell what a config's warm-start texts will cost and how long they take; nothing is sent.",
}
"""What the command does, each with its help."""


def main(arguments: list[str]) -> None:
    """Do what the first argument names."""
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        print(_usage())
        return
    if name not in ACTIONS:
        known = f"nla data: there is no action {name!r}\n\n" if name else ""
        print(known + _usage(), file=sys.stderr)
        raise SystemExit(2)
    if name == "estimate":
        _estimate(rest)
        return
    parser, act = _PARSERS[name](_parser(name)), _ACTS[name]
    args = parser.parse_args(rest)
    with plain_errors():
        act(args)


def _usage() -> str:
    parts = [f"usage: nla data ACTION ...\n\n{__doc__ or ''}\n\nactions:"]
    parts += [f"  {name:10} {line}" for name, line in ACTIONS.items()]
    parts += [f"\n{make(_parser(name)).format_help()}" for name, make in _PARSERS.items()]
    return "\n".join([*parts, _ESTIMATE_USAGE])


def _parser(name: str) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"nla data {name}", description=ACTIONS[name], formatter_class=form)


def _inspect_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "dataset", type=path_argument, help="a .parquet file, a folder of them, or the directory of a run"
    )
    parser.add_argument("--html", type=path_argument, help="write a page with plots and rows to read")
    parser.add_argument(
        "--verify", action="store_true", help="read all bytes and compare them with the digests of the data"
    )
    return parser


def _inspect(args: argparse.Namespace) -> None:
    """Print the tables of data sets, and write their page."""
    from nla_jax.data.manifest import verify_dataset
    from nla_jax.data.summary import ROWS_SHOWN, datasets_at, summarize
    from nla_jax.data.summary_tables import summary_tables
    from nla_jax.files import absolute

    found = datasets_at(args.dataset)
    if args.verify:
        for name, path in found.items():
            count = verify_dataset(path)
            print(f"{name}: {count} shards are as they were written")
    summaries = [summarize(name, path, samples=ROWS_SHOWN) for name, path in found.items()]
    writers = _writer_report(args.dataset)
    for table in summary_tables(summaries, writers):
        cells = [tuple(map(_cell, line)) for line in (table.columns, *table.lines)]
        print(f"\n{table.title}\n{aligned(cells)}" + (f"\n{table.note}" if table.note else ""))
    if args.html is not None:
        from nla_jax.evaluation.data_page import write_data_page

        title = f"Data of {absolute(args.dataset).name}"
        write_data_page(args.html, summaries, title=title, writers=writers)
        print(f"\nopen {absolute(args.html)}", file=sys.stderr)


def _writer_report(place: "AnyPath") -> dict[str, Any] | None:
    """What the writer of a run's texts reported; None where there is no such file."""
    path = place / "data" / "texts.json"
    return json.loads(path.read_bytes()) if path.is_file() else None


def _cell(value: str | int | float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _import_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "vectors", type=path_argument, help="a .npz, .npy or .parquet file, or a folder of .parquet"
    )
    parser.add_argument("--model", required=True, help="the model that the vectors were read from")
    parser.add_argument("--layer", required=True, type=int, help="the block after which, counted from 0")
    parser.add_argument("-o", "--out", required=True, type=path_argument, help="folder that is written")
    parser.add_argument("--vectors-column", default="activation_vector", help="default: activation_vector")
    parser.add_argument("--text-column", help="the explanations")
    parser.add_argument("--doc-column", help="the document of each row, by which rows are divided")
    parser.add_argument("--context-column", help="the text up to and including the activation's token")
    parser.add_argument("--position-column", help="the number of tokens of that text")
    parser.add_argument(
        "--texts", type=path_argument, help="a .jsonl, .csv or .txt file with a line for each vector"
    )
    parser.add_argument("--whole", action="store_true", help="write one data set, not divided into splits")
    parser.add_argument("--seed", type=int, default=0, help="of the division by documents")
    return parser


def _import(args: argparse.Namespace) -> None:
    """Check the model, import, and print how to train on the result."""
    from nla_jax.config import CorpusConfig
    from nla_jax.data.imports import ImportColumns, import_dataset
    from nla_jax.files import absolute

    text = args.text_column or ("text" if args.texts is not None else None)
    columns = ImportColumns(
        args.vectors_column, text, args.doc_column, args.context_column, args.position_column
    )
    report = import_dataset(
        args.vectors,
        args.out,
        columns,
        base_model=args.model,
        layer=args.layer,
        width=_width(args.model, args.layer),
        fractions=None if args.whole else CorpusConfig().fractions,
        texts=args.texts,
        seed=args.seed,
    )
    for name, path in report.paths.items():
        print(f"{report.rows[name]} rows in {absolute(path)}")
    if report.without_text:
        print(f"{report.without_text} rows have no text")
    if not args.whole:
        options = [f"--data.{name.replace('_', '-')} {path}" for name, path in report.paths.items()]
        print(f"train on them: nla train CONFIG {' '.join(options)}")


def _width(model: str, layer: int) -> int | None:
    """The width of a model's residual stream; None where the model cannot be reached from here.

    Raises:
      ValueError: the model has no such layer.
    """
    from nla_jax.planning.architectures import read_architecture
    from nla_jax.process import warn

    try:
        config = read_architecture(model)
    except (OSError, ModuleNotFoundError) as error:
        warn(f"layer and width are not compared with the model, which is not here ({error}); training will")
        return None
    config.check_layer(layer)
    return config.d_model


def _share_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "dataset", type=path_argument, help="a .parquet file, a folder of them, or the directory of a run"
    )
    parser.add_argument("-o", "--out", required=True, type=path_argument, help="folder that is written")
    parser.add_argument(
        "--without-vectors",
        action="store_true",
        help="leave the vectors out; others compute them anew with nla data rebuild",
    )
    parser.add_argument(
        "--license", default="other", help="of the data, as the hub spells it: cc-by-4.0 (default: other)"
    )
    return parser


def _share(args: argparse.Namespace) -> None:
    from nla_jax.data.sharing import share
    from nla_jax.files import absolute

    names = share(args.dataset, args.out, with_vectors=not args.without_vectors, license_name=args.license)
    print(f"{', '.join(names)} are in {absolute(args.out)}; read its README.md before you share it")


def _rebuild_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("shared", type=path_argument, help="a folder that was shared without vectors")
    parser.add_argument("-o", "--out", required=True, type=path_argument, help="folder that is written")
    parser.add_argument(
        "--tolerance", type=float, default=0.02, help="of norms and directions (default: 0.02)"
    )
    return parser


def _rebuild(args: argparse.Namespace) -> None:
    """Compute vectors anew, print what became of the rows, and fail if some do not agree.

    Raises:
      SystemExit: with status 1, after all rows that agree were written.
    """
    from nla_jax.files import absolute
    from nla_jax.pipeline.rebuild import rebuild
    from nla_jax.process import use_compilation_cache

    use_compilation_cache()
    report = rebuild(args.shared, args.out, tolerance=args.tolerance)
    for line in report.disagreeing:
        print(line)
    total = report.rows.total()
    print(
        f"{total} of {total + len(report.disagreeing)} rows agree, {report.identical} of them in every bit; they are "
        f"in {absolute(args.out)}"
    )
    if report.disagreeing:
        raise SystemExit(1)


def _dictionary_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("run", type=path_argument, help="the directory of a run that has its data")
    parser.add_argument(
        "-o", "--out", type=path_argument, help="file that is written (default: RUN/dictionary.safetensors)"
    )
    parser.add_argument("--width", type=int, help="features for each coordinate (default: 8)")
    parser.add_argument("-k", type=int, help="features that are active together (default: 32)")
    parser.add_argument("--steps", type=int, help="updates (default: 1000)")
    parser.add_argument("--batch-size", type=int, help="rows of an update (default: 512)")
    parser.add_argument("--learning-rate", type=float, help="of Adam (default: 0.001)")
    return parser


def _dictionary(args: argparse.Namespace) -> None:
    """Train, write and print what became of it."""
    from nla_jax.config import read_config
    from nla_jax.evaluation.dictionary_training import DictionaryConfig
    from nla_jax.files import absolute
    from nla_jax.pipeline.dictionary import FILE_NAME, train_run_dictionary
    from nla_jax.pipeline.run import Run
    from nla_jax.process import use_compilation_cache

    names = ("width", "k", "steps", "batch_size", "learning_rate")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    recipe, run = DictionaryConfig(**given), Run(read_config(args.run / "config.json"), args.run)
    path = args.run / FILE_NAME if args.out is None else args.out
    use_compilation_cache()
    found = train_run_dictionary(run, recipe, path)
    print(
        f"{found.features:,} features from {found.rows:,} training rows in {found.seconds:.0f} s, {found.dead:.1%} of "
        f"them dead\n{found.held_out_rows} held-out rows: {found.active:.1f} active features explain fve_nrm "
        f"{found.fve_nrm:.3f}, and as a code of {found.bits:.0f} bits {found.code_fve_nrm:.3f}\n"
        f"measure it beside the NLA: nla evaluate {args.run} --evaluation.dictionary {absolute(path)}"
    )


_ESTIMATE_USAGE = """usage: nla data estimate CONFIG [--run-dir DIR] [--documents N] [--FIELD VALUE ...]

Tell what a config's warm-start texts will cost and how long they take; nothing is asked for.

CONFIG       as for `nla train`, whose run the texts are for
--run-dir    the run directory, where documents are stored and earlier answers are looked for, default runs/NAME
--documents  how many documents are looked at (default: 500); the others are taken to be like them
--FIELD      any config field, for instance --writer.name chat --writer.chat.chat.model anthropic:MODEL, and
             --writer.chat.chat.prices FILE for prices of your own"""


def _estimate(arguments: list[str]) -> None:
    """Estimate the texts of a config, and print it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_ESTIMATE_USAGE)
        raise SystemExit(0 if arguments else 2)
    with plain_errors():
        from nla_jax.commands.experiment import parse
        from nla_jax.pipeline.estimate import SAMPLED_DOCUMENTS, estimate_texts
        from nla_jax.pipeline.run import Run

        documents, rest = SAMPLED_DOCUMENTS, list(arguments)
        if "--documents" in rest:
            at = rest.index("--documents")
            if not (rest[at + 1 : at + 2] and rest[at + 1].isdigit()):
                raise ValueError("--documents needs a number of documents")
            documents, rest = int(rest[at + 1]), rest[:at] + rest[at + 2 :]
        config, run_dir = parse(rest, "nla data estimate")
        estimated = estimate_texts(Run(config, run_dir), documents)
    print(_in_words(estimated))


def _in_words(estimated: "TextsEstimate") -> str:
    """A line for each figure of an estimate."""
    asked = estimated.asked
    lines = [
        ("documents", f"{estimated.documents:,}, of which {estimated.sampled:,} were looked at"),
        ("rows", f"{estimated.rows:,}"),
        ("writer", estimated.writer),
    ]
    if not estimated.prompts:
        lines.append(("prompts", "none: this writer asks no chat model, and nothing is sent or paid"))
    elif asked is None:
        lines.append(("prompts", f"{estimated.prompts:,}, of about {estimated.prompt_tokens:,} tokens"))
        lines.append(("cost", "not known: the writer is a class of your own"))
    else:
        lines += [
            ("prompts", f"{asked.prompts:,}, of which {asked.cached:,} have their answers already"),
            ("input tokens", f"{asked.input_tokens:,}, counted by {asked.counted_by}"),
            ("output tokens", f"at most {asked.output_tokens_at_most:,}"),
            ("cost", _cost(asked)),
            ("time", _time(asked)),
            ("", "A text that is refused is asked for once more. No answer has been asked for yet."),
        ]
    return aligned(lines)


def _cost(asked: "Estimate") -> str:
    if asked.dollars is None:
        return "not known: give the model's price with --writer.chat.chat.prices FILE"
    usual = (
        "" if asked.usual_dollars is None else f", and ${asked.usual_dollars:,.2f} as earlier answers cost"
    )
    return f"at most ${asked.dollars:,.2f} by the list prices{usual}"


def _time(asked: "Estimate") -> str:
    if asked.seconds is None:
        return "not known before this model has answered some of them; a message batch takes up to a day"
    return f"{asked.seconds / 3600:.1f} hours, as earlier answers took"


_PARSERS = {
    "inspect": _inspect_parser,
    "import": _import_parser,
    "share": _share_parser,
    "rebuild": _rebuild_parser,
    "dictionary": _dictionary_parser,
}
_ACTS = {
    "inspect": _inspect,
    "import": _import,
    "share": _share,
    "rebuild": _rebuild,
    "dictionary": _dictionary,
}
