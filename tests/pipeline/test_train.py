import dataclasses

import pytest

from nla_jax.config import WarmStartConfig
from nla_jax.pipeline.train import _warn_of_short_prompts
from nla_jax.training.joint import RLConfig
from nla_jax.training.loop import LoopConfig


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


def test_batches_that_cannot_be_cut_are_refused_before_anything_is_trained():
    loop = LoopConfig(steps=1, evaluate_every=1, checkpoint_every=1)
    with pytest.raises(ValueError, match="micro_batches=3 does not divide activations=8; use a divisor of 8"):
        RLConfig(micro_batches=3)
    with pytest.raises(ValueError, match="micro_batches=0 does not divide batch_size=16"):
        WarmStartConfig(loop, micro_batches=0)
    with pytest.raises(ValueError, match="length_buckets=0; expected 1, which keeps all padding, or more"):
        WarmStartConfig(loop, length_buckets=0)
