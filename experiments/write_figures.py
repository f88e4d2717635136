"""Write the measured figures into README.md and docs/, from what was measured: a run, and the benchmarks' files.

A page holds blocks between `<!-- measured: NAME DIGEST -->` and `<!-- end -->`, which only this script writes. The
digest is of the block's text, so that a figure that was changed by hand is found (tests/test_figures.py).
"""

import argparse
import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nla_jax.evaluation.report import (
    by_place,
    columns,
    find_table,
    read_evaluation,
    read_metrics,
    save_overview,
)
from nla_jax.evaluation.report_plots import curve
from nla_jax.evaluation.tables import LAST_TOKEN, LAST_TWO, NEAREST

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/cpu_run.md", "docs/explainers.md")
"""The pages that hold measured blocks."""
BLOCK = re.compile(
    r"<!-- measured: (?P<name>[\w-]+) (?P<digest>\w+) -->\n(?P<text>.*?)<!-- end -->", re.DOTALL
)

README_ROWS = {
    "explainer texts": "explainer texts",
    "AV warm start": "AV warm start",
    "AV after RL": "AV after RL",
    "AV, shuffled": "AV after RL, shuffled",
    "empty text": "empty text",
    "fixed text": "fixed text",
    LAST_TOKEN: "mean of the training activations with the same last token",
    LAST_TWO: "mean of those with the same last two tokens",
    NEAREST: "nearest training activation, no text at all",
}
"""Row of the tables `systems` and `controls` -> its name in README.md, where it is left out if no table has it."""
PLACE_ROWS = ("explainer texts", "AV warm start", "AV after RL", LAST_TOKEN, LAST_TWO, NEAREST)
"""Rows of the table `systems_by_place` that README.md shows."""
STAGES = {
    "extract": "extraction",
    "av_sft": "the AV's warm start",
    "ar_sft": "the AR's warm start",
    "rl": "joint training",
}
STEPS = {
    "av_sft": "AV warm start, {} examples",
    "ar_sft": "AR warm start, {} examples",
    "rl": "joint training, a round of {} activations x {} explanations",
}


def digest(text: str) -> str:
    """The digest that a block's marker gives of its text."""
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def with_blocks(page: str, blocks: Mapping[str, str]) -> str:
    """A page with the blocks that are given in place of its own."""

    def block(match: re.Match) -> str:
        text = blocks.get(match["name"], match["text"])
        return f"<!-- measured: {match['name']} {digest(text)} -->\n{text}<!-- end -->"

    return BLOCK.sub(block, page)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that ends in a line break."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def interval(figure: Mapping[str, Any] | None, digits: int) -> str:
    """A value with its 95% interval; empty where it is not defined."""
    if figure is None or figure["value"] is None:
        return ""
    value, low, high = (f"{figure[name]:.{digits}f}" for name in ("value", "low", "high"))
    return value if figure["low"] is None or low == high else f"{value} [{low}, {high}]"


def readme_blocks(evaluation: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The tables of README.md about the CPU recipe's run; that of places only where the run has figures by place."""
    lines: dict[str, dict[str, str]] = {name: {} for name in README_ROWS}
    systems = table_of(evaluation, "systems")["rows"]
    # A row that both tables have is the same in both.
    for row in [*table_of(evaluation, "controls")["rows"], *systems]:
        if row["name"] in lines:
            lines[row["name"]][row["labels"]["AR"]] = interval(row["figures"]["fve_nrm"], 2)
    shown = [
        [README_ROWS[name], found.get("own", found.get("-", "")), found.get("judge", "")]
        for name, found in lines.items()
        if found
    ]
    run, seconds, kept = evaluation["run"], evaluation["timings"], evaluation["kept_steps"]
    measured = systems[0]["figures"]["fve_nrm"]
    judged = zip(*curve(metrics, "rl", "judge_fve_nrm"), strict=True)
    gains = {
        row["labels"]["AR"]: interval(row["figures"]["fve_nrm"], 3)
        for row in table_of(evaluation, "gains")["rows"]
    }
    facts = [
        ["held-out activations of the table", f"{measured['n']}, of {measured['documents']} documents"],
        [
            "step that was kept",
            ", ".join(f"{STAGES[stage]} {step}" for stage, step in kept.items() if stage in STAGES),
        ],
        [
            "the judge on the documents that chose the round",
            ", ".join(f"{value:.3f} ({step})" for step, value in judged),
        ],
        ["joint training gained, through the co-trained AR", gains["own"]],
        ["joint training gained, through the judge", gains["judge"]],
        [
            "seconds",
            ", ".join(f"{name} {seconds[stage]:.0f}" for stage, name in STAGES.items() if stage in seconds),
        ],
        ["machine", run["machine"]],
        ["corpus", corpus(run)],
        ["code", run["code"]],
    ]
    blocks = {
        "round-trip": markdown_table(["held-out `fve_nrm`", "co-trained AR", "frozen judge"], shown),
        "run": markdown_table(["what", "figure"], facts),
    }
    places = by_place(find_table(evaluation, "systems_by_place"))
    return blocks | ({"places": places_block(places)} if places else {})


def places_block(matrix: Mapping[str, Any]) -> str:
    """The table of the round trip through the judge by place, beside lookups."""
    found = {
        line["name"]: line["figures"] for line in matrix["lines"] if line["labels"]["AR"] in ("judge", "-")
    }
    return place_table(
        matrix,
        ["held-out `fve_nrm` through the frozen judge"],
        [([README_ROWS[name]], found[name]) for name in PLACE_ROWS if name in found],
        digits=2,
    )


def place_table(
    matrix: Mapping[str, Any],
    header: Sequence[str],
    lines: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
    digits: int,
) -> str:
    """A Markdown table with a column for each place.

    Args:
      matrix: what `by_place` made of a table.
      header: names of the columns before those of places.
      lines: the cells of these columns, and the figures by place.
      digits: of each figure.
    """
    named = [f"{place.replace('_', ' ')} (n {n})" for place, n in matrix["places"].items()]
    rows = [
        [*cells, *(interval(figures.get(place), digits) for place in matrix["places"])]
        for cells, figures in lines
    ]
    return markdown_table([*header, *named], rows)


def corpus(run: Mapping[str, Any]) -> str:
    """The documents of a run: the corpus, how many were chosen, and their digest."""
    if "corpus digest" not in run:
        return run["corpus"]
    return f"{run['corpus']}: {run['corpus documents']:,} documents, digest {run['corpus digest']}"


def table_of(evaluation: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The table of that name, of whichever suite has it."""
    table = find_table(evaluation, name)
    if not table["rows"]:
        raise ValueError(
            f"the evaluation of the suites {', '.join(evaluation['suites'])} has no table {name!r}; evaluate the run "
            "with the suites reconstruction and controls"
        )
    return table


def step_block(metrics: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    """The table of seconds that a step of each stage took: the median, and the slowest, which compiled most."""
    sizes = {
        "av_sft": [config["av_sft"]["batch_size"]],
        "ar_sft": [config["ar_sft"]["batch_size"]],
        "rl": [config["rl"]["activations"], config["rl"]["group"]],
    }
    lines = []
    for stage, name in STEPS.items():
        seconds = [
            row["speed/seconds"] for row in metrics if row["stage"] == stage and "speed/seconds" in row
        ]
        lines.append([name.format(*sizes[stage]), f"{statistics.median(seconds):.1f}", f"{max(seconds):.0f}"])
    return markdown_table(["step", "seconds, median", "slowest, which compiles"], lines)


def evaluation_page(evaluation: Mapping[str, Any]) -> str:
    """Every table of an evaluation in Markdown."""
    parts = []
    for suite, measured in evaluation["suites"].items():
        parts.append(f"## {suite.capitalize()}\n")
        for table in filter(lambda table: table["rows"], measured["tables"]):
            parts.append(f"### {table['title']}\n\n{table['note']}\n")
            labels, names = columns(table)
            if matrix := by_place(table):
                others = [label for label in labels if label != "place"]
                lines = [
                    ([line["name"], *(line["labels"].get(label, "") for label in others)], line["figures"])
                    for line in matrix["lines"]
                ]
                parts.append(place_table(matrix, [matrix["figure"], *others], lines, digits=3))
                continue
            rows = [
                [
                    row["name"],
                    *(row["labels"].get(label, "") for label in labels),
                    *(interval(row["figures"].get(name), 3) for name in names),
                ]
                for row in table["rows"]
            ]
            parts.append(markdown_table(["", *labels, *names], rows))
    return "\n".join(parts)


def startup_block(measured: Mapping[str, Any]) -> str:
    """The table of start-up times, from the file that `benchmark_startup.py --json` writes."""

    def spread(seconds: Sequence[float]) -> str:
        return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"

    phases = measured["phases"]
    medians = {name: statistics.median(run[name] for run in phases) for name in phases[0]}
    cells = [
        spread(measured["cold"]),
        spread(measured["warm"]),
        *(f"{value:.1f}" for value in medians.values()),
    ]
    about = f"\nSeconds, medians of {len(measured['cold'])} runs (least to most); {measured['machine']}.\n"
    return markdown_table(["cold", "warm", *medians], [cells]) + about


def writers_block(measured: Mapping[str, Any]) -> str:
    """The table of writers of warm-start texts, from the file that `benchmark_writers.py` writes."""
    rows = [
        [
            name,
            interval(row["fve_nrm"], 3),
            ", ".join(f"{value:.3f}" for value in row["seeds"]),
            interval(row["over the first"], 3) if number else "",
            f"{row['words']:.0f}",
            f"{row['report']['written']} of {row['report']['rows']}",
        ]
        for number, (name, row) in enumerate(measured["writers"].items())
    ]
    header = [
        "writer",
        "held-out `fve_nrm`",
        "each seed",
        "more than the first",
        "words a text",
        "rows with a text",
    ]
    held_out = next(iter(measured["writers"].values()))["fve_nrm"]
    about = (
        f"\n{measured['rows']} rows of which every writer has a text, {held_out['n']} of them of "
        f"{held_out['documents']} held-out documents; {measured['steps']} steps of 16 rows; {measured['machine']}.\n"
    )
    return markdown_table(header, rows) + about


def write_pages(blocks: Mapping[str, str], root: Path = ROOT) -> None:
    """Write blocks into the pages that have them.

    Raises:
      ValueError: no page has such a block; nothing is written then.
    """
    pages = {root / name: (root / name).read_text(encoding="utf-8") for name in PAGES}
    known = {match["name"] for text in pages.values() for match in BLOCK.finditer(text)}
    if missing := sorted(set(blocks) - known):
        raise ValueError(f"no page has the blocks {missing}; they have {sorted(known)}")
    for path, text in pages.items():
        path.write_text(with_blocks(text, blocks), encoding="utf-8")


def main() -> None:
    """Parse the command line, read what was measured, write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, help="directory of an evaluated run of configs/smollm2_135m_cpu.py"
    )
    parser.add_argument("--startup", type=Path, help="what `benchmark_startup.py --json` wrote")
    parser.add_argument("--writers", type=Path, help="what `benchmark_writers.py` wrote into figures.json")
    args = parser.parse_args()
    blocks: dict[str, str] = {}
    if args.run:
        evaluation, metrics = read_evaluation(args.run), read_metrics(args.run)
        blocks |= readme_blocks(evaluation, metrics)
        blocks["steps"] = step_block(metrics, json.loads((args.run / "config.json").read_text()))
        blocks["evaluation"] = evaluation_page(evaluation)
        save_overview(args.run, ROOT / "docs")
    if args.startup:
        blocks["startup"] = startup_block(json.loads(args.startup.read_text()))
    if args.writers:
        blocks["writers"] = writers_block(json.loads(args.writers.read_text()))
    if not blocks:
        parser.error("give at least one of --run, --startup and --writers")
    write_pages(blocks)


if __name__ == "__main__":
    main()
