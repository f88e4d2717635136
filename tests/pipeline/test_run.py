import dataclasses
import gc
import weakref

import jax
import numpy as np
import pytest
from untrained_nla import write_untrained_run

from nla_jax.data.manifest import Manifest
from nla_jax.data.splits import monitor_documents
from nla_jax.pipeline import digests
from nla_jax.pipeline.export import trained_step
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.subject import subject_of


def test_figures_are_of_other_documents_than_those_that_choose_steps(untrained_run):
    run, everything = untrained_run, untrained_run.data("held_out")
    chooses = monitor_documents(everything.doc_ids, run.config.seed)
    assert set(run.monitored(1000).doc_ids) == chooses
    assert set(run.held_out(1000).doc_ids) == set(everything.doc_ids) - chooses
    assert len(run.monitored(1000)) + len(run.held_out(1000)) == len(everything)
    assert set(subject_of(run).data.doc_ids).isdisjoint(chooses)


def test_fewer_rows_of_a_part_are_among_more(untrained_run):
    (one,), several = untrained_run.held_out(1).doc_ids, untrained_run.held_out(2).doc_ids
    assert len(several) == 2 and one in several


def test_how_held_out_documents_are_divided_is_part_of_what_identifies_figures(untrained_run, monkeypatch):
    def both():
        return [digests.stage_digest(untrained_run.config, stage) for stage in ("rl", "evaluate")]

    rl, evaluate = both()
    monkeypatch.setattr(digests, "MONITOR_SHARE", 0.5)
    assert both()[0] == rl and both()[1] != evaluate


@pytest.fixture
def run(tiny_model_dir, tmp_path):
    return write_untrained_run(tiny_model_dir, tmp_path)


def save_steps(run: Run, stage: str, pinned: int) -> None:
    """Write steps 0, 2 and 4 of an AV whose embedding holds its step, and pin one."""
    for step in (0, 2, 4):
        params = {"lm": {"embed": {"embedding": jax.numpy.full((8, 2), step, jax.numpy.float32)}}}
        run.checkpoints(stage).save(step, {"av": {"params": params}}, {}, pin=step == pinned)


@pytest.mark.parametrize("pinned", [0, 2])
def test_whoever_reads_a_warm_start_reads_its_best_step(run, pinned):
    save_steps(run, "av_sft", pinned)
    params = run.models.warm_start_params("av")
    np.testing.assert_array_equal(params["lm"]["embed"]["embedding"], pinned)
    assert run.kept_steps() == {"av_sft": pinned, "rl": 3}


def test_joint_training_that_only_lost_counts_as_its_round_0(run):
    config = dataclasses.replace(run.config, seed=1)  # Another run in the same place, whose folder is empty.
    other = Run(config, run.directory / "other")
    save_steps(other, "rl", pinned=0)
    assert other.best_step() == 0 and trained_step(other, "rl", None) == 0
    params = other.models.model_params("rl", "av")
    np.testing.assert_array_equal(params["lm"]["embed"]["embedding"], 0)
    assert trained_step(other, "rl", 4) == 4


def test_second_judges_of_other_lengths_lie_beside_each_other(run):
    def of_length(steps):
        evaluation = dataclasses.replace(run.config.evaluation, second_judge_steps=steps)
        return Run(dataclasses.replace(run.config, evaluation=evaluation), run.directory)

    save_steps(of_length(4), "second_judge", pinned=2)
    assert of_length(4).kept_steps()["second_judge"] == 2
    # A longer one does not go on from it, a shorter one is not taken for trained, and none is measured unasked.
    assert of_length(400).checkpoints("second_judge").latest() is None
    assert of_length(2).checkpoints("second_judge").latest() is None
    assert "second_judge" not in of_length(0).kept_steps()


def test_a_run_keeps_splits_open_and_no_rows_of_theirs(run):
    rows = weakref.ref(run.data("av_sft").activations)
    assert run.open("av_sft") is run.open("av_sft")
    gc.collect()
    assert rows() is None


def test_a_data_set_of_another_config_is_refused_whether_it_has_a_manifest_or_not(run):
    folder = run.split_folders()["rl"]
    assert run.is_complete(folder, "set") and not run.is_complete(run.directory / "nowhere", "set")
    Manifest.of(folder).save(folder)
    assert run.is_complete(folder, "set")
    with pytest.raises(
        ValueError, match=r"rl was written with another config \(digest set, this run has other\)"
    ):
        run.is_complete(folder, "other")
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"rl.parquet was written with another config \(digest set, this"):
        run.is_complete(folder, "other")
