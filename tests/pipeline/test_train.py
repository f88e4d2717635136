import dataclasses

import jax.numpy as jnp
import pytest

from nla_jax.config import DistillConfig, ReconstructorWarmStartConfig, WarmStartConfig
from nla_jax.pipeline.train import _warn_of_short_prompts
from nla_jax.training.joint import RLConfig, optimizers
from nla_jax.training.loop import LoopConfig
from nla_jax.training.state import OptimizerConfig


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
