"""The whole job in a bucket: model, corpus, run and export are at gs://, and come out as they do in folders."""

import json
import shutil
from pathlib import Path

import pytest
from bucket import Bucket
from processes import ROOT

import nla_jax
from nla_jax.__main__ import main
from nla_jax.data.corpora.corpus import load_corpus
from nla_jax.files import as_path, upload
from nla_jax.training.metrics_log import MetricsLog

TEXT = "The array has a shape."


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def train(place: str, model: str, corpus: str) -> None:
    main(
        [
            *("train", str(ROOT / "configs" / "tiny.py"), "--run-dir", place),
            *("--model.path", model, "--corpus.source", corpus, "--model.scan-blocks"),
            *("--av-sft.loop.steps", "2", "--ar-sft.loop.steps", "2", "--rl.loop.steps", "4"),
        ]
    )


def rows_of(text: str) -> list[dict]:
    """The rows of a metrics.jsonl without what differs between any two runs."""
    rows = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("speed/")} for row in rows]


def figures_of(text: str) -> list:
    return [table for suite in json.loads(text)["suites"].values() for table in suite["tables"]]


@pytest.fixture
def given(shallow_model_dir, tmp_path) -> tuple[Path, Path]:
    """A model directory and a corpus here."""
    corpus = tmp_path / "texts.jsonl"
    rows = [
        {"id": d.id, "text": d.text, "genre": d.genre} for d in load_corpus("docstrings", max_documents=64)
    ]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return shallow_model_dir, corpus


def test_a_run_in_a_bucket_is_the_run_in_a_folder(bucket, given, tmp_path, monkeypatch, capsys):
    model, corpus = given
    here, there = tmp_path / "run", f"{bucket}/runs/a"
    for file in model.iterdir():
        upload(file, as_path(f"{bucket}/model/{file.name}"))
    upload(corpus, as_path(f"{bucket}/corpus/texts.jsonl"))
    names = (f"{bucket}/model", f"{bucket}/corpus/texts.jsonl")
    train(str(here), str(model), str(corpus))

    # Killed in joint training, with rows in memory that are in no object yet, it goes on from the last checkpoint.
    write = MetricsLog.write
    with monkeypatch.context() as patch, pytest.raises(Killed):

        def write_or_die(log, stage, step, metrics):
            if (stage, step) == ("rl", 3):
                raise Killed
            write(log, stage, step, metrics)

        patch.setattr(MetricsLog, "write", write_or_die)
        train(there, *names)
    assert "bucket/runs/a/checkpoints/rl/2/commit_success.txt" in Bucket.objects
    assert "bucket/runs/a/evaluation.json" not in Bucket.objects
    capsys.readouterr()
    train(there, *names)
    assert "everything is in gs://bucket/runs/a" in capsys.readouterr().out

    files = {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()}
    objects = {
        name.removeprefix("bucket/runs/a/") for name in Bucket.objects if name.startswith("bucket/runs/a/")
    }
    kept = {name for name in files if not name.startswith("checkpoints/")}
    assert {name for name in objects if not name.startswith("checkpoints/")} == kept
    found = as_path(there)
    assert rows_of((found / "metrics.jsonl").read_text()) == rows_of((here / "metrics.jsonl").read_text())
    assert (found / "history.jsonl").read_bytes() == (here / "history.jsonl").read_bytes()
    assert figures_of((found / "evaluation.json").read_text()) == figures_of(
        (here / "evaluation.json").read_text()
    )
    assert not (Path.cwd() / "gs:").exists()

    # Once more, nothing but the report and the config is written.
    before = dict(Bucket.generations)
    train(there, *names)
    changed = {
        name.rpartition("/")[2] for name in Bucket.objects if Bucket.generations[name] != before.get(name)
    }
    assert changed <= {"config.json", "report.html", "timings.json"}

    main(["compare", there, str(here), "--json", f"{bucket}/differences.json"])
    differences = json.loads(Bucket.objects["bucket/differences.json"])
    assert differences and all(d["difference"]["value"] == 0 for d in differences)
    capsys.readouterr()
    main(["inspect", there, "--verify"])
    assert capsys.readouterr().out.count("every number is as it was saved") == objects_committed(objects)

    main(["convert", there, f"{bucket}/exported"])
    shutil.rmtree(here)
    nlas = [
        nla_jax.load(place, target=target)
        for place, target in ((there, None), (f"{bucket}/exported", names[0]))
    ]
    acts = [nla.activations(TEXT) for nla in nlas]
    texts = [nla.explain(part).texts for nla, part in zip(nlas, acts, strict=True)]
    assert texts[0] == texts[1]


def objects_committed(objects: set[str]) -> int:
    """Number of checkpoints that are whole."""
    return sum(name.endswith("/commit_success.txt") for name in objects)
