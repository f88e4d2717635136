"""Checkpoints of the reference here, and ours there, against torch code written from the format's description."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference_models import LAYER, SCALE, ar_prediction, av_log_probs, write_reference_pair

from nla_jax.autoencoder.prompts import encode_reconstructor
from nla_jax.interop.model_directories import (
    export_reconstructor,
    export_verbalizer,
    load_reconstructor,
    load_verbalizer,
)

TEXTS = ["a list of functions (in Python)", "x", "how to parse a string.\nThen more"]
ACTIVATIONS = 30 * np.random.default_rng(0).standard_normal((2, 24)).astype(np.float32)
SPELLINGS = {"llama": "release", "qwen2": "training", "gemma3": "release"}


@pytest.fixture(scope="module", params=SPELLINGS)
def pair(request, tmp_path_factory):
    """Directories of an AV and an AR."""
    folder = tmp_path_factory.mktemp(request.param)
    return write_reference_pair(folder, request.param, spelling=SPELLINGS[request.param])


@pytest.fixture(scope="module")
def loaded(pair):
    return load_verbalizer(pair[0]), load_reconstructor(pair[1])


def log_probs(av, answers):
    """Ours, one answer an activation."""
    lengths = np.array([len(ids) for ids in answers])
    padded = np.zeros((len(answers), lengths.max()), np.int32)
    for row, ids in zip(padded, answers, strict=True):
        row[: len(ids)] = ids
    statistics = jax.jit(av.verbalizer.statistics)(av.params, ACTIVATIONS, padded, lengths)
    return [np.asarray(row[:n]) for row, n in zip(statistics.log_prob, lengths, strict=True)]


def test_the_av_reads_activations_as_the_reference_does(pair, loaded):
    av = loaded[0]
    answers = [av.tokenizer.encode(f"{text}\n</explanation>", add_special_tokens=False) for text in TEXTS[:2]]
    for h, answer, ours in zip(ACTIVATIONS, answers, log_probs(av, answers), strict=True):
        expected = av_log_probs(pair[0], torch.tensor(h), answer, "<explanation>\n")
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert (av.verbalizer.scale, av.verbalizer.injection.layer) == (SCALE, -1)


def predictions(ar, texts):
    ids, lengths = encode_reconstructor(ar.tokenizer, ar.reconstructor.prompt, texts, 48)
    return np.asarray(jax.jit(ar.reconstructor.__call__)(ar.params, jnp.asarray(ids), jnp.asarray(lengths)))


def test_the_ar_rebuilds_what_the_references_does(pair, loaded):
    for ours, text in zip(predictions(loaded[1], TEXTS), TEXTS, strict=True):
        expected = ar_prediction(pair[1], text).numpy()
        assert np.linalg.norm(ours - expected) < 1e-4 * np.linalg.norm(expected)


def test_answers_end_at_the_tag_whatever_stands_before_it(loaded):
    """Tokenizers merge a full stop with the line break after it, so the break cannot be part of the closing."""
    prompt, tokenizer = loaded[0].verbalizer.prompt, loaded[0].tokenizer
    for text in TEXTS:
        answer = tokenizer.encode(f"{text}\n</explanation>", add_special_tokens=False)
        assert tuple(answer[-len(prompt.closing) :]) == prompt.closing


def test_export_is_read_by_both(pair, loaded, tmp_path):
    """The exported models are the imported ones, for us and for the reference."""
    av, ar = loaded
    notes = export_verbalizer(
        av.verbalizer, av.params, av.tokenizer, av.meta.templates, tmp_path / "av", layer=LAYER
    )
    assert len(notes) == 1 and "append it there" in notes[0]
    export_reconstructor(
        ar.reconstructor, ar.params, ar.tokenizer, ar.meta.templates, tmp_path / "ar", tokens=ar.meta.tokens
    )
    again = load_verbalizer(tmp_path / "av"), load_reconstructor(tmp_path / "ar")
    for ours, before in zip(again, loaded, strict=True):
        assert ours[0] == before[0]
        jax.tree.map(np.testing.assert_array_equal, ours.params, before.params)
    answer = av.tokenizer.encode(TEXTS[0], add_special_tokens=False)
    arguments = torch.tensor(ACTIVATIONS[0]), answer, "<explanation>\n"
    torch.testing.assert_close(
        av_log_probs(tmp_path / "av", *arguments), av_log_probs(pair[0], *arguments), rtol=0, atol=0
    )
    torch.testing.assert_close(
        ar_prediction(tmp_path / "ar", TEXTS[0]), ar_prediction(pair[1], TEXTS[0]), rtol=0, atol=0
    )
