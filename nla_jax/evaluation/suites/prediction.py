"""Prediction tasks: can somebody who reads only the explanation answer questions about the text?

The target LM predicts by the log-likelihood of each answer after the explanation, minus that without any. A chat model,
where there is one, predicts by naming a letter. Beside each figure stand chance, a guess from the answers alone, notes
about another text, the whole context, a linear probe on the activation, and the length of the text alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from nla_jax.autoencoder import metrics
from nla_jax.data.splits import shuffled
from nla_jax.data.writers.predictive import PredictiveConfig, PredictiveWriter, WordCounts
from nla_jax.evaluation import continuations
from nla_jax.evaluation.continuations import Continuation
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.planted.tasks import LETTERS, Task, tasks
from nla_jax.evaluation.predictors import by_chat_model, by_target_lm, who_answered
from nla_jax.evaluation.subject import Subject
from nla_jax.evaluation.tables import Row, Table

CHOICES = 10


def measure(subject: Subject) -> list[Table]:
    """Suffix prediction, planted tasks, and the labels of the data itself."""
    has_suffixes = subject.data.contexts is not None and "true_continuation" in subject.data.extra
    return [*([suffixes(subject)] if has_suffixes else []), questions(subject)]


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
        table.append(Row(name, ratios, ids=ids))
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


def questions(subject: Subject) -> Table:
    """Planted tasks and the data's own genres, as questions with few answers."""
    count, rows = subject.config.task_examples, []
    for task in tasks():
        asked, taught = (_planted(subject, task, teaching) for teaching in (False, True))
        rows += _answer(subject, task, asked, taught, docs=asked.ids, ids=asked.ids)
    genres = subject.data.extra.get("genre")
    if genres and subject.training is not None and subject.data.contexts is not None:
        common = sorted({genre for genre in genres if genres.count(genre) >= len(genres) / 12})
        chosen = [i for i, genre in enumerate(genres) if genre in common][:count]
        # Genres of the training rows teach the probe.
        training_genres = subject.training.extra.get("genre", [])
        teach = [i for i, genre in enumerate(training_genres) if genre in common][: 4 * count]
        if len(common) > 1 and len({genres[i] for i in chosen}) > 1 and teach:
            task = Task(
                "genre of the data", "Where is the text from?", {g: g for g in common}, lambda *_: "", ""
            )
            asked, taught = (
                _Labelled(
                    [data.extra["genre"][i] for i in some],
                    data.activations[some],
                    data.n_raw_tokens[some],
                    data.contexts and [data.contexts[i] for i in some],
                )
                for data, some in ((subject.data, chosen), (subject.training, teach))
            )
            docs, ids = [subject.data.doc_ids[i] for i in chosen], [subject.ids[i] for i in chosen]
            rows += _answer(subject, task, asked, taught, docs=docs, ids=ids)
    return Table(
        name="questions",
        title="What can be told from the explanation?",
        note="Accuracy of answering a question from the explanation alone. Guess: from the answers without notes. "
        "Context: the same predictor reading the whole text, the most that it could make of a perfect "
        "explanation. Probe: a linear classifier on the activation, which says what is there to be told; it learned "
        "from other texts, which share no filler with planted ones. Length: a classifier on the number of tokens "
        "alone. What the probe finds beyond that, and the explanation does not tell, is lost. Where an explanation "
        f"failed, the guess counts.{who_answered(subject)}",
        rows=rows,
    )


def _behavior(subject: Subject, contexts: Sequence[str], hinted: Sequence[str]) -> list[str]:
    """For each context, "followed" where the target's likeliest letter is the hinted one, else "not followed"."""
    score_NG, _ = subject.target.log_likelihood(
        contexts, [[f" {letter}" for letter in LETTERS]] * len(contexts)
    )
    chosen = [LETTERS[i] for i in score_NG.argmax(axis=1)]
    return ["followed" if own == hint else "not followed" for own, hint in zip(chosen, hinted, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Labelled:
    """Texts with the right answer to a question about each of them."""

    labels: Sequence[str]
    activations_ND: np.ndarray
    """Activations at the texts' ends."""
    lengths_N: np.ndarray
    """Numbers of tokens."""
    contexts: Sequence[str] | None
    """The texts themselves, which only those that are asked about need."""
    ids: Sequence[str] | None = None
    """Names of planted texts, which are their own documents."""


def _planted(subject: Subject, task: Task, teaching: bool) -> _Labelled:
    """The examples of a planted task that are asked about, or those that teach its probe."""
    examples = task.examples(subject.config.task_examples, subject.seed, teaching=teaching)
    contexts, labels = [e.context for e in examples], [e.label for e in examples]
    return _Labelled(
        labels=_behavior(subject, contexts, labels) if task.behavior else labels,
        activations_ND=subject.target.activations(contexts)[:, 0],
        lengths_N=np.array([len(subject.target.encode(context)) for context in contexts]),
        contexts=contexts,
        ids=[f"{task.name} {example.id}" for example in examples],
    )


def _answer(
    subject: Subject,
    task: Task,
    asked: _Labelled,
    taught: _Labelled,
    *,
    docs: Sequence[str],
    ids: Sequence[str],
) -> list[Row]:
    """A line with the accuracy of every predictor on a task, and one of a chat model's where there is one.

    Args:
      subject: the NLA whose explanations are read.
      task: the question and its answers.
      asked: the texts that the question is about.
      taught: those that the classifiers learn from.
      docs: document of each text that is asked about.
      ids: name of each.
    """
    contexts, labels = asked.contexts, asked.labels
    names = list(task.answers)
    written = subject.explain(asked.activations_ND, desc=task.name)
    options = [[task.answers[name] for name in names]] * len(contexts)
    truth_N = np.array([names.index(label) for label in labels])
    notes = {
        "AV": written,
        "AV, shuffled": shuffled(written, docs, subject.seed),
        "context": contexts,
    }
    scores_of = by_target_lm(subject, notes, task.question, options, task.name)
    ratios = {name: Ratio.mean(scores_of[name].argmax(axis=1) == truth_N, docs) for name in (*notes, "guess")}
    classifiers = {
        "probe": (
            make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500)),
            *(np.asarray(metrics.normalize(of.activations_ND)) for of in (taught, asked)),
        ),
        "length": (
            DecisionTreeClassifier(max_leaf_nodes=2 * len(names), random_state=0),
            *(of.lengths_N[:, None] for of in (taught, asked)),
        ),
    }
    for column, (classifier, known, unknown) in classifiers.items():
        if len(set(taught.labels)) > 1:
            predicted = classifier.fit(known, taught.labels).predict(unknown)
            ratios[column] = Ratio.mean(predicted == np.array(labels), docs)
        else:
            ratios[column] = None
    majority = max(labels.count(label) for label in set(labels)) / len(labels)
    ratios["commonest answer"] = Ratio.mean(np.full(len(labels), majority), docs)
    name = f"{task.name} ({len(names)} answers)"
    told_by_chat = by_chat_model(
        subject,
        name,
        written=written,
        contexts=contexts,
        question=task.question,
        options=options,
        truth_N=truth_N,
        docs=docs,
        ids=ids,
    )
    return [Row(name, ratios, ids=ids), *told_by_chat]
