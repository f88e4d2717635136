"""The built-in writer with room: which statements a row gets, in which words, and within which length."""

import dataclasses

import numpy as np
import pytest

from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.data.writers.descriptive import (
    ORDERS,
    DescriptiveConfig,
    DescriptiveWriter,
    ablations,
    estimated_tokens,
)
from nla_jax.data.writers.statements import STATEMENTS
from nla_jax.data.writers.word_counts import WordCounts
from nla_jax.text_analysis import copied_ngrams, repeated_ngrams, share, words

PROSE = "The mayor of Atlanta praised the jury. Nobody had expected that the election would be so quiet"
REQUEST = (
    "<|im_start|>user\nPlease write a poem about a lighthouse in winter.<|im_end|>\n<|im_start|>assistant\n"
)
THINGS = (
    "lighthouse",
    "violin",
    "tractor",
    "harbor",
    "garden",
    "bakery",
    "library",
    "museum",
    "castle",
    "bridge",
)


def rows(contexts, **columns) -> ActivationDataset:
    n = len(contexts)
    return ActivationDataset(
        activations=np.zeros((n, 2), np.float32),
        explanations=None,
        doc_ids=[f"d{i}" for i in range(n)],
        n_raw_tokens=np.full(n, 60),
        contexts=list(contexts),
        extra={name: list(column) for name, column in columns.items()},
        sidecar=Sidecar("x", "base", n, Extraction("m", 2, 1, "c", CorpusSlice(0, n), 1)),
    )


def writer(seed=0, texts=(), **options) -> DescriptiveWriter:
    counts = WordCounts(texts, words)
    return DescriptiveWriter(DescriptiveConfig(**options), seed=seed, words=counts)


def written(context, seed=0, options=None, **columns) -> str:
    (text,) = writer(seed, [context], **options or {}).explain(
        rows([context], **{name: [value] for name, value in columns.items()})
    )
    return text


def test_inside_a_sentence_a_text_says_how_it_ends_and_what_comes_next():
    text = written(PROSE, place="inside", next_words=["that", "as"], next_probabilities=[0.93, 0.01])
    assert '"so quiet"' in text and "that" in text and "as" not in words(text)
    assert "surely" in text.lower() or "certain" in text.lower() or "no doubt" in text


def test_at_the_start_of_an_answer_a_text_says_what_is_asked_and_copies_no_three_words():
    columns = {"place": "answer_start", "role": "assistant", "turn": 1, "next_words": ["The", "In", "A"]}
    for seed in range(8):
        text = written(REQUEST, seed, **columns)
        assert {"poem", "lighthouse", "winter", "the", "in"} <= set(words(text)) and "Poem to write" in text
        assert '"' not in text and copied_ngrams(text, REQUEST)[0] == 0 and "im_start" not in text


def test_what_kind_of_text_is_about_what_is_one_sentence():
    columns = {"place": "answer_start", "role": "assistant", "turn": 1}
    texts = {written(REQUEST, seed, {"statements": ("kind", "topic")}, **columns) for seed in range(24)}
    assert len(texts) == 4 and all(text.count(".") == 1 for text in texts)
    assert {text.split(" lighthouse")[0] for text in texts} <= {
        f"Poem to write{joined}" for joined in (" on", ":", " about", " with")
    }


def test_at_the_end_of_a_sentence_a_text_is_about_that_sentence():
    context = "The mayor praised the jury. Two old fishermen repaired their boats on Sunday."
    text = written(context, place="sentence_end", next_words=["They"], next_probabilities=[0.3])
    assert {"fishermen", "boats", "sunday", "they"} <= set(words(text))
    assert "mayor" not in text or text.index("fishermen") < text.index("mayor")


def test_columns_may_be_missing():
    assert "so quiet" in written(PROSE)  # No place is known: the text tells that it stops inside a sentence.
    assert "jury" in written(PROSE.partition(" Nobody")[0]) and "Stops" not in written("A jury met.\n")
    assert written("") is None and written("   ") is None
    with pytest.raises(
        ValueError, match="needs the context of each row, the column detokenized_text_truncated"
    ):
        writer().explain(dataclasses.replace(rows([""]), contexts=None))


def test_rows_without_a_text_are_counted():
    some = writer()
    assert some.explain(rows(["", PROSE]))[0] is None
    assert some.report() == {
        "writer": "descriptive",
        "rows": 2,
        "written": 1,
        "left_out": 1,
        "asked_again": 0,
        "refused": {"nothing to say": 1},
    }
    assert some.prompts(rows([PROSE])) is None


def test_a_text_depends_on_its_row_and_the_seed_alone():
    data = rows([PROSE, REQUEST, "Call me.", PROSE + " and warm"] * 3)
    texts = writer(texts=data.contexts).explain(data)
    assert writer(texts=data.contexts).explain(data.take(slice(None, None, -1))) == texts[::-1]
    assert writer(1, texts=data.contexts).explain(data) != texts
    assert len({text.split()[0] for text in texts}) >= 4


def test_order_and_number_of_statements_are_bounded():
    columns = {"place": "sentence_end", "next_words": ["He", "She"], "genre": "news report"}
    context = "Perhaps the mayor of Atlanta will thank the old jury for its wonderful, splendid work!!"
    alone = written(context, options={"most_sentences": 1}, **columns)
    assert "jury" in alone and "news" not in alone.lower() and alone.count(".") == 1
    assert len(written(context, options={"most_sentences": 2}, **columns)) > len(alone)
    long, short = written(context, **columns), written(context, options={"most_tokens": 20}, **columns)
    assert estimated_tokens(short) <= 20 < estimated_tokens(long) <= 44


def test_only_statements_that_are_named_are_made():
    columns = {"place": "sentence_end", "next_words": ["He"], "genre": "news report"}
    context = "The mayor praised the jury."
    assert words(written(context, options={"statements": ("kind",)}, **columns))[-2:] == ["news", "report"]
    assert "jury" not in written(context, options={"statements": ("next",)}, **columns)
    assert written(context, options={"statements": ("speakers",)}, **columns) is None
    with pytest.raises(
        ValueError, match=r"statements names mood, and the statements are topic, next, ending"
    ):
        DescriptiveConfig(statements=("topic", "mood"))
    with pytest.raises(ValueError, match=r"statements is empty; name some of topic"):
        DescriptiveConfig(statements=())
    with pytest.raises(ValueError, match=r"writer\.descriptive\.most_tokens is 0, expected at least 1"):
        DescriptiveConfig(most_tokens=0)


def test_every_place_has_an_order_of_all_statements():
    assert all(sorted(order) == sorted(STATEMENTS) for order in ORDERS.values())


def test_texts_repeat_and_copy_little():
    contexts = [
        f"Our {thing} stood near the {other}. A stranger bought the {thing} because the {other} was too dear"
        for thing in THINGS
        for other in THINGS
        if thing != other
    ]
    expected = [[f"{thing}s", "and", "so"] for thing in THINGS for other in THINGS if thing != other]
    data = rows(contexts, next_words=expected, next_probabilities=[[0.2, 0.1, 0.05]] * len(contexts))
    texts = writer(texts=contexts).explain(data)
    assert share(map(repeated_ngrams, texts)) < 0.03
    assert share(copied_ngrams(text, context) for text, context in zip(texts, contexts, strict=True)) < 0.03


def test_ablations_leave_one_statement_out():
    config = DescriptiveConfig(("topic", "next"), topic_words=3)
    assert ablations(config) == {
        "all": config,
        "without topic": DescriptiveConfig(("next",), topic_words=3),
        "without next": DescriptiveConfig(("topic",), topic_words=3),
    }
    assert ablations(config, alone=True)["next alone"] == DescriptiveConfig(("next",), topic_words=3)
    assert [*ablations(DescriptiveConfig(("topic",)))] == ["all"]


def test_tokens_are_estimated_by_letters_and_marks():
    assert estimated_tokens("") == 0
    # One for `a`, two for `explanation` of eleven letters, one for the full stop, and one for each Chinese character.
    assert estimated_tokens("a explanation. 图书馆") == 1 + 2 + 1 + 3
