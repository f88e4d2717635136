import json

import pytest
from bucket import Bucket

from nla_jax.files import as_path
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


def test_in_a_bucket_the_rows_before_a_checkpoint_outlive_a_kill(bucket):
    path = as_path(f"{bucket}/run/metrics.jsonl")
    log = MetricsLog(path)
    log.cut("rl", -1)
    log.write("rl", 1, {"loss": 1.0})
    log.flush()  # as the loop does before it saves step 1
    log.write("rl", 2, {"loss": 2.0})
    again = MetricsLog(path)  # another process, after a kill
    assert [row["step"] for row in again.rows()] == [1]
    again.cut("rl", 1)
    again.write("rl", 2, {"loss": 2.0})
    assert [row["step"] for row in again.rows()] == [1, 2]
    assert [json.loads(line)["step"] for line in Bucket.objects["bucket/run/metrics.jsonl"].splitlines()] == [
        1,
        2,
    ]


def test_tensorboard_in_a_bucket_is_refused(bucket):
    run = as_path(f"{bucket}/run")
    with pytest.raises(
        ValueError, match=r"gs://bucket/run/tensorboard in a bucket cannot hold; leave it out"
    ):
        MetricsLog(run / "metrics.jsonl", tensorboard=run / "tensorboard")
