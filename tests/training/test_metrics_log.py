import json

from nla_jax.training.metrics_log import MetricsLog


def test_cut_drops_only_later_rows_of_the_stage(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(4):
        log.write("ar_sft", step, {"loss": step / 2})
    log.write("rl", 1, {"loss": 9.0})
    log.cut("ar_sft", 1)
    assert log.rows() == [
        {"stage": "ar_sft", "step": 0, "loss": 0.0},
        {"stage": "ar_sft", "step": 1, "loss": 0.5},
        {"stage": "rl", "step": 1, "loss": 9.0},
    ]


def test_line_torn_by_a_kill_is_cut_away(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("rl", 1, {"loss": 1.0})
    with log.path.open("a") as file:
        file.write('{"stage": "rl", "st')
    log.cut("rl", 1)
    log.write("rl", 2, {"loss": 2.0})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]


def test_tensorboard_without_its_package_names_it(tmp_path, monkeypatch):
    import sys

    import pytest

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboardX"):
        MetricsLog(tmp_path / "metrics.jsonl", tensorboard=tmp_path)
