"""The plots of a report: curves of metrics over steps, and figures of tables as bars."""

import dataclasses
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from nla_jax.data.positions import SPAN_PLACE
from nla_jax.lm.places import TOKEN_PLACES

Row = Mapping[str, Any]

COLORS = ("#2a6db0", "#d9782d", "#3a8f6b", "#8a5fb0", "#c04b5a", "#7a6a53")
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
    constants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Key -> name of numbers that training does not change, as dashed lines in the colors of the first lines."""
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
        "RL: FVE by place, through the judge",
        {f"judge_fve_nrm_{place}": place.replace("_", " ") for place in (*TOKEN_PLACES, SPAN_PLACE)},
        "Each around the mean of its own place, of the places that have enough of the watched rows.",
    ),
    Panel(
        "rl",
        "RL: text probe",
        {"text_probe": "accuracy"},
        "What the words of the texts tell of planted properties: the mean accuracy over the tasks that are watched.",
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
        {
            "repeated": "2-grams said twice",
            "boilerplate": "4-grams of other documents' texts",
            "copied": "3-grams from the context",
        },
        "Shares of the texts' runs of words. Copying that grows is reciting; repetition that grows beyond the writer's "
        "own is decay.",
        constants={
            "writer_repeated": "said twice by the writer",
            "writer_boilerplate": "shared by the writer's",
        },
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
    for color, (key, name) in zip(COLORS, panel.constants.items(), strict=False):
        if values := curve(rows, panel.stage, key)[1]:
            ax.axhline(values[-1], color=color, label=name, linestyle="--", linewidth=1)
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
    """Draw the plotted figure of each line as a bar with its 95% interval, top to bottom in the order given.

    A dotted line marks the figure of the line that the table's `reference` names.
    """
    plotted = table["plotted"]
    shown = [row for row in table["rows"] if row["figures"].get(plotted)]
    for position, row in enumerate(shown):
        figure = row["figures"][plotted]
        ax.barh(position, figure["value"], height=0.62, color=GROUPS[row["group"]][1])
        ax.plot([figure["low"], figure["high"]], [position, position], color="#1f2933", linewidth=1.2)
        ax.annotate(
            number(figure["value"], 2),
            (max(figure["high"], 0), position),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    ax.set_yticks(range(len(shown)), [line_name(row) for row in shown])
    ax.axvline(0, color="#4b5563", linewidth=1)
    for row in shown:
        if row["name"] == table.get("reference"):
            ax.axvline(row["figures"][plotted]["value"], color="#6b7280", linestyle=":", linewidth=1.2)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.1)
    ax.set(title=table["title"], xlabel=f"{plotted}, 95% intervals")


def draw_places(ax: Axes, table: Mapping[str, Any]) -> None:
    """Draw the plotted figure of lines by place as groups of bars with 95% intervals, a group for each place."""
    rows, plotted = table["rows"], table["plotted"]
    places = dict.fromkeys(row["labels"]["place"] for row in rows)
    names = {row["name"]: row["group"] for row in rows}
    figures = {(row["name"], row["labels"]["place"]): row["figures"][plotted] for row in rows}
    width = 0.84 / len(names)
    for number, (name, color) in enumerate(zip(names, _shades([*names.values()]), strict=True)):
        at = {x: figures[name, place] for x, place in enumerate(places) if figures.get((name, place))}
        left = [x + (number - (len(names) - 1) / 2) * width for x in at]
        ax.bar(left, [figure["value"] for figure in at.values()], width * 0.9, color=color, label=name)
        for x, figure in zip(left, at.values(), strict=True):
            ax.plot([x, x], [figure["low"], figure["high"]], color="#1f2933", linewidth=0.8)
    ax.axhline(0, color="#4b5563", linewidth=1)
    ax.set_xticks(range(len(places)), [textwrap.fill(place.replace("_", " "), 16) for place in places])
    ax.grid(axis="x", visible=False)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    ax.set(title=table["title"], ylabel=plotted)


def _shades(groups: Sequence[str]) -> list[tuple[float, ...]]:
    """A color for each line by its group, paler for earlier lines of the same group."""
    shades = []
    for number, group in enumerate(groups):
        later = groups[number + 1 :].count(group)
        shades.append(tuple(1 - (1 - part) * 0.55**later for part in to_rgb(GROUPS[group][1])))
    return shades


def line_name(row: Row) -> str:
    """A line's name with its labels, such as the AR that measured it."""
    labels = [value for value in row["labels"].values() if value != "-"]
    return f"{row['name']} ({', '.join(labels)})" if labels else row["name"]


def svg(name: str, size: tuple[float, float], draw: Callable[..., None], *args: Any) -> Markup:
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


def number(value: float | int | None, digits: int = 3) -> str:
    """A figure as the report writes it, with a dash where it is undefined."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}".replace("-", "−")
