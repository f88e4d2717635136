"""Prediction tasks: can somebody who reads only the explanation answer questions about the text?

The target LM predicts by the log-likelihood of each answer after the explanation, minus that without any. A chat model,
where there is one, predicts by naming a letter. Beside each figure stand chance, a guess from the answers alone, notes
about another text, the whole context, and a linear probe on the activation.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nla_jax.autoencoder import metrics
from nla_jax.data.splits import shuffled
from nla_jax.data.writers.predictive import PredictiveConfig, PredictiveWriter
from nla_jax.evaluation.chat_questions import choices
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.planted.tasks import LETTERS, Task, tasks
from nla_jax.evaluation.subject import Subject
from nla_jax.evaluation.tables import Row, Table

CHOICES = 10
OPTION_WORDS = 6


def measure(subject: Subject) -> list[Table]:
    """Suffix prediction, planted tasks, and the labels of the data itself."""
    has_suffixes = subject.data.contexts is not None and "true_continuation" in subject.data.extra
    return [*([suffixes(subject)] if has_suffixes else []), questions(subject)]


def answered(
    subject: Subject,
    notes: Sequence[str | None] | None,
    question: str,
    options: Sequence[Sequence[str]],
    desc: str,
) -> np.ndarray:
    """Log-likelihood (N, G) of options after notes and a question; without notes, after the question alone."""
    heads = ["" if note is None else f"Notes on a text: {note}\n" for note in notes or [None] * len(options)]
    prompts = [f"{head}{question}" for head in heads]
    spaced = [[f" {option}" for option in row] for row in options]
    return subject.target.log_likelihood(prompts, spaced, desc=desc)[0]


def suffixes(subject: Subject) -> Table:
    """Accuracy of choosing the true one of ten continuations, against others from other or from the same document."""
    rows = np.arange(min(subject.config.prediction_rows, len(subject.data)))
    sets = {
        "other documents": _options_of_others(subject, rows),
        "the same document": _options_of_same(subject, rows),
    }
    background = (subject.data if subject.training is None else subject.training).contexts or []
    writer = PredictiveWriter(PredictiveConfig(topic_words=3), seed=0, background=background)
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
        guess_NG = answered(subject, None, question, spans, desc)
        figures = {
            name: answered(subject, note, question, spans, desc) - guess_NG for name, note in notes.items()
        }
        spaced = [[f" {span}" for span in row] for row in spans]
        figures["context"] = subject.target.log_likelihood(contexts, spaced, desc=desc)[0] - guess_NG
        figures["guess"] = guess_NG
        # The right option is always the first; that cannot help, since each is scored alone. Ties count as wrong.
        right = {name: score[:, 0] > score[:, 1:].max(axis=1) for name, score in figures.items()}
        ratios = {name: Ratio.mean(hit, docs) for name, hit in right.items()}
        ratios["chance"] = Ratio.mean(np.full(len(docs), 1 / CHOICES), docs)
        name = f"suffix among {CHOICES}, from {origin}"
        table.append(Row(name, ratios, ids=ids))
        table += _answered_by_chat(
            subject,
            name,
            written=written,
            contexts=contexts,
            question="How does the text go on?",
            options=spans,
            truth_N=np.zeros(len(docs), int),
            docs=docs,
            ids=ids,
        )
    return Table(
        name="suffixes",
        title="Which continuation follows?",
        note=f"Accuracy of choosing the true next {OPTION_WORDS} words. Distractors from other documents can be told "
        f"by topic; those of the same document cannot, so the topic label must stay near chance there.{_by(subject)}",
        rows=table,
    )


def _span(text: str) -> str | None:
    words = text.split()
    return " ".join(words[:OPTION_WORDS]) if len(words) >= OPTION_WORDS else None


def _options_of_others(subject: Subject, rows: np.ndarray) -> dict[int, list[str]]:
    """Row -> its own continuation first, then those of other documents."""
    data, rng = subject.data, np.random.default_rng(subject.seed)
    spans = [_span(text) for text in data.extra["true_continuation"]]
    found = {}
    for row in rows.tolist():
        others = list(
            {
                span
                for span, doc in zip(spans, data.doc_ids, strict=True)
                if span and doc != data.doc_ids[row] and span != spans[row]
            }
        )
        if spans[row] and len(others) >= CHOICES - 1:
            order = rng.permutation(len(others))[: CHOICES - 1]
            found[row] = [spans[row], *(sorted(others)[i] for i in order)]
    return found


def _options_of_same(subject: Subject, rows: np.ndarray) -> dict[int, list[str]]:
    """Row -> its own continuation first, then spans from elsewhere in the same document."""
    data, rng = subject.data, np.random.default_rng(subject.seed + 1)
    whole: dict[str, str] = {}
    for context, after, doc in zip(data.contexts, data.extra["true_continuation"], data.doc_ids, strict=True):
        whole[doc] = max(whole.get(doc, ""), context + after, key=len)
    found = {}
    for row in rows.tolist():
        own = _span(data.extra["true_continuation"][row])
        words = whole[data.doc_ids[row]].split()
        at = len(data.contexts[row].split())
        starts = [s for s in range(len(words) - OPTION_WORDS) if abs(s - at) >= OPTION_WORDS]
        # Spans from before the position come last: an LM that has read them likes to repeat them.
        order = sorted(rng.permutation(starts).tolist(), key=lambda s: s < at) if starts else []
        spans = [" ".join(words[s : s + OPTION_WORDS]) for s in order]
        others = list(dict.fromkeys(span for span in spans if span != own))
        if own and len(others) >= CHOICES - 1:
            found[row] = [own, *others[: CHOICES - 1]]
    return found


def questions(subject: Subject) -> Table:
    """Planted tasks and the data's own genres, as questions with few answers."""
    count, rows = subject.config.task_examples, []
    for task in tasks():
        known = task.examples(2 * count, subject.seed)
        contexts, labels = [e.context for e in known], [e.label for e in known]
        activations_ND = subject.target.activations(contexts)[:, 0]
        if task.behavior:
            labels = _behavior(subject, contexts, labels)
        # Questions are about the first half; the probe learns from the second.
        docs = [f"{task.name} {i}" for i in range(count)]
        rows += _answer(
            subject,
            task,
            contexts=contexts[:count],
            labels=labels[:count],
            activations_ND=activations_ND[:count],
            probe_MD=activations_ND[count:],
            probe_labels=labels[count:],
            docs=docs,
            ids=docs,
        )
    genres = subject.data.extra.get("genre")
    if genres and subject.training is not None and subject.data.contexts is not None:
        common = sorted({genre for genre in genres if genres.count(genre) >= len(genres) / 12})
        chosen = [i for i, genre in enumerate(genres) if genre in common][:count]
        # Genres of the training rows teach the probe.
        training_genres = subject.training.extra.get("genre", [])
        teach = [i for i, genre in enumerate(training_genres) if genre in common][: 4 * count]
        if len(common) > 1 and len({genres[i] for i in chosen}) > 1 and teach:
            task = Task("genre of the data", "Where is the text from?", {g: g for g in common}, lambda *_: "")
            rows += _answer(
                subject,
                task,
                contexts=[subject.data.contexts[i] for i in chosen],
                labels=[genres[i] for i in chosen],
                activations_ND=subject.data.activations[chosen],
                probe_MD=subject.training.activations[teach],
                probe_labels=[training_genres[i] for i in teach],
                docs=[subject.data.doc_ids[i] for i in chosen],
                ids=[subject.ids[i] for i in chosen],
            )
    return Table(
        name="questions",
        title="What can be told from the explanation?",
        note="Accuracy of answering a question from the explanation alone. Guess: from the answers without notes. "
        "Context: the same predictor reading the whole text, the most that it could make of a perfect "
        "explanation. Probe: a linear classifier on the activation, which says what is there to be told. What "
        f"the probe finds and the explanation does not tell is lost.{_by(subject)}",
        rows=rows,
    )


def _behavior(subject: Subject, contexts: Sequence[str], hinted: Sequence[str]) -> list[str]:
    """For each context, "followed" where the target's likeliest letter is the hinted one, else "not followed"."""
    score_NG, _ = subject.target.log_likelihood(
        contexts, [[f" {letter}" for letter in LETTERS]] * len(contexts)
    )
    chosen = [LETTERS[i] for i in score_NG.argmax(axis=1)]
    return ["followed" if own == hint else "not followed" for own, hint in zip(chosen, hinted, strict=True)]


def _answer(
    subject: Subject,
    task: Task,
    *,
    contexts: Sequence[str],
    labels: Sequence[str],
    activations_ND: np.ndarray,
    probe_MD: np.ndarray,
    probe_labels: Sequence[str],
    docs: Sequence[str],
    ids: Sequence[str],
) -> list[Row]:
    """A line with the accuracy of every predictor on a task, and one of a chat model's where there is one.

    Args:
      subject: the NLA whose explanations are read.
      task: the question and its answers.
      contexts: the texts that the question is about.
      labels: right answer for each text.
      activations_ND: activations at the texts' ends.
      probe_MD: activations that the linear probe learns from.
      probe_labels: right answers for those.
      docs: document of each text.
      ids: name of each text.
    """
    names = list(task.answers)
    written = subject.explain(activations_ND, desc=task.name)
    options = [[task.answers[name] for name in names]] * len(contexts)
    truth_N = np.array([names.index(label) for label in labels])

    def scores(notes: Sequence[str | None] | None) -> np.ndarray:
        return answered(subject, notes, task.question, options, task.name)

    guess_NG = scores(None)
    scores_of = {
        "AV": scores(written) - guess_NG,
        "AV, shuffled": scores(shuffled(written, docs, subject.seed)) - guess_NG,
        "context": scores(contexts) - guess_NG,
        "guess": guess_NG,
    }
    ratios = {
        name: Ratio.mean(score_NG.argmax(axis=1) == truth_N, docs) for name, score_NG in scores_of.items()
    }
    ratios["probe"] = None
    if len(set(probe_labels)) > 1:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        probe.fit(np.asarray(metrics.normalize(probe_MD)), probe_labels)
        predicted = probe.predict(np.asarray(metrics.normalize(activations_ND)))
        ratios["probe"] = Ratio.mean(predicted == np.array(labels), docs)
    majority = max(labels.count(label) for label in set(labels)) / len(labels)
    ratios["commonest answer"] = Ratio.mean(np.full(len(labels), majority), docs)
    name = f"{task.name} ({len(names)} answers)"
    by_chat = _answered_by_chat(
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
    return [Row(name, ratios, ids=ids), *by_chat]


def _answered_by_chat(
    subject: Subject,
    name: str,
    *,
    written: Sequence[str | None],
    contexts: Sequence[str],
    question: str,
    options: Sequence[Sequence[str]],
    truth_N: np.ndarray,
    docs: Sequence[str],
    ids: Sequence[str],
) -> list[Row]:
    """A line `name` with the accuracy of the chat model, which answers with a letter; none if there is no chat model.

    Args:
      subject: the NLA, with its chat model.
      name: name of the line.
      written: explanation of each text.
      contexts: the texts themselves.
      question: the question about each text.
      options: possible answers for each text.
      truth_N: index of the right option for each text.
      docs: document of each text.
      ids: name of each text.
    """
    if subject.chat is None:
        return []

    def notes(texts: Sequence[str | None]) -> list[str]:
        return [f"Notes on a text: {text}\n\n" if text else "" for text in texts]

    told = {
        "AV": notes(written),
        "AV, shuffled": notes(shuffled(written, docs, subject.seed)),
        "context": [f"A text: {context}\n\n" for context in contexts],
        "guess": [""] * len(contexts),
    }
    chosen = choices(subject.chat, told, question, options, ids, seed=subject.seed, desc=name)
    ratios = {told_by: Ratio.mean(of_N == truth_N, docs) for told_by, of_N in chosen.items()}
    ratios["no letter"] = Ratio.mean(np.mean([of_N < 0 for of_N in chosen.values()], axis=0), docs)
    return [Row(name, ratios, labels={"predictor": subject.chat.name}, ids=ids)]


def _by(subject: Subject) -> str:
    """A sentence for a table's note about its predictors; empty if there is only one."""
    if subject.chat is None:
        return ""
    return (
        " Lines that name no predictor were answered by the target LM, by likelihood; the others by a chat model, "
        "with one letter for options in random order. No letter: the share of its answers that named none; they "
        "count as wrong."
    )
