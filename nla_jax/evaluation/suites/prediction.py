"""Prediction tasks: can somebody who reads only the explanation answer questions about the text?

The target LM predicts by the log-likelihood of each answer after the explanation, minus that without any. A chat model,
where there is one, predicts by naming a letter. Beside each figure stand chance, a guess from the answers alone, notes
about another text, the whole context, probes on the activation and on the words, and the length of the text alone.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from nla_jax.data.splits import shuffled
from nla_jax.data.writers.predictive import PredictiveConfig, PredictiveWriter
from nla_jax.data.writers.word_counts import WordCounts
from nla_jax.evaluation import continuations, questions
from nla_jax.evaluation.continuations import Continuation
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.predictors import by_chat_model, by_target_lm, who_answered
from nla_jax.evaluation.subject import Subject
from nla_jax.evaluation.tables import Row, Table

CHOICES = 10


def measure(subject: Subject) -> list[Table]:
    """Suffix prediction, planted tasks, and the labels of the data itself."""
    has_suffixes = subject.data.contexts is not None and "true_continuation" in subject.data.extra
    return [*([suffixes(subject)] if has_suffixes else []), *questions.tables(subject)]


def suffixes(subject: Subject) -> Table:
    """Accuracy of choosing the true one of ten continuations, against others from other or from the same document."""
    places = [
        continuations.continuation(context, after)
        for context, after in zip(subject.data.contexts, subject.data.extra["true_continuation"], strict=True)
    ]
    rows = [row for row, place in enumerate(places) if place][: subject.config.prediction_rows]
    sets = {
        "other documents": _options_of_others(subject, places, rows),
        "the same document": _options_of_same(subject, places, rows),
    }
    background = subject.data.contexts
    if subject.training is not None and subject.training.contexts is not None:
        background = subject.training.contexts
    writer = PredictiveWriter(PredictiveConfig(topic_words=3), seed=0, words=WordCounts(background))
    texts = subject.texts()
    table = []
    for origin, options in sets.items():
        chosen = [row for row in rows if options.get(row)]
        docs, ids = [subject.data.doc_ids[i] for i in chosen], [subject.ids[i] for i in chosen]
        if len(set(docs)) < 2:
            continue
        spans = [options[row] for row in chosen]
        written = [texts[i] for i in chosen]
        contexts = [subject.data.contexts[i] for i in chosen]
        notes = {
            "AV": written,
            "AV, shuffled": shuffled(written, docs, subject.seed),
            "topic label": [", ".join(writer.topic(context)) for context in contexts],
        }
        if subject.data.explanations is not None:
            notes["explainer"] = [subject.data.explanations[i] for i in chosen]
        question, desc = "The text goes on:", f"suffixes of {origin}"
        figures = by_target_lm(subject, notes, question, spans, desc)
        joined = [[f"{places[i].blank}{span}" for span in row] for i, row in zip(chosen, spans, strict=True)]
        figures["context"] = subject.target.log_likelihood(contexts, joined, desc=desc)[0] - figures["guess"]
        # The right option is always the first; that cannot help, since each is scored alone. Ties count as wrong.
        right = {name: score[:, 0] > score[:, 1:].max(axis=1) for name, score in figures.items()}
        ratios = {name: Ratio.mean(hit, docs) for name, hit in right.items()}
        ratios["chance"] = Ratio.mean(np.full(len(docs), 1 / CHOICES), docs)
        name = f"suffix among {CHOICES}, from {origin}"
        table += [Row(name, ratios, ids=ids), *_of_places(subject, name, ratios, chosen)]
        table += by_chat_model(
            subject,
            name,
            written=written,
            contexts=contexts,
            question="How does the text go on?",
            options=[[" ".join(span.split()) for span in row] for row in spans],
            truth_N=np.zeros(len(docs), int),
            docs=docs,
            ids=ids,
        )
    return Table(
        name="suffixes",
        title="Which continuation follows?",
        note=f"Accuracy of choosing the true next {continuations.OPTION_WORDS} words, at held-out activations that end "
        "a word. All options are whole words, and all begin a line or none does. Distractors from other documents can "
        "be told by topic; those of the same document cannot, so the topic label must stay near chance there. "
        f"Where an explanation failed, the guess counts.{who_answered(subject)}",
        rows=table,
    )


def _of_places(subject: Subject, name: str, ratios: Mapping[str, Ratio], rows: Sequence[int]) -> list[Row]:
    """A line for each place with enough of the rows."""
    parts = {column: subject.by_place(ratio, rows) for column, ratio in ratios.items()}
    return [
        Row(name, {column: of[place][0] for column, of in parts.items()}, labels={"place": place}, ids=ids)
        for place, (_, ids) in parts["AV"].items()
    ]


def _options_of_others(
    subject: Subject, places: Sequence[Continuation | None], rows: Sequence[int]
) -> dict[int, list[str] | None]:
    """Row -> its own continuation first, then those of other documents."""
    docs, rng = subject.data.doc_ids, np.random.default_rng(subject.seed)
    found = {}
    for row in rows:
        order = rng.permutation(len(places))
        others = [places[i] for i in order if places[i] and docs[i] != docs[row]]
        found[row] = continuations.options(places[row], others, CHOICES - 1)
    return found


def _options_of_same(
    subject: Subject, places: Sequence[Continuation | None], rows: Sequence[int]
) -> dict[int, list[str] | None]:
    """Row -> its own continuation first, then what follows other places of the same document."""
    data, rng = subject.data, np.random.default_rng(subject.seed + 1)
    whole: dict[str, str] = {}
    for context, after, doc in zip(data.contexts, data.extra["true_continuation"], data.doc_ids, strict=True):
        whole[doc] = max(whole.get(doc, ""), context + after, key=len)
    found = {}
    for row in rows:
        at = len(data.contexts[row]) + len(places[row].blank)
        others = continuations.elsewhere(whole[data.doc_ids[row]], at, rng)
        found[row] = continuations.options(places[row], others, CHOICES - 1)
    return found
