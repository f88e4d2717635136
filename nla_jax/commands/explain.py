"""Explain a text's activations with a trained NLA, token by token.

nla explain demo "some text"                     with the adapters that come along, for SmolLM2-135M-Instruct
nla explain runs/NAME "some text" --position -3:  a run, or a directory that `nla convert` wrote
nla explain AV --ar AR --target LM "some text"   directories or hub ids
nla explain runs/NAME --file texts.jsonl --out explained.jsonl --html page.html
                                                 one text or conversation a line; goes on where it was stopped
"""

import argparse
import contextlib
import gc
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nla_jax.commands import path_argument, plain_errors

if TYPE_CHECKING:
    from nla_jax.analysis.page import Reading
    from nla_jax.analysis.texts import Selection, TextItem
    from nla_jax.autoencoder.nla import NLA
    from nla_jax.files import AnyPath

ROWS_AT_ONCE = 16
"""Explanations that are written before they are printed."""


def main(arguments: list[str]) -> None:
    """Parse the command line, explain, print."""
    args = _parse(arguments)
    # These take seconds, and the help needs none of them.
    from nla_jax.analysis.texts import Selection, TextItem, looks_like_a_file, read_texts
    from nla_jax.pipeline.load import load
    from nla_jax.process import use_compilation_cache

    # Tracing and loading make many objects that stay: collecting cycles among them takes a tenth of a short process.
    gc.set_threshold(200_000)
    with plain_errors():
        if args.file is not None:
            items = read_texts(args.file)
        elif args.chat:
            items = [TextItem("text", messages=[{"role": "user", "content": args.text}])]
        elif looks_like_a_file(args.text) and not args.literal:
            raise ValueError(
                f"{args.text!r} looks like the name of a file; give --file {args.text} to explain the texts in it, or "
                "--literal to explain these characters"
            )
        else:
            items = [TextItem("text", args.text)]
        use_compilation_cache()
        selection = Selection(tuple(args.position or ()), args.role, args.last_of_turn, args.match)
        done = _Results(args.out)
        settings = (
            selection,
            args.nla,
            args.av,
            args.ar,
            args.samples,
            args.temperature,
            args.seed,
            args.dtype,
        )
        left = [item for item in items if item.digest(*settings) not in done.digests]
        nla = load(
            args.av or args.nla,
            ar=args.ar,
            target=args.target,
            dtype=args.dtype,
            quiet=args.json or args.file is not None,
        )
        readings = []
        with contextlib.closing(done):
            for item in left:
                reading = _explained(nla, item, selection, args)
                if args.file is not None:
                    done.add(item.digest(*settings), item, reading)
                readings.append(reading)
        if args.file is not None and len(left) < len(items):
            print(f"{len(items) - len(left)} of {len(items)} texts were explained before", file=sys.stderr)
        if args.html is not None:
            from nla_jax.analysis.page import write_page
            from nla_jax.files import absolute

            write_page(args.html, readings, title="Explanations", about=nla.description)
            print(f"open {absolute(args.html)}", file=sys.stderr)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nla explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "nla",
        nargs="?",
        help="a run directory, a directory that `nla convert` wrote, an AV, or demo",
    )
    parser.add_argument("text", nargs="?", help="any text")
    parser.add_argument("--av", help="the same as the first argument: directory or hub id of an AV")
    parser.add_argument("--ar", help="directory or hub id of the AR that belongs to an AV")
    parser.add_argument(
        "--target", help="the language model that is explained; runs and adapters name their own"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="what weights are kept in"
    )
    parser.add_argument(
        "--file", type=path_argument, help="explain the texts and conversations in a file instead"
    )
    parser.add_argument(
        "--out", type=path_argument, help="write results here, a JSON line a text; with --file"
    )
    parser.add_argument("--chat", action="store_true", help="read the text as a user's message in a chat")
    parser.add_argument("--literal", action="store_true", help="explain a text that looks like a file name")
    parser.add_argument(
        "--position",
        action="append",
        help="a token's index or a range of them, as 5, -1, 0:5 or -3: (repeatable)",
    )
    parser.add_argument("--role", help="only tokens of this role's messages, such as assistant")
    parser.add_argument("--last-of-turn", action="store_true", help="only the last token of every message")
    parser.add_argument("--match", help="only tokens in a match of this regular expression")
    parser.add_argument("--samples", type=int, default=1, help="explanations of each token")
    parser.add_argument("--temperature", type=float, help="default: 0, or 1 with several samples")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--judges", action="store_true", help="score through the run's judge as well")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of text")
    parser.add_argument(
        "--html", type=path_argument, help="write one self-contained page with the texts as tokens"
    )
    args = parser.parse_intermixed_args(list(_joined(arguments)))
    if args.av and args.nla and args.text is None and args.file is None:
        args.nla, args.text = None, args.nla  # --av took the place of the first argument.
    if not (args.av or args.nla):
        parser.error("name an NLA: a run, a directory that `nla convert` wrote, an AV, or demo")
    if (args.text is None) == (args.file is None):
        parser.error("give either a text or --file")
    if args.out is not None and args.file is None:
        parser.error("--out is for the texts of --file; redirect the output of a single text")
    return args


def _joined(arguments: list[str]) -> Iterator[str]:
    """The arguments, with a --position that begins with a minus sign joined to its option."""
    rest = iter(arguments)
    for argument in rest:
        yield f"{argument}={next(rest, '')}" if argument == "--position" else argument


def _explained(nla: "NLA", item: "TextItem", selection: "Selection", args: argparse.Namespace) -> "Reading":
    """Explain one text, printing each batch of explanations as soon as it is there."""
    from nla_jax.analysis.page import Reading

    whole = nla.activations(item.text, messages=item.messages)
    chosen = selection.of(whole)
    at_once = max(ROWS_AT_ONCE // max(args.samples, 1), 1)
    rows, against = [], ""
    for start in range(0, len(chosen), at_once):
        part = chosen[start : start + at_once]
        texts = nla.explain(part, samples=args.samples, temperature=args.temperature, seed=args.seed)
        scores = None
        if nla.ar_params is not None:
            scores = nla.score(part, texts, judges=args.judges)
            against = scores.measured_against
        fresh = texts.rows(scores)
        rows += fresh
        if not args.json and args.file is None:
            print("\n".join(map(_line, fresh)), flush=True)
    if args.json:
        print(json.dumps([row.record() for row in rows], indent=1, ensure_ascii=False))
    elif args.file is None:
        _notes(nla, rows, against)
    return Reading(whole.source, rows, nla.min_position, against, item.id)


def _line(row: Any) -> str:
    """Two lines of text: the token with its scores, and the explanation under it."""
    scores = "" if row.cosine is None else f"  cosine {row.cosine:.3f}"
    scores += "" if row.fve_nrm is None else f"  fve {row.fve_nrm:+.3f}"
    scores += "".join(f"  {name} {judge['cosine']:.3f}" for name, judge in row.judges.items())
    return f"{row.position:4d} {row.token!r}{scores}\n     {row.text or '(no closed explanation)'}"


def _notes(nla: "NLA", rows: list, against: str) -> None:
    """Tell what the figures are measured against, and which tokens see less context than the NLA was trained on."""
    if against:
        print(f"fve is measured {against}" if nla.yardstick else against, file=sys.stderr)
    early = sum(row.position < (nla.min_position or 0) for row in rows)
    if early:
        print(
            f"{early} of {len(rows)} explanations are of tokens before position {nla.min_position}, where this NLA was "
            "not trained: they see little context, and say little that is true",
            file=sys.stderr,
        )


class _Results:
    """The JSON lines of texts that were explained; what a killed process left half written is dropped."""

    def __init__(self, path: "AnyPath | None"):
        from nla_jax.files import GrowingFile

        self.file, self.digests = None if path is None else GrowingFile(path), set()
        if self.file is None:
            return
        text = self.file.read()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.file.write(whole)
        self.digests = {json.loads(line)["digest"] for line in whole.split("\n")[:-1]}

    def close(self) -> None:
        """Write what is still in memory."""
        if self.file is not None:
            self.file.flush()

    def add(self, digest: str, item: "TextItem", reading: "Reading") -> None:
        """Write the line of one text."""
        record = {
            "id": item.id,
            "digest": digest,
            "tokens": len(reading.source),
            "measured_against": reading.measured_against,
            "explained": [row.record() for row in reading.rows],
        }
        line = json.dumps(record, ensure_ascii=False)
        if self.file is None:
            print(line, flush=True)
        else:
            self.file.append(line)
