import json
import sys

import pytest

from nla_jax.files import as_path
from nla_jax.training import trackers
from nla_jax.training.trackers import PACKAGES, check_tracker, markdown_table, open_tracker

ROWS = [
    {"place": "inside", "text": "It says <b> | and\nends.", "cosine": 0.25},
    {"place": "turn_end", "text": None, "cosine": None},
]


def show(name, directory, parts=((0, 1), (1, 2))):
    """A run that is killed after two rows and goes on, unless it has one part."""
    for steps in parts:
        tracker = open_tracker(name, directory, "small", {"rl": {"group": 4}})
        for step in steps:
            tracker.metrics("rl", step, {"kl": step / 10})
        tracker.texts("rl", steps[-1], ROWS)
        tracker.close()


def test_a_table_keeps_every_text_in_its_cell():
    assert markdown_table(ROWS).splitlines() == [
        "| place | text | cosine |",
        "| --- | --- | --- |",
        "| inside | It says &lt;b> \\| and<br>ends. | 0.250 |",
        "| turn_end | – | – |",
    ]


def test_tensorboard_shows_metrics_and_texts(tmp_path):
    show("tensorboard", tmp_path, parts=((0, 1),))
    (file,) = (tmp_path / "tensorboard").iterdir()
    written = file.read_bytes()
    assert written.count(b"rl/kl") == 2 and b"It says &lt;b>" in written


def test_trackio_goes_on_with_the_same_run(tmp_path, monkeypatch):
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "kept")
    show("trackio", tmp_path)
    (name,) = storage.SQLiteStorage.get_runs(trackers.PROJECT)
    assert name == f"small-{json.loads((tmp_path / 'tracker.json').read_text())['id']}"
    rows = storage.SQLiteStorage.get_logs(trackers.PROJECT, name)
    assert [(row["step"], row["rl/kl"]) for row in rows if "rl/kl" in row] == [
        (0, 0),
        (1, 0.1),
        (1, 0.1),
        (2, 0.2),
    ]
    assert [row["rl/texts"]["_value"] for row in rows if "rl/texts" in row] == [markdown_table(ROWS)] * 2


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    show("wandb", tmp_path)
    identity = json.loads((tmp_path / "tracker.json").read_text())["id"]
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.name for path in files} == {f"run-{identity}.wandb"}
    tables = [json.loads(path.read_text()) for path in (tmp_path / "wandb").rglob("*.table.json")]
    assert tables and all(table["columns"] == ["place", "text", "cosine"] for table in tables)
    assert all(table["data"][0] == ["inside", "It says <b> | and\nends.", 0.25] for table in tables)


def test_a_login_that_is_missing_is_told(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(RuntimeError, match=r"Weights & Biases refuses: No API key .* set WANDB_MODE=offline"):
        open_tracker("wandb", tmp_path, "small", {})


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ModuleNotFoundError, match=f"tracker={name} .*: pip install {PACKAGES[name]}$"):
        check_tracker(name, tmp_path)


def test_what_cannot_show_a_run_is_refused(tmp_path, bucket):
    with pytest.raises(ValueError, match=r"tracker is 'mlflow'; expected one of tensorboard, wandb, trackio"):
        check_tracker("mlflow", tmp_path)
    with pytest.raises(ValueError, match=r"gs://bucket/run in a bucket cannot hold; choose another tracker"):
        check_tracker("tensorboard", as_path(f"{bucket}/run"))
    assert open_tracker("", tmp_path, "small", {}) is None
