import copy
import dataclasses

import numpy as np
import pytest

from nla_jax.data.corpora.documents import Document
from nla_jax.data.writers.config import WriterConfig
from nla_jax.lm.chat_template import render_chat
from nla_jax.pipeline import planted_texts
from nla_jax.pipeline.planted_texts import writer_of_documents
from nla_jax.pipeline.subject import subject_of


def test_the_runs_writer_writes_about_the_last_token_of_each_document(untrained_run, monkeypatch):
    subject, seen = subject_of(untrained_run), []
    chat = render_chat(subject.target.tokenizer, "Who lives in the old house?")
    documents = [
        Document("a", "The ship left the harbor.", "text"),
        Document("b", chat, "chat", ({"role": "user", "content": "Who lives in the old house?"},)),
    ]

    class Writer:
        def explain(self, rows):
            seen.append(rows)
            return rows.doc_ids

    monkeypatch.setattr(planted_texts, "writer_of", lambda run: Writer())
    assert subject.write(documents) == ["a", "b"]
    (rows,) = seen
    assert rows.contexts == [documents[0].text, chat]
    assert rows.extra["place"] == ["sentence_end", "answer_start"] and rows.extra["role"] == [
        None,
        "assistant",
    ]
    assert all(len(words) > 0 for words in rows.extra["next_words"])
    there = subject.target.activations(rows.contexts)[:, 0]
    np.testing.assert_allclose(rows.activations, there, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["chat", "column"])
def test_a_writer_that_asks_a_model_or_reads_a_column_is_left_alone(untrained_run, name):
    config = dataclasses.replace(untrained_run.config, writer=WriterConfig(name=name))
    run = copy.copy(untrained_run)
    run.config = config
    sidecar = untrained_run.data("held_out").sidecar
    assert writer_of_documents(run, lambda: pytest.fail("loaded"), sidecar) is None
