import dataclasses

import pytest

from nla_jax.pipeline.train import _warn_of_short_prompts
from nla_jax.training.joint import RLConfig


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
