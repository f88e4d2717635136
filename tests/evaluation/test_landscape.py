import pytest

from nla_jax.evaluation.dictionary_baseline import CODE, NAMED_CODE, WORDS
from nla_jax.evaluation.landscape import PROBE, READER, landscape, mean_accuracy, methods, with_landscape
from nla_jax.evaluation.oracle import ANSWERS
from nla_jax.evaluation.suites.controls import PCA_CODE
from nla_jax.evaluation.tables import LAST_TOKEN


def figure(value, spread=0.1, documents=10):
    ends = {"low": value - spread, "high": value + spread}
    return {"value": value, **ends, "n": 20, "documents": documents, "denominator": 1.0}


def line(name, group="nla", labels=None, **figures):
    return {
        "name": name,
        "group": group,
        "labels": {"AR": "judge"} if labels is None else labels,
        "figures": {
            column.replace("_", " ") if column != "fve_nrm" else column: f for column, f in figures.items()
        },
    }


def table(name, *rows):
    return {"name": name, "title": name, "note": "", "plotted": None, "rows": list(rows)}


NO_READER = {"AR": "-"}
SYSTEMS = table(
    "systems",
    line("explainer texts", "gold", {"AR": "own"}, fve_nrm=figure(0.9)),
    line("AV warm start", fve_nrm=figure(0.2)),
    line("AV after RL", fve_nrm=figure(0.3)),
    line("AV after RL", labels={"AR": "own"}, fve_nrm=figure(0.8)),
)
CONTROLS = table(
    "controls",
    line(LAST_TOKEN, "control", NO_READER, fve_nrm=figure(0.22)),
    line(PCA_CODE, "baseline", NO_READER, fve_nrm=figure(0.6), bits=figure(74.0)),
)
QUESTIONS = table(
    "questions",
    line("language (10 answers)", labels={}, AV=figure(0.4, 0.3), probe=figure(0.8), guess=None),
    line("tense (3 answers)", labels={"place": "inside"}, AV=figure(0.6, 0.4), probe=figure(1.0)),
    line("tense (3 answers)", labels={"predictor": "anthropic:m"}, AV=figure(0.0)),
    line("genre of the data (4 answers)", labels={}, AV=figure(0.0)),
)
COST = table("cost", line("AV after RL", labels={}, tokens=figure(31.0)))


def suites(*tables):
    return {"controls": {"tables": [CONTROLS]}, "other": {"tables": list(tables)}}


def shown(*tables):
    return {row["name"]: row["figures"] for row in landscape(suites(*tables))["rows"]}


def test_the_last_av_stands_through_the_judge_with_what_it_takes_to_say():
    nla = shown(SYSTEMS, QUESTIONS, COST)["NLA"]
    assert (nla["fve_nrm"]["value"], nla["tokens"]["value"], nla["bits"]["value"]) == (0.3, 31.0, 74.0)
    assert nla[READER]["value"] == pytest.approx(0.5)


def test_what_was_not_measured_is_left_out():
    found = shown(SYSTEMS)
    # The writer's texts were read by the own AR alone.
    assert list(found) == ["NLA", "mean of the same last token", "PCA code"]
    assert found["NLA"][READER] is None and found["NLA"]["tokens"] is None
    assert found["mean of the same last token"]["tokens"]["value"] == 1
    assert found["mean of the same last token"]["fve_nrm"]["value"] == 0.22


def test_a_probe_on_the_activation_rebuilds_nothing():
    activation = shown(SYSTEMS, QUESTIONS)["the activation itself"]
    assert activation[PROBE]["value"] == pytest.approx(0.9) and activation["fve_nrm"] is None


def test_the_error_of_a_mean_over_questions():
    mean = mean_accuracy(QUESTIONS["rows"], "AV")
    # Half-widths 0.3 and 0.4 make √(0.09 + 0.16) / 2.
    assert (mean["low"], mean["high"]) == (pytest.approx(0.25), pytest.approx(0.75))
    assert (mean["n"], mean["documents"]) == (2, 20)
    assert mean_accuracy(QUESTIONS["rows"], "oracle") is None


def test_it_stands_behind_the_controls():
    evaluation = {"run": {}, "suites": suites(SYSTEMS)}
    tables = with_landscape(evaluation)["suites"]["controls"]["tables"]
    assert [t["name"] for t in tables] == ["controls", "landscape"]
    assert len(evaluation["suites"]["controls"]["tables"]) == 1
    without = {"suites": {"cost": {"tables": [COST]}}}
    assert with_landscape(without) is without
    assert with_landscape({"run": {}}) == {"run": {}}


def test_the_lines_are_named_as_the_suites_name_them():
    lines = {method.line for method in methods("AV after RL")}
    assert {WORDS, CODE, NAMED_CODE, ANSWERS, PCA_CODE} <= lines
