import dataclasses

import numpy as np
import pytest

from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.data.writers.predictive import PredictiveConfig, PredictiveWriter
from nla_jax.data.writers.word_counts import WordCounts

CONTEXTS = [
    "the engine burns diesel while the diesel engine turns over",
    "the garden needs water while the garden sleeps in winter",
] * 20


def rows(contexts=CONTEXTS) -> ActivationDataset:
    n = len(contexts)
    extraction = Extraction("m", 2, 1, "c", CorpusSlice(0, n), 1)
    return ActivationDataset(
        activations=np.zeros((n, 2), np.float32),
        explanations=None,
        doc_ids=[f"d{i}" for i in range(n)],
        n_raw_tokens=np.full(n, 60),
        contexts=list(contexts),
        extra={"next_words": [["and", "then", "soon"]] * n, "genre": ["manuals"] * n},
        sidecar=Sidecar("x", "base", n, extraction),
    )


@pytest.fixture
def explainer() -> PredictiveWriter:
    config = PredictiveConfig(ending_words=2, ending_characters=14, next_words=2, topic_words=1)
    return PredictiveWriter(config, seed=0, words=WordCounts(CONTEXTS))


def test_texts_carry_ending_expectation_topic_and_source(explainer):
    for text, context in zip(explainer.explain(rows()), CONTEXTS, strict=True):
        engine = "engine" in context
        assert ('"turns over"' if engine else '"in winter"') in text
        assert "and, then" in text and "soon" not in text
        assert ("diesel" in text or "engine" in text) == engine
        assert "manuals" in text


@pytest.mark.parametrize("words", [1, 3])
def test_as_many_last_words_as_asked_for(words):
    config = PredictiveConfig(ending_words=words, ending_characters=40)
    texts = PredictiveWriter(config, seed=0, words=WordCounts(CONTEXTS)).explain(rows())
    for text, context in zip(texts, CONTEXTS, strict=True):
        assert f'"{" ".join(context.split()[-words:])}"' in text


def test_parts_are_left_out_on_request():
    data = rows()

    def texts(**change):
        config = PredictiveConfig(ending_words=1, **change)
        return " ".join(PredictiveWriter(config, seed=0, words=WordCounts(CONTEXTS)).explain(data))

    assert "manuals" in texts() and "diesel" in texts() and "then" in texts()
    assert "manuals" not in texts(source=False) and "diesel" in texts(source=False)
    assert "manuals" not in texts(topic_words=0) and "diesel" not in texts(topic_words=0)
    assert "then" not in texts(next_words=0)


def test_wording_and_order_vary_but_not_with_row_order(explainer):
    data = rows()
    texts = explainer.explain(data)
    assert len({text.split()[0] for text in texts}) >= 3
    assert explainer.explain(data.take(slice(None, None, -1))) == texts[::-1]


def test_long_last_word_is_cut_from_the_front(explainer):
    data = rows(["a word and " + "x" * 30])
    assert '"' + "x" * 14 + '"' in explainer.explain(data)[0]


def test_line_breaks_are_words_of_the_ending(explainer):
    assert '"end. newline"' in explainer.explain(rows(["some lines end. \n\n"]))[0]
    assert '"newline word"' in explainer.explain(rows(["some lines end.\n  word"]))[0]


def test_rows_without_expectation_are_refused(explainer):
    data = dataclasses.replace(rows(), extra={"genre": ["g"] * len(CONTEXTS)})
    with pytest.raises(
        ValueError, match=r"needs the columns \['next_words'\]; extract with extraction.next_words"
    ):
        explainer.explain(data)
