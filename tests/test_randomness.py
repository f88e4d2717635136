import jax
import numpy as np

from nla_jax.randomness import key_for


def test_every_letter_of_a_purpose_and_the_seed_decide_the_key():
    asked = [(0, "monitor"), (0, "monitored"), (0, "monitor 2"), (0, "moni"), (1, "monitor"), (0, "")]
    keys = np.array([jax.random.key_data(key_for(seed, purpose)) for seed, purpose in asked])
    assert len(np.unique(keys, axis=0)) == len(asked)
    assert key_for(0, "monitor") == key_for(0, "monitor")
