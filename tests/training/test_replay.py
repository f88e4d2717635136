import json

import numpy as np
import pytest

from nla_jax.data.batches import StoredActivations, reconstructor_rows, training_batches
from nla_jax.training.replay import Replay

WEIGHTS = np.array([0.5, 1.0, 1.5, 2.0], np.float32)


@pytest.fixture
def make(untrained_run):
    """Makes replays of two rounds of four rows, with batches of four of which two are the writer's, and its codec."""
    codec, data = untrained_run.models.autoencoder, untrained_run.open("rl")
    written = reconstructor_rows(
        codec, np.eye(6, 32, dtype=np.float32), [f"the writer's {i}" for i in range(6)]
    )

    def replay() -> Replay:
        return Replay(
            codec,
            StoredActivations(data, WEIGHTS),
            rounds=2,
            batch_size=4,
            writer=training_batches(written, 2, seed=0),
            writer_rows=2,
        )

    return codec, data.activations(np.arange(4)), replay


def read(codec, rows) -> list[str]:
    return [
        codec.tokenizer.decode(ids[:length])
        for ids, length in zip(rows["prompts_BT"], rows["lengths_B"], strict=True)
    ]


def test_a_batch_holds_texts_of_the_newest_rounds_beside_their_own_activations_and_then_the_writers(make):
    codec, activations_ND, replay = make
    held = replay()
    held.add(np.array([0, 1]), ["row 0 old", "row 0 older", "row 1 old", "row 1 older"])
    held.add(np.array([3, 2]), ["row 3 is a text", "row 3 too", None, "row 2 is a text"])
    held.add(np.array([1, 3]), ["row 1 anew", "row 1 also", "row 3 anew", "row 3 also"])
    seen = {}
    for update in range(60):
        rows = held.batch(7, update)
        texts = read(codec, rows)
        assert len(texts) == 4 and all("writer" in text for text in texts[2:])
        assert rows["weights_B"][2:].tolist() == [1, 1]
        for place in range(2):
            row = int(np.flatnonzero((activations_ND == rows["activations_BD"][place]).all(axis=1))[0])
            weight = float(rows["weights_B"][place])
            # What failed is drawn like the others, with no weight.
            assert weight == (WEIGHTS[row] if f"row {row}" in texts[place] else 0)
            seen.setdefault(row, set()).add(texts[place])
    # Seven texts that can be read and the one that failed; none of the first round.
    assert sum(map(len, seen.values())) == 8 and seen.keys() == {1, 2, 3}
    assert not any("old" in text for texts in seen.values() for text in texts)


def test_a_replay_that_goes_on_draws_what_it_would_have_drawn(make):
    _, _, replay = make
    held = replay()
    held.add(np.array([0, 1]), ["a", "b", None, "d"])
    held.batch(7, 0)
    saved = json.loads(json.dumps(held.saved()))
    again = replay()
    again.add(np.array([2, 3]), ["forgotten"] * 4)
    again.restore(saved)
    for one in (held, again):
        one.add(np.array([3, 2]), ["e", "f", "g", "h"])
    for update in range(1, 5):
        left, right = held.batch(7, update), again.batch(7, update)
        for name, column in left.items():
            np.testing.assert_array_equal(column, right[name])
