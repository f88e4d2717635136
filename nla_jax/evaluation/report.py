"""One run as one HTML file: curves, tables, and explanations to read.

The file needs nothing but itself: plots are inline SVG, styles are in the page, its content policy forbids
scripts and requests. Whatever a model wrote is escaped. Same run directory, same file, byte for byte.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from nla_jax.evaluation.history import read_history
from nla_jax.evaluation.landscape import with_landscape
from nla_jax.evaluation.measure import SUITES
from nla_jax.evaluation.report_plots import (
    GROUPS,
    PANELS,
    STYLE,
    draw_panel,
    draw_places,
    draw_table,
    has_data,
    number,
    svg,
)
from nla_jax.evaluation.tables import LAST_TOKEN
from nla_jax.files import AnyPath, write_atomically, write_text

EXAMPLES_SHOWN = 20
ALL_ROWS = "all"
"""The column of lines without a place in a table by place."""


def write_report(run_dir: AnyPath) -> AnyPath:
    """Write `report.html` into a run directory, from what training and the evaluation left there.

    They leave `metrics.jsonl`, `evaluation.json`, `history.jsonl` and `examples.jsonl`. The last two may be missing; so
    may any key of a metrics row, and a last line cut short by a killed run.

    Raises:
      FileNotFoundError: no metrics or no evaluation; the message names the stage that writes it.
      ValueError: a file that does not parse, or an evaluation without systems.
    """
    evaluation, rows = read_evaluation(run_dir), read_metrics(run_dir)
    kept = evaluation.get("kept_steps", {})
    examples_path = run_dir / "examples.jsonl"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, duration=_duration, plain=_plain)
    page = environment.get_template("report.html").render(
        **{"run": {}, "settings": {}, "timings": {}, "mean_is": None, **evaluation},
        headline=[row for row in systems(evaluation) if row["group"] == "nla"],
        groups=GROUPS,
        columns=columns,
        by_place=by_place,
        title=SUITES.get,
        plots={
            table["name"]: svg(table["name"], (9.0, 3.4), draw_places, _judged(table["rows"], table))
            if by_place(table)
            else svg(table["name"], (9.0, 1.0 + 0.3 * len(table["rows"])), draw_table, table)
            for suite in evaluation["suites"].values()
            for table in suite["tables"]
            if table["plotted"] and table["rows"]
        },
        curves=[
            (panel, svg(panel.title, (5.2, 2.9), draw_panel, panel, rows, kept.get(panel.stage)))
            for panel in PANELS
            if has_data(panel, rows)
        ],
        history=read_history(run_dir),
        examples=_read_lines(examples_path)[:EXAMPLES_SHOWN] if examples_path.exists() else [],
    )
    path = run_dir / "report.html"
    write_text(path, page)
    return path


def save_overview(run_dir: AnyPath, directory: AnyPath) -> AnyPath:
    """Write `overview.png` into `directory`: the main curves of a run beside its systems and controls.

    Raises:
      FileNotFoundError, ValueError: as `write_report`.
    """
    evaluation, rows = read_evaluation(run_dir), read_metrics(run_dir)
    panels, places = [panel for panel in PANELS if panel.in_overview], _by_place_of_judge(evaluation)
    with matplotlib.rc_context(STYLE):
        figure = whole = Figure(figsize=(14, 11.5 if places["rows"] else 7.5), layout="constrained")
        if places["rows"]:
            top, whole = figure.subfigures(2, 1, height_ratios=(4, 7.5))
            draw_places(top.subplots(), places)
        left, right = whole.subfigures(1, 2, width_ratios=(1.3, 1))
        for ax, panel in zip(left.subplots(3, 2).flat, panels, strict=True):
            if has_data(panel, rows):
                draw_panel(ax, panel, rows, evaluation.get("kept_steps", {}).get(panel.stage))
            else:
                ax.set_axis_off()
        draw_table(right.subplots(), _round_trip_of_judge(evaluation))
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "overview.png"
        with write_atomically(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    return path


def read_metrics(run_dir: AnyPath) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`: one row a line with `stage`, `step` and any numbers.

    Raises:
      FileNotFoundError: there is none; run a training stage.
      ValueError: a line other than the last does not parse.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: the report plots what training logs there; train into this directory first "
            "(`nla train CONFIG`, or one of the stages av_sft, ar_sft and rl)"
        )
    return _read_lines(path)


def read_evaluation(run_dir: AnyPath) -> dict[str, Any]:
    """Read `evaluation.json`: run, settings, `mean_is`, suites, and optionally timings and the steps kept.

    The landscape, which is assembled of these, stands behind the tables of the suite controls.

    Raises:
      FileNotFoundError: there is none; run the evaluation.
      ValueError: not JSON, or no suites in it.
    """
    path = run_dir / "evaluation.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: the report's tables come from it; measure this run first "
            f"(`nla evaluate {run_dir}`)"
        )
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); delete it and measure again (`nla evaluate {run_dir}`)"
        ) from error
    if not evaluation.get("suites"):
        raise ValueError(
            f"{path} holds no suites (keys: {', '.join(evaluation)}); delete it and measure again "
            f"(`nla evaluate {run_dir}`)"
        )
    return with_landscape(evaluation)


def find_table(evaluation: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The first of the named tables that an evaluation holds, or a table without lines."""
    tables = {table["name"]: table for suite in evaluation["suites"].values() for table in suite["tables"]}
    empty = {"name": names[0], "title": names[0], "note": "", "plotted": None, "rows": []}
    return next((tables[name] for name in names if name in tables), empty)


def _judged(rows: Sequence[Mapping[str, Any]], table: Mapping[str, Any]) -> dict[str, Any]:
    """A table with those of some lines that were measured by the judge that counts, or without an AR."""
    ars = [row["labels"]["AR"] for row in rows]
    judge = "judge" if "judge" in ars else next((ar for ar in ars if ar != "-"), "-")
    kept = [row for row in rows if row["labels"]["AR"] in (judge, "-")]
    return {**table, "title": f"{table['title']} (AR: {judge})", "rows": kept}


def _round_trip_of_judge(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The round trip and its controls in one table, through the judge alone."""
    lines = [row for name in ("systems", "controls") for row in find_table(evaluation, name)["rows"]]
    judged = _judged(lines, {"title": "Held out", "plotted": "fve_nrm"})
    # A line that both tables have is the same in both.
    rows = {row["name"]: row for row in judged["rows"]}
    return {**judged, "rows": list(rows.values()), "reference": LAST_TOKEN}


def _by_place_of_judge(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The round trip by place, through the judge alone."""
    table = find_table(evaluation, "systems_by_place")
    return _judged(table["rows"], {**table, "title": "Held out, around the mean of each place"})


def systems(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the round trip's table."""
    return find_table(evaluation, "systems")["rows"]


def columns(table: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The names of all labels and of all figures in a table's lines, in order of appearance."""
    return tuple(
        list(dict.fromkeys(key for row in table["rows"] for key in row[part]))
        for part in ("labels", "figures")
    )


def by_place(table: Mapping[str, Any]) -> dict[str, Any] | None:
    """A table whose lines are of places and have one figure, as a matrix: a line for all places of a system.

    None for other tables. `places` has the column's names and numbers of rows; a line's `figures` are by place, where
    `ALL_ROWS` is that of a line without a place.
    """
    rows = table["rows"]
    if not any("place" in row["labels"] for row in rows) or {len(row["figures"]) for row in rows} != {1}:
        return None
    lines: dict[tuple, dict[str, Any]] = {}
    places: dict[str, int] = {}
    for row in rows:
        labels = {name: value for name, value in row["labels"].items() if name != "place"}
        place, ((figure, estimate),) = row["labels"].get("place", ALL_ROWS), row["figures"].items()
        line = {"name": row["name"], "group": row["group"], "labels": labels, "figures": {}}
        lines.setdefault((row["name"], *labels.items()), line)["figures"][place] = estimate
        places[place] = max(places.get(place, 0), estimate["n"] if estimate else 0)
    return {"figure": figure, "places": places, "lines": list(lines.values())}


def _read_lines(path: AnyPath) -> list[dict[str, Any]]:
    # Not splitlines(): it also splits at separators such as U+2028 that JSON strings may contain.
    lines = path.read_bytes().decode("utf-8", "replace").rstrip("\n").split("\n")
    rows = []
    for line_number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            # A killed run leaves its last line half written.
            if line_number < len(lines):
                raise ValueError(
                    f"{path}, line {line_number} is not a JSON object ({error}); repair or delete that line"
                ) from error
    return rows


def _duration(seconds: float | int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
