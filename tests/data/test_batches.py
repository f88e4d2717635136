import dataclasses
import json

import numpy as np
import pytest

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.prompts import (
    PromptTemplates,
    build_reconstructor_prompt,
    build_verbalizer_prompt,
)
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import InjectionConfig, Verbalizer
from nla_jax.data import batches as batches_module
from nla_jax.data.batches import (
    cut_texts,
    evaluation_batches,
    place_weights,
    reconstructor_rows,
    training_batches,
)

ROWS = {"x": np.arange(10), "y": np.arange(20).reshape(10, 2)}


def test_every_epoch_shows_every_row_once_in_a_new_order():
    batches = training_batches(ROWS, 5, seed=0)
    seen = [next(batches) for _ in range(4)]
    first, second = (np.concatenate([batch["x"] for batch in part]) for part in (seen[:2], seen[2:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    for batch in seen:
        np.testing.assert_array_equal(batch["y"], ROWS["y"][batch["x"]])


def test_processes_make_up_their_own_rows_of_the_same_batches():
    whole, first, second = (
        training_batches(ROWS, 4, 3, own) for own in (None, np.arange(2), np.arange(2, 4))
    )
    for _ in range(6):
        expected, parts = next(whole), [next(first), next(second)]
        assert [len(part["x"]) for part in parts] == [2, 2]
        for name, column in expected.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), column)
    # A place is the same in all of them: a run may go on with another number of processes.
    assert first.get_state() == second.get_state() == whole.get_state()


def test_place_survives_json():
    batches = training_batches(ROWS, 3, seed=1)
    for _ in range(4):
        next(batches)
    state = json.dumps(batches.get_state())
    expected = [next(batches)["x"].tolist() for _ in range(5)]
    resumed = training_batches(ROWS, 3, seed=1)
    resumed.set_state(json.loads(state))
    assert [next(resumed)["x"].tolist() for _ in range(5)] == expected


class Numbers:
    """A row source whose rows are their numbers."""

    def __init__(self, sizes):
        self.sizes = np.array(sizes)

    def __len__(self):
        return int(self.sizes.sum())

    def chunk_sizes(self):
        return self.sizes

    def batch(self, index_B):
        return {"x": index_B}


def test_rows_on_disk_that_fit_a_window_come_in_the_order_of_rows_in_memory():
    memory, disk = training_batches(ROWS, 3, 1), training_batches(Numbers([4, 4, 2]), 3, 1)
    for _ in range(12):
        assert next(memory)["x"].tolist() == next(disk)["x"].tolist()
    assert memory.get_state() == disk.get_state()


def test_more_rows_than_a_window_are_mixed_within_windows_of_shuffled_chunks(monkeypatch):
    monkeypatch.setattr(batches_module, "WINDOW_ROWS", 40)
    sizes = [8, 5, 8, 8, 3, 8, 8, 8, 1, 8, 8, 8, 8, 8, 3]
    chunk_of = np.repeat(np.arange(len(sizes)), sizes)
    draw = training_batches(Numbers(sizes), 10, seed=4)
    seen = [next(draw)["x"] for _ in range(20)]
    epochs = np.split(np.concatenate(seen), 2)
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
        chunks = chunk_of[epoch]
        for chunk in range(len(sizes)):
            places = np.flatnonzero(chunks == chunk)
            # Together in one window, which no chunk makes longer than by its own length.
            assert places.max() - places.min() < 40 + 8
        assert (np.diff(chunks[:40]) != 0).mean() > 0.5  # and mixed with others in it
    assert list(epochs[0]) != list(epochs[1])
    assert len({*chunk_of[epochs[0][:30]]} - {*range(5)}) > 1  # The first window is not of the first chunks.

    again = training_batches(Numbers(sizes), 10, seed=4)
    again.set_state({"next_index": 13})
    assert [next(again)["x"].tolist() for _ in range(7)] == [index.tolist() for index in seen[13:]]
    parts = [training_batches(Numbers(sizes), 10, 4, own) for own in (np.arange(4), np.arange(4, 10))]
    assert np.concatenate([next(part)["x"] for part in parts]).tolist() == seen[0].tolist()
    assert next(training_batches(Numbers(sizes), 10, seed=5))["x"].tolist() != seen[0].tolist()


def test_too_few_rows_are_named():
    with pytest.raises(ValueError, match="10 rows do not fill a batch of 11"):
        training_batches(ROWS, 11, seed=0)


def test_evaluation_batches_hold_every_row_and_say_how_many_are_real():
    batches = evaluation_batches(ROWS, 4)
    assert [real for _, real in batches] == [4, 4, 2]
    assert all(len(batch["x"]) == 4 for batch, _ in batches)
    np.testing.assert_array_equal(
        np.concatenate([batch["x"][:real] for batch, real in batches]), np.arange(10)
    )


def test_failed_explanations_have_no_weight(tiny_lm):
    templates = PromptTemplates()
    reconstructor = Reconstructor(
        tiny_lm.config.truncated(0), build_reconstructor_prompt(tiny_lm.tokenizer, templates)
    )
    verbalizer = Verbalizer(
        tiny_lm.config, build_verbalizer_prompt(tiny_lm.tokenizer, templates), InjectionConfig(), 1.0
    )
    autoencoder = Autoencoder(tiny_lm.tokenizer, verbalizer, reconstructor, 8, 64)
    rows = reconstructor_rows(autoencoder, np.ones((2, 32), np.float32), ["a text", None])
    assert rows["weights_B"].tolist() == [1.0, 0.0]
    assert rows["lengths_B"][0] > rows["lengths_B"][1] > 0
    weights = np.array([0.5, 3.0], np.float32)
    rows = reconstructor_rows(autoencoder, np.ones((2, 32), np.float32), ["a text", None], weights)
    assert rows["weights_B"].tolist() == [0.5, 0.0]


def test_texts_are_cut_after_whole_tokens(tiny_lm):
    text = "a list of functions"
    spans = tiny_lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    count = len(spans)
    texts = [text, text, text, None, "", text]
    found = cut_texts(tiny_lm.tokenizer, texts, np.array([count, count - 1, 2, 2, 2, count + 5]))
    assert found == [text, text[: spans[-2][1]].rstrip(), text[: spans[1][1]].rstrip(), None, "", text]
    assert text.startswith(found[2]) and 0 < len(found[2]) < len(found[1]) < len(text)


def test_rows_count_by_the_share_of_their_place_s_spread(untrained_run, monkeypatch):
    yardstick = untrained_run.yardstick
    close = dataclasses.replace(yardstick, spread=yardstick.spread / 4)
    same = dataclasses.replace(yardstick, spread=0.0)
    by_place = dataclasses.replace(yardstick, places={"answer_start": close, "line_end": same})
    data = untrained_run.open("rl")
    monkeypatch.setattr(
        type(data), "scan", lambda self, name: [(["inside", "answer_start"],), (["line_end", None],)]
    )
    # One, four, one (no spread) and one (unknown), over their mean of 7/4.
    np.testing.assert_allclose(place_weights(data, by_place), np.array([1, 4, 1, 1]) / 1.75, rtol=1e-6)
    assert place_weights(data, yardstick).tolist() == [1, 1, 1, 1]
