"""The whole job as a user runs it, in real processes: on 1 and 8 devices, killed and resumed."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, command, environment, finish, finish_all

from nla_jax.data.corpora.corpus import load_corpus

STAGES = ("av_sft", "ar_sft", "rl")


def write_corpus(path: Path) -> Path:
    documents = load_corpus("docstrings", max_documents=64)
    rows = ({"id": d.id, "text": d.text, "genre": d.genre} for d in documents)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts.jsonl")


def read_metrics(run_dir: Path) -> dict[tuple[str, int], dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keyed = {}
    for row in rows:
        key = row["stage"], row["step"]
        assert key not in keyed, f"{key} was logged twice"
        keyed[key] = {name: value for name, value in row.items() if not name.startswith("speed/")}
    return keyed


@pytest.fixture(scope="module")
def finished_run(shallow_model_dir, corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("run") / "one_device"
    finish(command("train_nla.py", shallow_model_dir, corpus, run_dir))
    return run_dir


def test_run_leaves_everything_a_user_expects(finished_run):
    metrics = read_metrics(finished_run)
    assert {key for key in metrics} == {(stage, step) for stage in STAGES for step in range(7)}
    assert all(
        np.isfinite(value) for row in metrics.values() for value in row.values() if value not in STAGES
    )
    evaluation = json.loads((finished_run / "evaluation.json").read_text())
    assert list(evaluation["suites"]) == ["reconstruction", "controls"]
    corpus = json.loads((finished_run / "data" / "corpus.json").read_text())
    described = [evaluation["run"][name] for name in ("corpus", "corpus documents", "corpus digest")]
    assert described == [corpus["corpus"], 64, corpus["digest"]]
    tables = {t["name"]: t for suite in evaluation["suites"].values() for t in suite["tables"]}
    for table, lines in (
        ("systems", ("explainer texts", "AV warm start", "AV after RL")),
        ("controls", ("AV, shuffled", "empty text", "fixed text")),
    ):
        names = {(row["name"], row["labels"]["AR"]) for row in tables[table]["rows"]}
        assert {(line, ar) for line in lines for ar in ("own", "judge")} <= names
    report = (finished_run / "report.html").read_text()
    assert "<svg" in report and "texts.jsonl (64 documents)." in report and corpus["digest"] in report
    assert len((finished_run / "examples.jsonl").read_text().splitlines()) == 16


def test_the_steps_kept_are_the_best_and_other_documents_are_reported(finished_run):
    from nla_jax.config import read_config
    from nla_jax.pipeline.run import Run

    metrics = read_metrics(finished_run)
    evaluated = {
        stage: {step: metrics[stage, step][name] for step in (0, 3, 6)}
        for stage, name in (("av_sft", "real_loss"), ("ar_sft", "held_out_fve_nrm"), ("rl", "judge_fve_nrm"))
    }
    kept = json.loads((finished_run / "evaluation.json").read_text())["kept_steps"]
    best = {stage: max(values, key=values.get) for stage, values in evaluated.items()}
    assert kept == best | {"av_sft": min(evaluated["av_sft"], key=evaluated["av_sft"].get)}
    for stage, step in kept.items():
        assert (finished_run / "checkpoints" / stage / str(step)).is_dir()
    run = Run(read_config(finished_run / "config.json"), finished_run)
    examples = (finished_run / "examples.jsonl").read_text().splitlines()
    shown, chose = {json.loads(line)["doc_id"] for line in examples}, set(run.monitored(1000).doc_ids)
    assert shown and chose and not shown & chose


def test_every_evaluation_of_joint_training_kept_texts(finished_run):
    lines = [json.loads(line) for line in (finished_run / "history.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("rl", 0), ("rl", 3), ("rl", 6)]
    ids = [[row["id"] for row in line["rows"]] for line in lines]
    assert len(set(ids[0])) == 8 and ids[0] == ids[1] == ids[2]
    report = (finished_run / "report.html").read_text()
    assert "How texts changed" in report and all(name in report for name in ids[0])


def test_splits_share_no_document(finished_run):
    from nla_jax.data.dataset import load_dataset

    documents = {
        split: set(load_dataset(finished_run / "data" / split).doc_ids)
        for split in ("av_sft", "ar_sft", "rl", "held_out")
    }
    assert sum(map(len, documents.values())) == len(set.union(*documents.values()))


def test_second_run_does_nothing_again(finished_run, shallow_model_dir, corpus):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.parquet")}
    metrics = (finished_run / "metrics.jsonl").read_bytes()
    evaluation = (finished_run / "evaluation.json").read_bytes()
    finish(command("train_nla.py", shallow_model_dir, corpus, finished_run))
    assert (finished_run / "metrics.jsonl").read_bytes() == metrics
    assert (finished_run / "evaluation.json").read_bytes() == evaluation
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.parquet")} == before


def test_eight_devices_give_the_same_run(finished_run, shallow_model_dir, corpus, tmp_path):
    run_dir = tmp_path / "eight_devices"
    # Scanned blocks compute the same and compile faster.
    more = ("--evaluation.suites", "cost", "--model.scan-blocks")
    done = finish(command("train_nla.py", shallow_model_dir, corpus, run_dir, *more), devices=8)
    assert "Involuntary full rematerialization" not in done.stderr
    assert_same_supervised_metrics(finished_run, run_dir)


def test_two_processes_give_the_same_run(finished_run, shallow_model_dir, corpus, tmp_path):
    run_dir = tmp_path / "two_processes"
    more = ("--evaluation.suites", "controls", "--model.scan-blocks")
    arguments = command("train_nla.py", shallow_model_dir, corpus, run_dir, *more)
    finish_all(arguments, devices=4, processes=2, under_slurm=True)
    assert (run_dir / "report.html").exists() and (run_dir / "evaluation.json").exists()
    assert_same_supervised_metrics(finished_run, run_dir)


def tables(run_dir: Path) -> list:
    """All tables of a run's evaluation."""
    suites = json.loads((run_dir / "evaluation.json").read_text())["suites"]
    return [table for suite in suites.values() for table in suite["tables"]]


def assert_same_supervised_metrics(one: Path, other: Path) -> None:
    left, right = read_metrics(one), read_metrics(other)
    assert left.keys() == right.keys()
    for key, row in left.items():
        if key[0] != "rl":  # sampled tokens may part where two candidates lie within rounding
            for name, value in row.items():
                if name != "stage":
                    assert right[key][name] == pytest.approx(value, rel=2e-3, abs=2e-4), (key, name)


def test_scanned_blocks_go_on_from_unrolled_ones(finished_run, shallow_model_dir, corpus, tmp_path):
    after = {}
    for scan in ("scan-blocks", "no-scan-blocks"):
        run_dir = tmp_path / scan
        shutil.copytree(finished_run, run_dir)
        more = ("--rl.loop.steps", "7", f"--model.{scan}")
        finish(command("train_rl.py", shallow_model_dir, corpus, run_dir, *more))
        after[scan] = read_metrics(run_dir)["rl", 7]
    for name in ("ar_loss", "av_grad_norm", "reward_mean", "kl", "own_fve_nrm"):
        assert after["scan-blocks"][name] == pytest.approx(
            after["no-scan-blocks"][name], rel=1e-2, abs=1e-4
        ), name


def stop_when(arguments: list[str], condition, by: signal.Signals = signal.SIGKILL) -> int:
    """Start a run, send it a signal at the first moment that `condition()` holds, and return its exit status."""
    process = subprocess.Popen(
        arguments, env=environment(1), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and not condition():
            time.sleep(0.001)
        assert process.poll() is None, "the run ended before the moment to kill it came"
        process.send_signal(by)
        return process.wait(timeout=300)
    finally:
        process.kill()


def test_killed_run_goes_on_bit_for_bit(finished_run, shallow_model_dir, corpus, tmp_path):
    run_dir = tmp_path / "killed"
    arguments = command("train_nla.py", shallow_model_dir, corpus, run_dir)

    def rows(stage: str) -> int:
        path = run_dir / "metrics.jsonl"
        return path.read_text().count(f'"stage": "{stage}"') if path.exists() else 0

    def saving(stage: str) -> bool:
        folder = run_dir / "checkpoints" / stage
        # A save in progress: Orbax writes under a temporary name and renames at the end.
        return folder.exists() and any("tmp" in path.name for path in folder.iterdir())

    stop_when(arguments, lambda: len(list((run_dir / "data" / "base").glob("*.yaml"))) >= 1)
    stop_when(arguments, lambda: saving("av_sft"))
    # A machine that is taken back asks first, and gets a status that says so.
    assert stop_when(arguments, lambda: rows("ar_sft") >= 4, signal.SIGTERM) == 75
    assert (run_dir / "checkpoints" / "ar_sft").is_dir()
    stop_when(arguments, lambda: rows("rl") >= 3 and saving("rl"))
    finish(arguments)
    assert read_metrics(run_dir) == read_metrics(finished_run)
    assert (run_dir / "history.jsonl").read_bytes() == (finished_run / "history.jsonl").read_bytes()
    assert tables(run_dir) == tables(finished_run)


def test_verbalize_prints_one_explanation_a_token(finished_run):
    script = str(ROOT / "experiments" / "verbalize.py")
    text = "The array has a shape."
    done = finish([sys.executable, script, str(finished_run), text, "--json"])
    found = json.loads(done.stdout)
    assert [item["position"] for item in found] == list(range(len(found)))
    assert "".join(item["token"] for item in found) == text
    done = finish(
        [sys.executable, script, str(finished_run), text, "--position", "-1", "--samples", "3", "--json"]
    )
    assert [item["position"] for item in json.loads(done.stdout)] == [len(found) - 1] * 3


def test_a_run_is_evaluated_further_and_compared(finished_run, tmp_path):
    run_dir, scripts = tmp_path / "run", ROOT / "experiments"
    shutil.copytree(finished_run, run_dir)
    evaluate = [sys.executable, str(scripts / "evaluate.py"), str(run_dir), "--suite", "cost"]
    finish(evaluate)
    suites = json.loads((run_dir / "evaluation.json").read_text())["suites"]
    assert list(suites) == ["reconstruction", "controls", "cost"]
    out = tmp_path / "differences.json"
    compare = [sys.executable, str(scripts / "compare.py"), str(finished_run), str(run_dir)]
    assert "reconstruction: systems" in finish([*compare, "--json", str(out)]).stdout
    differences = json.loads(out.read_text())
    assert {d["suite"] for d in differences} == {"reconstruction", "controls"}
    assert all(d["difference"]["low"] == d["difference"]["high"] == 0 for d in differences)
    # With another judge nothing that was measured before is the same.
    finish([*evaluate, "--evaluation.second-judge-steps", "2"])
    assert list(json.loads((run_dir / "evaluation.json").read_text())["suites"]) == ["cost"]
    assert (run_dir / "checkpoints" / "second_judge_2" / "2").is_dir()
    done = subprocess.run(compare, env=environment(1), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "share no figure of the same held-out rows" in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model.layer", "9"), "layer 9 is outside the model: it has blocks 0 to 2"),
        (("--extraction.min-position", "60000"), "extraction.min_position is 60000"),
        (("--rl.no-such-field", "1"), "no-such-field"),
        (("--templates.marker", "two words"), "not one token in context"),
        (("--templates.reconstructor", "no slot"), "must contain {explanation} exactly once"),
        (("--ar-sft.batch-size", "5"), "was saved by a run whose config has digest"),
    ],
)
def test_bad_input_is_named(more, message, finished_run, shallow_model_dir, corpus, tmp_path):
    run_dir = finished_run if "was saved by" in message else tmp_path / "bad"
    kept = (finished_run / "config.json").read_bytes()
    arguments = command("train_nla.py", shallow_model_dir, corpus, run_dir, *more)
    done = subprocess.run(arguments, env=environment(1), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    # The command line draws a box around its own messages and breaks their lines.
    printed = " ".join((done.stderr + done.stdout).replace("│", " ").split())
    assert message in printed
    assert "Traceback" not in done.stderr
    assert (finished_run / "config.json").read_bytes() == kept
