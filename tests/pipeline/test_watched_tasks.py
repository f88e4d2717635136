import dataclasses

import numpy as np
import pytest

from nla_jax.pipeline import watched_tasks
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.watched_tasks import ASKED, TAUGHT, WatchedTasks, chosen_tasks


def watching(run, directory, *names):
    evaluation = dataclasses.replace(run.config.evaluation, monitor_tasks=names)
    return Run(dataclasses.replace(run.config, evaluation=evaluation), directory)


def test_words_tell_a_task_that_texts_speak_of_and_not_another():
    labels = tuple(("past", "future")[i % 2] for i in range(ASKED + TAUGHT))
    told = WatchedTasks((labels, labels), np.zeros((2 * (ASKED + TAUGHT), 2), np.float32))
    spoken = [f"It tells of the {label}." for label in labels]
    silent = ["It tells of something."] * len(labels)
    # One task is told always; of the other the probe gives the same label always, which half of the texts have.
    assert told.figures(spoken + silent) == {"text_probe": 0.75, "text_probe_chance": 0.5}
    assert told.figures([None] * (2 * len(labels)))["text_probe"] == 0.5


def test_tasks_that_there_are_not_are_refused_with_those_that_there_are(untrained_run, tmp_path):
    assert chosen_tasks(untrained_run) == []
    for name in ("tenses", "hint followed"):
        with pytest.raises(ValueError, match=rf"monitor_tasks names '{name}'; with .* 'language', 'tense'"):
            chosen_tasks(watching(untrained_run, tmp_path, "tense", name))


def test_activations_of_planted_texts_are_read_once(untrained_run, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    run = watching(untrained_run, tmp_path, "sentiment", "tense")
    first = watched_tasks.watched_tasks(run)
    assert (
        first.activations_ND.shape == (2 * (ASKED + TAUGHT), 32) and np.isfinite(first.activations_ND).all()
    )
    assert [set(labels) for labels in first.labels] == [{"likes", "dislikes"}, {"past", "present", "future"}]
    monkeypatch.setattr(watched_tasks, "target_of", lambda run: pytest.fail("the target was read again"))
    again = watched_tasks.watched_tasks(watching(untrained_run, tmp_path, "sentiment", "tense"))
    assert np.array_equal(again.activations_ND, first.activations_ND) and again.labels == first.labels
    with pytest.raises(pytest.fail.Exception):  # Other texts are read anew.
        watched_tasks.watched_tasks(watching(untrained_run, tmp_path, "tense"))
