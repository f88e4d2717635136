"""The landscape: what every method makes of the same activations, from the tables that the suites have measured.

Nothing is measured here. A method's line has what the method takes to say, what is rebuilt from it, and how many
questions about planted texts can be answered from it, as far as there is a suite that tells.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nla_jax.evaluation.tables import LAST_TOKEN, LAST_TWO, NEAREST

Record = Mapping[str, Any]
"""A table, a line or a figure as JSON holds it (see `tables.Table.record`)."""

NAME = "landscape"
READER, PROBE = "questions, by a reader", "questions, by a probe"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to say what an activation holds."""

    name: str
    """Name of its line."""
    line: str
    """Name of the line of other tables that it is made of; empty where no suite rebuilds activations from it."""
    group: str
    told: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Column -> the column of the table of questions that it is made of."""
    tokens: int | None = None
    """Tokens that it takes, where that is known without measuring."""


def methods(nla: str) -> list[Method]:
    """The methods in the order of the table.

    Args:
      nla: name of the line of the evaluated AV.
    """
    return [
        Method("the activation itself", "", "gold", {PROBE: "probe"}),
        Method("writer's texts", "explainer texts", "gold", {PROBE: "text probe, explainer"}),
        Method("NLA", nla, "nla", {READER: "AV", PROBE: "text probe"}),
        Method("activation oracle", "activation oracle's answers", "baseline", {READER: "oracle"}),
        Method("sparse dictionary, words", "sparse dictionary words", "baseline"),
        Method("sparse dictionary, named features", _NAMED_CODE, "baseline"),
        Method("sparse dictionary, all features", "sparse dictionary code", "baseline"),
        Method("logit lens words", "logit lens words", "baseline"),
        Method(NEAREST, NEAREST, "baseline"),
        Method(LAST_TWO, LAST_TWO, "control", tokens=2),
        Method(LAST_TOKEN, LAST_TOKEN, "control", tokens=1),
        Method("PCA code", "PCA code of as many bits as the texts carry", "baseline"),
        Method("nothing", "training mean", "control", {READER: "guess", PROBE: "commonest answer"}),
    ]


_NAMED_CODE = "sparse dictionary code of the 4 strongest features"


def with_landscape(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An evaluation with the landscape behind the tables of the suite controls; as it is where it lacks that suite."""
    suites = evaluation.get("suites") or {}
    if "controls" not in suites or not (table := landscape(suites))["rows"]:
        return evaluation
    controls = {**suites["controls"], "tables": [*suites["controls"]["tables"], table]}
    return {**evaluation, "suites": {**suites, "controls": controls}}


def landscape(suites: Mapping[str, Record]) -> dict[str, Any]:
    """The table, as JSON holds it.

    Args:
      suites: name -> {"tables": ...} of the suites that were measured.
    """
    tables = {table["name"]: table["rows"] for suite in suites.values() for table in suite["tables"]}
    lines, nla = _judged(tables)
    costs = {line["name"]: line["figures"].get("tokens") for line in tables.get("cost", [])}
    told = tables.get("questions", [])
    rows = [row for method in methods(nla) if (row := _row(method, lines, costs, told)) is not None]
    return {
        "name": NAME,
        "title": "The landscape",
        "note": "What each method takes to say what an activation holds, what is rebuilt from that (texts are read by "
        "the judge, everything else is a vector of itself), and the mean accuracy over the questions about planted "
        "texts. A reader is the target LM, which answers by likelihood, or the oracle itself; a probe learns from "
        "other texts or activations. Bits of an NLA's texts are the target LM's surprise. A dash stands where no suite "
        "measured it. The interval of a mean over questions takes their errors as independent.",
        "plotted": "fve_nrm",
        "rows": rows,
    }


def _judged(tables: Mapping[str, Sequence[Record]]) -> tuple[dict[str, Record], str]:
    """The lines of all rows through the judge, or without a reader, by name; and the name of the evaluated AV's."""
    systems = tables.get("systems", [])
    readers = list(dict.fromkeys(line["labels"].get("AR", "-") for line in systems))
    judge = next((reader for reader in readers if reader != "own"), "own")
    measured = [*systems, *tables.get("controls", [])]
    lines = {line["name"]: line for line in measured if line["labels"].get("AR", "-") in (judge, "-")}
    verbalizers = [line["name"] for line in systems if line["group"] == "nla"]
    return lines, verbalizers[-1] if verbalizers else ""


def _row(
    method: Method, lines: Mapping[str, Record], costs: Mapping[str, Record | None], told: Sequence[Record]
) -> dict[str, Any] | None:
    """The line of a method; None where nothing was measured of it."""
    figures: dict[str, Any] = {}
    line = lines.get(method.line)
    if line is not None:
        measured = line["figures"]
        tokens = costs.get(method.line) or measured.get("tokens")
        if tokens is None and method.tokens is not None:
            tokens = measured["fve_nrm"] | dict.fromkeys(("value", "low", "high"), float(method.tokens))
        bits = measured.get("bits") or _bits_of_texts(lines, method)
        figures = {"tokens": tokens, "bits": bits, "fve_nrm": measured["fve_nrm"]}
    answered = {column: mean_accuracy(told, source) for column, source in method.told.items()}
    if line is None and not any(answered.values()):
        return None
    columns = ("tokens", "bits", "fve_nrm", READER, PROBE)
    return {
        "name": method.name,
        "group": method.group,
        "labels": {},
        "figures": {column: (figures | answered).get(column) for column in columns},
    }


def _bits_of_texts(lines: Mapping[str, Record], method: Method) -> Record | None:
    """The bits of an NLA's texts, which stand beside the PCA code of as many."""
    code = lines.get("PCA code of as many bits as the texts carry")
    return code["figures"].get("bits") if method.name == "NLA" and code is not None else None


def mean_accuracy(told: Sequence[Record], column: str) -> dict[str, Any] | None:
    """The mean of one column over the questions about planted texts that have it; None where there are none.

    Lines of a chat model, and the question about the data's own genres, are left out.
    """
    figures = [
        line["figures"][column]
        for line in told
        if "predictor" not in line["labels"]
        and not line["name"].startswith("genre of the data")
        and line["figures"].get(column)
    ]
    if not figures:
        return None
    value, below, above = (np.array([figure[end] for figure in figures]) for end in ("value", "low", "high"))
    return {
        "value": float(value.mean()),
        "low": float(value.mean() - np.linalg.norm(value - below) / len(value)),
        "high": float(value.mean() + np.linalg.norm(above - value) / len(value)),
        "n": len(figures),
        "documents": sum(figure["documents"] for figure in figures),
        "denominator": 1.0,
    }
