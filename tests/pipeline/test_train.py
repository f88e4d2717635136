import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from untrained_nla import write_untrained_run

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.config import DistillConfig, ReconstructorWarmStartConfig, WarmStartConfig
from nla_jax.data.dataset import load_dataset
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.pipeline.distill import best_explanations, best_of, distill
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.train import _warn_of_short_prompts, rl
from nla_jax.training.loop import LoopConfig
from nla_jax.training.round_programs import RLConfig, optimizers
from nla_jax.training.state import OptimizerConfig, TrainState


def test_answers_that_the_ar_cannot_read_to_their_end_are_told_before_joint_training(untrained_run, capsys):
    codec = untrained_run.models.autoencoder
    needed = 7 + len(codec.reconstructor.prompt.suffix)  # Eight tokens of an answer, one of them the closing.
    _warn_of_short_prompts(dataclasses.replace(codec, max_reconstructor_tokens=needed))
    assert capsys.readouterr().err == ""
    _warn_of_short_prompts(dataclasses.replace(codec, max_reconstructor_tokens=needed - 1))
    assert f"max_reconstructor_tokens={needed - 1}; raise it to {needed}" in capsys.readouterr().err


def test_a_group_of_one_is_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match=r"rl.group=1: advantages compare .* set --rl.group 4"):
        RLConfig(group=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ar_updates": 0}, "rl.ar_updates is 0; expected 1 at least"),
        ({"ar_updates": 2, "writer_share": 1.5}, "rl.writer_share is 1.5; expected a share"),
        ({"writer_share": 0.5}, "rl.ar_updates=1 makes none; set --rl.ar-updates 2"),
        ({"cut": (0, 4)}, r"rl.cut=\(0, 4\): expected the fewest and the most tokens"),
        ({"cut": (5, 4)}, "for instance --rl.cut 4 24"),
    ],
)
def test_options_of_joint_training_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RLConfig(**options)


def test_options_of_the_stages_before_it_that_make_no_sense_are_named():
    loop = LoopConfig(steps=1, evaluate_every=1, checkpoint_every=1)
    with pytest.raises(ValueError, match="--ar-sft.cut 4 24"):
        ReconstructorWarmStartConfig(loop, cut=(3, 2))
    with pytest.raises(ValueError, match="ar_sft.verbalized_samples is 0"):
        ReconstructorWarmStartConfig(loop, verbalized_samples=0)
    with pytest.raises(ValueError, match="distill.samples is 0; expected 1 at least"):
        DistillConfig(samples=0)


def test_the_ar_s_learning_rate_decays_over_rounds_however_many_updates_they_make():
    decaying = OptimizerConfig(learning_rate=1.0, warmup_steps=2, decay_steps=10, max_grad_norm=1e9)
    for updates in (1, 3):
        config = RLConfig(ar_updates=updates, av_optimizer=decaying, ar_optimizer=decaying)
        for name, per_round in (("av", 1), ("ar", updates)):
            optimizer, params = optimizers(config)[name], {"x": jnp.zeros(1)}
            state, sizes = optimizer.init(params), []
            for _ in range(12 * per_round):
                change, state = optimizer.update({"x": jnp.ones(1)}, state, params)
                sizes.append(float(jnp.abs(change["x"][0])))
            # Updates of equal gradients are as large as the rate.
            assert max(sizes) == pytest.approx(1.0, rel=1e-3)
            assert sizes[10 * per_round :] == pytest.approx([0.1] * 2 * per_round, rel=1e-2)
            assert sizes[5 * per_round] > 0.5


def test_batches_that_cannot_be_cut_are_refused_before_anything_is_trained():
    loop = LoopConfig(steps=1, evaluate_every=1, checkpoint_every=1)
    with pytest.raises(ValueError, match="micro_batches=3 does not divide activations=8; use a divisor of 8"):
        RLConfig(micro_batches=3)
    with pytest.raises(ValueError, match="micro_batches=0 does not divide batch_size=16"):
        WarmStartConfig(loop, micro_batches=0)
    with pytest.raises(ValueError, match="length_buckets=0; expected 1, which keeps all padding, or more"):
        WarmStartConfig(loop, length_buckets=0)


def test_the_best_of_each_row_s_texts_by_hand():
    best_N, kept_N = best_of(np.array([[0.5, 0.2, np.inf], [np.inf, np.inf, np.inf], [np.inf, 0.9, 0.8]]))
    assert best_N[kept_N].tolist() == [1, 8] and kept_N.tolist() == [True, False, True]


@pytest.fixture(scope="module")
def warm_started(tiny_model_dir, tmp_path_factory):
    """A run with untrained warm starts, whose joint training makes use of every option."""
    directory = tmp_path_factory.mktemp("options")
    run = write_untrained_run(tiny_model_dir, directory)
    shutil.rmtree(directory / "checkpoints")
    loop = LoopConfig(steps=3, evaluate_every=3, checkpoint_every=1, keep_checkpoints=3)
    config = dataclasses.replace(
        run.config,
        max_explanation_tokens=32,
        max_reconstructor_tokens=48,
        evaluation=EvaluationConfig(monitor_rows=4, batch_size=4),
        distill=DistillConfig(
            LoopConfig(steps=1, evaluate_every=1, checkpoint_every=1),
            batch_size=2,
            length_buckets=1,
            samples=3,
        ),
        rl=RLConfig(
            loop=loop,
            activations=2,
            group=2,
            length_buckets=1,
            ar_updates=2,
            replay_rounds=2,
            writer_share=0.5,
            cut=(1, 4),
            balance_places=True,
        ),
    )
    run = Run(config, directory)
    models, target = run.models.autoencoder, run.models.target.params
    for name, part in (("av", models.verbalizer), ("ar", models.reconstructor)):
        state = TrainState.create(part.init(target), optax.sgd(1.0))
        run.checkpoints(f"{name}_sft").save(1, {name: state}, {})
    return run


@pytest.fixture
def texts_differ(monkeypatch):
    """Random models say the same again and again, and close nothing; so their answers are read as other texts."""

    def decode(self, tokens_BT, lengths_B, closed_B):
        return [f"{row} of {len(tokens_BT)}, {ids[:3].tolist()}" for row, ids in enumerate(tokens_BT)]

    monkeypatch.setattr(Autoencoder, "decode", decode)


def test_an_av_whose_explanations_never_end_is_not_distilled(warm_started, monkeypatch):
    monkeypatch.setattr(Autoencoder, "decode", lambda self, tokens_BT, *_: [None] * len(tokens_BT))
    with pytest.raises(
        ValueError, match="none of the AV's explanations came to its end .* --distill.loop.steps 0"
    ):
        best_explanations(warm_started)
    shutil.rmtree(warm_started.directory / "data" / "distilled")


def test_every_option_together_and_a_run_that_goes_on_as_if_it_had_not_been_killed(
    warm_started, texts_differ, tmp_path, capsys
):
    distill(warm_started)
    distilled = load_dataset(warm_started.directory / "data" / "distilled")
    assert {*distilled.doc_ids} == {f"rl-{i}" for i in range(4)} and all(distilled.explanations)
    assert "distill: the best of 3 explanations have a mean error of" in capsys.readouterr().err
    assert warm_started.models.warm_start_stage("av") == "distill"
    rl(warm_started)
    assert "rl.balance_places weighs nothing" in capsys.readouterr().err

    def rows(run):
        found = [row for row in run.log.rows() if row["stage"] == "rl"]
        return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in found]

    expected = rows(warm_started)
    assert [row["step"] for row in expected] == [0, 1, 2, 3]
    assert all(row["failed_fraction"] == 0 and row["ar_replay_loss"] > 0 for row in expected[1:])
    shutil.copytree(warm_started.directory, tmp_path / "killed")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / "rl" / str(step))
    (tmp_path / "killed" / "checkpoints" / "rl" / "pinned").write_text("1")
    again = Run(warm_started.config, tmp_path / "killed")
    rl(again)
    assert rows(again) == expected
