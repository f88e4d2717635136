import dataclasses

import jax
import numpy as np
import pytest

from nla_jax.autoencoder.round_trip import RoundTrip
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.evaluation.suites.degeneracy import sampled_tokens
from nla_jax.pipeline.load import load
from nla_jax.pipeline.subject import subject_of, subject_of_nla


@pytest.fixture(params=["run", "models without a run"])
def subject(request, untrained_run, untrained_export, tiny_model_dir):
    if request.param == "run":
        return subject_of(untrained_run)
    nla = load(untrained_export, target=str(tiny_model_dir), quiet=True)
    return subject_of_nla(nla, untrained_run.data("held_out"), EvaluationConfig())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_are_sampled_as_the_texts_are(subject, temperature, monkeypatch):
    asked = []

    def sampled(answer):
        def sample(self, params, activations_ND, key, temperature, desc=None):
            words = np.asarray(jax.random.key_data(key)).tolist()
            asked.append((words, temperature, activations_ND.tolist()))
            return [answer] * len(activations_ND)

        return sample

    monkeypatch.setattr(RoundTrip, "verbalize", sampled("a text"))
    monkeypatch.setattr(RoundTrip, "answers", sampled([1, 2]))
    subject = dataclasses.replace(
        subject, config=dataclasses.replace(subject.config, temperature=temperature)
    )
    subject.texts()
    sampled_tokens(subject)
    assert len(asked) == 2 and asked[0] == asked[1] and asked[0][1] == temperature
