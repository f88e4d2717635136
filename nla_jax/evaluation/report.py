"""One run as one HTML file: curves, tables, and explanations to read.

The file needs nothing but itself: plots are inline SVG, styles are in the page, its content policy forbids
scripts and requests. Whatever a model wrote is escaped. Same run directory, same file, byte for byte.
"""

import dataclasses
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nla_jax.evaluation.measure import SUITES
from nla_jax.files import AnyPath, write_atomically, write_text

Row = Mapping[str, Any]

EXAMPLES_SHOWN = 20
COLORS = ("#2a6db0", "#d9782d", "#3a8f6b")
GROUPS = {
    "nla": ("NLA", COLORS[0]),
    "gold": ("sees the context", "#d3a02c"),
    "baseline": ("baseline", COLORS[2]),
    "control": ("control", "#a3abb6"),
}
"""Group of a table's line -> its name in the legend and its color."""
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9aa3ae",
    "axes.grid": True,
    "axes.labelcolor": "#4b5563",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 9,
    "grid.color": "#e6e9ee",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": "#1f2933",
    # Names come from data: a dollar sign in one is a dollar sign.
    "text.parse_math": False,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot over the steps of a stage; the report leaves it out if the run has no such numbers."""

    stage: str
    title: str
    lines: Mapping[str, str]
    """Key in `metrics.jsonl` -> its name in the legend; a panel with one line has no legend."""
    note: str
    """A sentence that says what to look for."""
    spread: str | None = None
    """Key of the standard deviation that is drawn around the first line."""
    in_overview: bool = False


PANELS = (
    Panel("ar_sft", "AR warm start: direction MSE", {"loss": "training"}, "0 is exact, 2 is orthogonal."),
    Panel(
        "ar_sft",
        "AR warm start: held-out FVE",
        {"held_out_fve_nrm": "held out"},
        "What the AR rebuilds from the warm-start texts: the level that explanations can reach before RL.",
        in_overview=True,
    ),
    Panel(
        "av_sft",
        "AV warm start: loss (nats per token)",
        {"loss": "training", "real_loss": "held out, own activation", "shuffled_loss": "held out, shuffled"},
        "An AV that reads its activation loses when it is given another text's.",
        in_overview=True,
    ),
    Panel(
        "av_sft",
        "AV warm start: shuffled minus real loss",
        {"gap": "gap"},
        "How much the activation helps. At 0 the AV ignores it, however low its loss.",
    ),
    Panel(
        "rl",
        "RL: FVE of the round trip",
        {"judge_fve_nrm": "judge", "own_fve_nrm": "own", "shuffled_fve_nrm": "judge, shuffled"},
        "Own above judge, and growing apart: the pair agrees on habits that only its own AR understands.",
        in_overview=True,
    ),
    Panel(
        "rl",
        "RL: reward",
        {"reward_mean": "mean"},
        "The band is the standard deviation among the explanations of one activation, averaged over activations.",
        spread="reward_std",
        in_overview=True,
    ),
    Panel(
        "rl",
        "RL: KL to the warm start (nats a token)",
        {"kl": "KL"},
        "How far the policy has moved. A jump often comes before garbled text.",
        in_overview=True,
    ),
    Panel(
        "rl",
        "RL: explanation length (tokens)",
        {"length_mean": "mean"},
        "With the tokens that close an explanation. Growth towards the cap is padding unless FVE grows with it.",
        in_overview=True,
    ),
    Panel(
        "rl",
        "RL: failed and clipped fractions",
        {"failed_fraction": "failed explanations", "clip_fraction": "clipped ratios"},
        "Failed: no closing tag, or empty. Clipped: tokens whose probability ratio lies outside the clipping band, "
        "whatever the sign of their advantage. A round makes one update, with the weights that sampled, so rounding "
        "alone can bring it above 0.",
    ),
    Panel(
        "rl",
        "RL: copying and repetition",
        {"copied": "3-grams from the context", "repeated": "2-grams said twice"},
        "Shares of the texts' runs of words. Copying that grows is reciting; repetition that grows is decay.",
    ),
    Panel("rl", "RL: AR loss", {"ar_loss": "direction MSE"}, "The AR learning from the AV's own texts."),
    Panel(
        "rl",
        "RL: AV loss",
        {"av_loss": "policy loss"},
        "The advantages of a group sum to zero, so this stays near zero however much is learned.",
    ),
    Panel("rl", "RL: entropy (nats per token)", {"entropy": "entropy"}, "Falling to zero means collapse."),
    Panel(
        "rl",
        "RL: sampler against trainer",
        {"sampler_trainer_logprob_diff": "log-prob difference"},
        "Two ways to compute one number: anything but rounding here is a bug.",
    ),
)


def write_report(run_dir: AnyPath) -> AnyPath:
    """Write `report.html` into a run directory, from `metrics.jsonl`, `evaluation.json` and `examples.jsonl`.

    Examples may be missing; so may any key of a metrics row, and a last line cut short by a killed run.

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
    environment.filters.update(number=_number, duration=_duration, plain=_plain)
    page = environment.get_template("report.html").render(
        **{"run": {}, "settings": {}, "timings": {}, "mean_is": None, **evaluation},
        headline=[row for row in systems(evaluation) if row["group"] == "nla"],
        groups=GROUPS,
        columns=columns,
        title=SUITES.get,
        plots={
            table["name"]: _svg(table["name"], (9.0, 1.0 + 0.3 * len(table["rows"])), draw_table, table)
            for suite in evaluation["suites"].values()
            for table in suite["tables"]
            if table["plotted"] and table["rows"]
        },
        curves=[
            (panel, _svg(panel.title, (5.2, 2.9), draw_panel, panel, rows, kept.get(panel.stage)))
            for panel in PANELS
            if has_data(panel, rows)
        ],
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
    panels = [panel for panel in PANELS if panel.in_overview]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 7.5), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1.3, 1))
        for ax, panel in zip(left.subplots(3, 2).flat, panels, strict=True):
            if has_data(panel, rows):
                draw_panel(ax, panel, rows, evaluation.get("kept_steps", {}).get(panel.stage))
            else:
                ax.set_axis_off()
        draw_table(right.subplots(), _judged(evaluation))
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
    return evaluation


def find_table(evaluation: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The first of the named tables that an evaluation holds, or a table without lines."""
    tables = {table["name"]: table for suite in evaluation["suites"].values() for table in suite["tables"]}
    empty = {"name": names[0], "title": names[0], "note": "", "plotted": None, "rows": []}
    return next((tables[name] for name in names if name in tables), empty)


def _judged(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The round trip and its controls in one table, through the judge alone."""
    lines = [row for name in ("systems", "controls") for row in find_table(evaluation, name)["rows"]]
    judged = {row["name"]: row for row in lines if row["labels"]["AR"] in ("judge", "-")}
    title = "Held out, through the judge"
    return {"name": "judged", "title": title, "note": "", "plotted": "fve_nrm", "rows": list(judged.values())}


def systems(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the round trip's table."""
    return find_table(evaluation, "systems")["rows"]


def columns(table: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The names of all labels and of all figures in a table's lines, in order of appearance."""
    return tuple(
        list(dict.fromkeys(key for row in table["rows"] for key in row[part]))
        for part in ("labels", "figures")
    )


def curve(rows: Sequence[Row], stage: str, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number; where a resumed run logged a step twice, the later row counts."""
    values = {row["step"]: row[key] for row in rows if row.get("stage") == stage and row.get(key) is not None}
    return sorted(values), [values[step] for step in sorted(values)]


def has_data(panel: Panel, rows: Sequence[Row]) -> bool:
    """Whether any line of the panel has a point."""
    return any(curve(rows, panel.stage, key)[0] for key in panel.lines)


def draw_panel(ax: Axes, panel: Panel, rows: Sequence[Row], kept: int | None = None) -> None:
    """Draw the lines of a panel, and mark the step that was kept of its stage."""
    drawn = [(name, *curve(rows, panel.stage, key)) for key, name in panel.lines.items()]
    for color, (name, steps, values) in zip(COLORS, drawn, strict=False):
        if steps:
            marker = "o" if len(steps) <= 40 else ""
            label = name if len(drawn) > 1 else None
            ax.plot(steps, values, color=color, label=label, marker=marker, markersize=3)
    if panel.spread:
        _, steps, means = drawn[0]
        spreads = dict(zip(*curve(rows, panel.stage, panel.spread), strict=True))
        spread = np.array([spreads.get(step, np.nan) for step in steps])
        ax.fill_between(steps, means - spread, means + spread, color=COLORS[0], alpha=0.15, linewidth=0)
    if kept is not None:
        ax.axvline(kept, color="#6b7280", linestyle=":", linewidth=1.2, label=f"kept: step {kept}")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8)
    ax.set(title=panel.title, xlabel="step")
    ax.margins(x=0.02)


def draw_table(ax: Axes, table: Mapping[str, Any]) -> None:
    """Draw the plotted figure of each line as a bar with its 95% interval, top to bottom in the order given."""
    plotted = table["plotted"]
    shown = [row for row in table["rows"] if row["figures"].get(plotted)]
    for position, row in enumerate(shown):
        figure = row["figures"][plotted]
        ax.barh(position, figure["value"], height=0.62, color=GROUPS[row["group"]][1])
        ax.plot([figure["low"], figure["high"]], [position, position], color="#1f2933", linewidth=1.2)
        ax.annotate(
            _number(figure["value"], 2),
            (max(figure["high"], 0), position),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    ax.set_yticks(range(len(shown)), [line_name(row) for row in shown])
    ax.axvline(0, color="#4b5563", linewidth=1)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.1)
    ax.set(title=table["title"], xlabel=f"{plotted}, 95% intervals")


def line_name(row: Row) -> str:
    """A line's name with its labels, such as the AR that measured it."""
    labels = [value for value in row["labels"].values() if value != "-"]
    return f"{row['name']} ({', '.join(labels)})" if labels else row["name"]


def _svg(name: str, size: tuple[float, float], draw: Callable[..., None], *args: Any) -> Markup:
    """Draw one plot (size in inches) as an `<svg>` element without prolog, metadata or fixed size."""
    # The salt makes element ids reproducible, and different from those of the page's other plots.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot(), *args)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    tag = rf'<svg role="img" aria-label="{escape(name)}" viewBox="\1">'
    return Markup(
        re.sub(r'.*?<svg [^>]*viewBox="([^"]*)"[^>]*>', tag, buffer.getvalue(), count=1, flags=re.S)
    )


def _read_lines(path: AnyPath) -> list[dict[str, Any]]:
    # Not splitlines(): it also splits at separators such as U+2028 that JSON strings may contain.
    lines = path.read_bytes().decode("utf-8", "replace").rstrip("\n").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            # A killed run leaves its last line half written.
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number} is not a JSON object ({error}); repair or delete that line"
                ) from error
    return rows


def _number(value: float | int | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}".replace("-", "−")


def _duration(seconds: float | int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
