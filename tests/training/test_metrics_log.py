import json

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


TEXTS = [{"id": "doc@60", "text": 'It ends with "to".', "cosine": 0.5}]


def test_texts_are_cut_and_kept_like_metrics(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.cut("rl", -1)
    for step in (0, 4, 8):
        log.write_texts("rl", step, TEXTS)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"stage": "rl", "st')
    again = MetricsLog(tmp_path / "metrics.jsonl")
    again.cut("rl", 4)
    again.write_texts("rl", 8, [])
    assert again.history() == [
        {"stage": "rl", "step": 0, "rows": TEXTS},
        {"stage": "rl", "step": 4, "rows": TEXTS},
        {"stage": "rl", "step": 8, "rows": []},
    ]


def test_in_a_bucket_the_texts_before_a_checkpoint_outlive_a_kill(bucket):
    path = as_path(f"{bucket}/run/metrics.jsonl")
    log = MetricsLog(path)
    log.cut("rl", -1)
    log.write_texts("rl", 0, TEXTS)
    log.flush()  # as the loop does before it saves step 0
    log.write_texts("rl", 4, TEXTS)
    again = MetricsLog(path)
    again.cut("rl", 0)
    again.write_texts("rl", 4, TEXTS)
    assert [line["step"] for line in again.history()] == [0, 4]
    assert Bucket.objects["bucket/run/history.jsonl"].count(b"\n") == 2


class Shown:
    """A tracker that notes what it is told."""

    def __init__(self):
        self.told = []

    def metrics(self, stage, step, metrics):
        self.told.append((stage, step, dict(metrics)))

    def texts(self, stage, step, rows):
        self.told.append((stage, step, list(rows)))

    def close(self):
        self.told.append("closed")


def test_the_tracker_is_opened_once_and_told_every_row(tmp_path):
    opened = []

    def open_tracker():
        opened.append(Shown())
        return opened[-1]

    log = MetricsLog(tmp_path / "metrics.jsonl", open_tracker=open_tracker)
    log.cut("rl", -1)
    assert log.rows() == [] and not opened
    log.open()
    log.write("rl", 0, {"loss": 1.0})
    log.write_texts("rl", 0, TEXTS)
    log.close()
    log.close()
    assert [tracker.told for tracker in opened] == [[("rl", 0, {"loss": 1.0}), ("rl", 0, TEXTS), "closed"]]
    log.write("rl", 1, {"loss": 0.5})
    assert len(opened) == 2
