"""Measured figures in the pages are what `experiments/write_figures.py` wrote there."""

import importlib.util
import json

import pytest
from processes import ROOT


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("write_figures", ROOT / "experiments" / "write_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measured_blocks_were_not_changed_by_hand(figures):
    found = {}
    for page in figures.PAGES:
        for block in figures.BLOCK.finditer((ROOT / page).read_text()):
            assert figures.digest(block["text"]) == block["digest"], f"{page}: the block {block['name']}"
            found[block["name"]] = page
    assert set(found) == {"round-trip", "places", "run", "steps", "evaluation", "startup", "writers"}


def test_a_changed_figure_is_found_and_a_new_block_takes_the_place_of_the_old_one(figures):
    page = figures.with_blocks(
        "before\n<!-- measured: run 0 -->\nold\n<!-- end -->\nafter\n", {"run": "| 0.31 |\n"}
    )
    assert page.startswith("before\n<!-- measured: run ") and page.endswith("<!-- end -->\nafter\n")
    block = figures.BLOCK.search(page)
    assert block["text"] == "| 0.31 |\n" and block["digest"] == figures.digest("| 0.31 |\n")
    changed = figures.BLOCK.search(page.replace("0.31", "0.41"))
    assert changed["digest"] != figures.digest(changed["text"])


def test_blocks_say_what_the_evaluation_says(figures):
    def figure(value):
        return {
            "fve_nrm": {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 256, "documents": 120}
        }

    def table(name, rows):
        lines = [{"name": row, "labels": {"AR": ar}, "figures": figure(value)} for row, ar, value in rows]
        return {"name": name, "title": "Title", "note": "Note.", "rows": lines}

    evaluation = {
        "run": {
            "corpus": "docstrings",
            "corpus documents": 6234,
            "corpus digest": "ab12",
            "machine": "a machine",
            "code": "0.1",
        },
        "timings": {"extract": 84.4, "rl": 480.2},
        "kept_steps": {"av_sft": 140, "rl": 16, "second_judge": 260},
        "suites": {
            "reconstruction": {
                "seconds": 10.0,
                "tables": [
                    table("systems", [("AV after RL", "own", 0.312), ("AV after RL", "judge", 0.301)]),
                    table("gains", [("after over warm", "own", 0.04), ("after over warm", "judge", 0.03)]),
                ],
            },
            "controls": {
                "seconds": 1.0,
                "tables": [table("controls", [("nearest training activation", "-", 0.336)])],
            },
        },
    }
    metrics = [{"stage": "rl", "step": 8, "judge_fve_nrm": 0.28}, {"stage": "av_sft", "step": 8, "loss": 1.0}]
    blocks = figures.readme_blocks(evaluation, metrics)
    assert "| AV after RL | 0.31 [0.26, 0.36] | 0.30 [0.25, 0.35] |" in blocks["round-trip"]
    assert "| nearest training activation, no text at all | 0.34 [0.29, 0.39] |  |" in blocks["round-trip"]
    assert "| 256, of 120 documents |" in blocks["run"] and "| 0.280 (8) |" in blocks["run"]
    assert "| the AV's warm start 140, joint training 16 |" in blocks["run"]
    assert "| docstrings: 6,234 documents, digest ab12 |" in blocks["run"]
    assert "| extraction 84, joint training 480 |" in blocks["run"]
    assert "same last token" not in blocks["round-trip"] and "places" not in blocks
    page = figures.evaluation_page(evaluation)
    assert "## Reconstruction\n" in page and "| AV after RL | own | 0.312 [0.262, 0.362] |" in page
    evaluation["suites"].pop("controls")
    with pytest.raises(
        ValueError, match="of the suites reconstruction has no table 'controls'; evaluate the run"
    ):
        figures.readme_blocks(evaluation, metrics)


def test_figures_by_place_are_columns(figures):
    def line(name, ar, place, value, n):
        estimate = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n, "documents": 9}
        return {
            "name": name,
            "group": "nla",
            "labels": {"AR": ar, "place": place},
            "figures": {"fve_nrm": estimate},
        }

    rows = [
        line("AV after RL", "own", "answer_start", 0.6, 38),
        line("AV after RL", "judge", "answer_start", 0.5, 38),
        line("AV after RL", "judge", "inside", 0.3, 100),
        line("mean of the same last token", "-", "inside", 0.2, 100),
        line("second thoughts", "-", "inside", 0.9, 100),
    ]
    table = {"name": "systems_by_place", "title": "By place", "note": "Note.", "rows": rows}
    block = figures.places_block(figures.by_place(table))
    assert block.splitlines() == [
        "| held-out `fve_nrm` through the frozen judge | answer start (n 38) | inside (n 100) |",
        "| --- | --- | --- |",
        "| AV after RL | 0.50 [0.40, 0.60] | 0.30 [0.20, 0.40] |",
        "| mean of the training activations with the same last token |  | 0.20 [0.10, 0.30] |",
    ]
    empty = {**table, "title": "Nothing", "rows": []}
    page = figures.evaluation_page({"suites": {"reconstruction": {"tables": [empty, table]}}})
    assert "Nothing" not in page
    assert "### By place\n\nNote.\n\n| fve_nrm | AR | answer start (n 38) | inside (n 100) |" in page
    assert "| AV after RL | own | 0.600 [0.500, 0.700] |  |" in page


def test_a_block_that_no_page_has_is_refused_and_nothing_is_written(figures, tmp_path):
    (tmp_path / "docs").mkdir()
    for page in figures.PAGES:
        (tmp_path / page).write_text("<!-- measured: run 0 -->\nold\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"no page has the blocks \['other'\]; they have \['run'\]"):
        figures.write_pages({"run": "new\n", "other": "text\n"}, tmp_path)
    assert "old" in (tmp_path / "README.md").read_text()
    figures.write_pages({"run": "new\n"}, tmp_path)
    assert "new" in (tmp_path / "README.md").read_text()


def test_a_steps_median_and_its_slowest_call(figures):
    config = {"av_sft": {"batch_size": 16}, "ar_sft": {"batch_size": 8}, "rl": {"activations": 8, "group": 4}}
    metrics = [
        {"stage": stage, "step": step, "speed/seconds": seconds}
        for stage in config
        for step, seconds in enumerate((33.0, 1.0, 2.0))
    ]
    block = figures.step_block(json.loads(json.dumps(metrics)), config)
    assert "| AV warm start, 16 examples | 2.0 | 33 |" in block
    assert "| joint training, a round of 8 activations x 4 explanations | 2.0 | 33 |" in block


def test_the_table_of_writers(figures):
    def row(value, words):
        figure = {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 300, "documents": 60}
        return {
            "fve_nrm": figure,
            "seeds": [value, value],
            "over the first": figure | {"value": value - 0.4, "low": value - 0.41, "high": value - 0.39},
            "words": words,
            "report": {"rows": 1800, "written": 1600},
        }

    measured = {"machine": "a machine", "steps": 120, "rows": 1500}
    measured["writers"] = {"predictive": row(0.4, 11.2), "chat": row(0.3, 30.9)}
    block = figures.writers_block(measured)
    assert "| predictive | 0.400 [0.390, 0.410] | 0.400, 0.400 |  | 11 | 1600 of 1800 |" in block
    assert "| chat | 0.300 [0.290, 0.310] | 0.300, 0.300 | -0.100 [-0.110, -0.090] | 31 |" in block
    assert "1500 rows" in block and "300 of them of 60 held-out documents; 120 steps" in block
