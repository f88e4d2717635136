import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save_file

from nla_jax.evaluation import dictionary_baseline as baseline
from nla_jax.evaluation.baselines import logit_lens_words
from nla_jax.evaluation.dictionaries import SparseDictionary, code_bits
from nla_jax.evaluation.dictionary_training import DictionaryConfig, train_dictionary
from nla_jax.evaluation.measure import measure_suites

FEATURES = 24


@pytest.fixture(scope="module")
def described(subject, tmp_path_factory):
    """The subject with a dictionary in a file, whose features are directions of training rows about their mean."""
    path = tmp_path_factory.mktemp("dictionary") / "small.safetensors"
    rows = subject.training.activations
    direction_FD = rows[:: len(rows) // FEATURES][:FEATURES] - rows.mean(axis=0)
    direction_FD /= np.linalg.norm(direction_FD, axis=1, keepdims=True)
    arrays = {"W_enc": direction_FD.T, "W_dec": direction_FD / 4, "b_dec": rows.mean(axis=0)}
    save_file({name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}, path)
    return dataclasses.replace(subject, config=dataclasses.replace(subject.config, dictionary=str(path)))


def test_without_a_dictionary_there_is_nothing(subject):
    assert baseline.dictionary_predictions(subject) == [] == baseline.dictionary_tables(subject)


def test_words_and_codes_of_held_out_rows(described):
    words, *codes = baseline.dictionary_predictions(described)[1:]
    assert (words.name, words.ar) == (baseline.WORDS, described.judge)
    assert [code.name for code in codes] == [baseline.CODE, baseline.NAMED_CODE]
    whole, named = (described.line(code).figures for code in codes)
    assert named["features"].estimate().value <= 4 < whole["features"].estimate().value
    assert named["bits"].estimate().value < whole["bits"].estimate().value
    active_N = (baseline._baseline(described).strength_NF > 0).sum(axis=1)
    np.testing.assert_allclose(
        whole["bits"].estimate().value, code_bits(active_N, FEATURES, baseline.STRENGTH_BITS).mean()
    )


def test_the_better_names_are_taken(described):
    made = baseline._baseline(described)
    assert list(made.texts) == ["what features unembed to", "where features are strongest"]
    values = {name: figure.estimate().value for name, figure in made.naming_figures.items()}
    assert made.best_texts == made.texts[max(values, key=values.get)]
    (table,) = baseline.dictionary_tables(described)
    shown = {row.name: row.figures for row in table.rows}
    for name, value in values.items():
        np.testing.assert_allclose(shown[f"words: {name}"]["on training rows"].value, value)


def test_names_come_from_rows_that_do_not_choose(described):
    made = baseline._baseline(described)
    assert len(made.chosen_by) == described.config.rows
    naming = set(described.training.contexts[described.config.rows :])
    ends = {baseline.last_word(context) for context in naming}
    texts = made.texts["where features are strongest"]
    assert {word for text in texts for name in text[:-1].split("; ") for word in name.split(", ")} <= ends


def test_a_feature_is_named_by_what_it_unembeds_to(described):
    made = baseline._baseline(described)
    strongest = made.strength_NF[0].argmax()
    (words,) = logit_lens_words(described.target, made.dictionary.decode_FD[[strongest]], 3)
    assert made.texts["what features unembed to"][0].split("; ")[0] == ", ".join(words)


def test_without_training_rows_there_are_words_alone(described):
    alone = dataclasses.replace(described, training=None)
    predictions = baseline.dictionary_predictions(alone)
    assert {prediction.name for prediction in predictions} == {baseline.WORDS}
    assert list(baseline._baseline(alone).texts) == ["what features unembed to"]


def test_rows_in_which_features_are_strongest(monkeypatch):
    monkeypatch.setattr("nla_jax.evaluation.dictionaries.STRENGTHS_AT_ONCE", 6)
    eye, zero = np.eye(3, dtype=np.float32), np.zeros(3, np.float32)
    dictionary = SparseDictionary(eye, zero, eye, zero, "by hand")
    rows = np.float32([[1, 0, 0], [3, 0, 0], [0, 0, -1], [2, 5, 0], [0, 6, -2]])
    found = baseline.strongest_rows(dictionary, rows, np.array([0, 1, 2]), 2)
    assert found == {0: [1, 3], 1: [4, 3], 2: []}


def test_last_words():
    assert [baseline.last_word(text) for text in ("He said so", "so.", "(it) ...\n", " ", "l'été")] == [
        "so",
        ".",
        "...",
        "",
        "été",
    ]


def test_a_dictionary_that_is_not_there_stops_before_anything_is_measured(described, tmp_path):
    config = dataclasses.replace(described.config, dictionary=str(tmp_path / "none.safetensors"))
    wrong = dataclasses.replace(described, config=config)
    with pytest.raises(FileNotFoundError, match="none.safetensors does not exist"):
        measure_suites(wrong, ["reconstruction", "controls"], tmp_path / "out", "digest")
    assert not list((tmp_path / "out").iterdir())


def test_a_trained_dictionary_says_more_with_more_features(subject):
    config = DictionaryConfig(width=2, k=8, steps=60, batch_size=64, learning_rate=3e-3)
    dictionary, _ = train_dictionary(subject.training.activations, config, seed=0, source="here")
    made = baseline.DictionaryBaseline(subject, dictionary)
    whole, named = (subject.line(code).figures["fve_nrm"].estimate().value for code in made.codes())
    assert whole > named and whole > 0.3
    # Norms are no part of a code of normalized activations.
    assert subject.line(made.whole()).figures["fve"] is None
