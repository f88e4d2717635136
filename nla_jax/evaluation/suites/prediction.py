"""Prediction tasks: can somebody who reads only the explanation answer questions about the text?

The predictor is the target LM by the likelihood of each answer, less the answer's likelihood without any notes, and
where there is one a chat model by the letter that it names. Beside each figure stand chance, a guess from the answers
alone, notes about another text, the whole context, and a linear probe on the activation.
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
    known = subject.data.contexts is not None and "true_continuation" in subject.data.extra
    return [*([suffixes(subject)] if known else []), questions(subject)]


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
    """Which of ten continuations follows, with distractors from other documents and from the same one."""
    rows = np.arange(min(subject.config.prediction_rows, len(subject.data)))
    sets = {
        "other documents": _options_of_others(subject, rows),
        "the same document": _options_of_same(subject, rows),
    }
    background = (subject.data if subject.training is None else subject.training).contexts or []
    explainer = PredictiveWriter(PredictiveConfig(topic_words=3), seed=0, background=background)
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
            "topic label": [", ".join(explainer.topic(context)) for context in contexts],
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
        # The right one comes first; order cannot help, since options are scored apart. Ties count as wrong.
        right = {name: score[:, 0] > score[:, 1:].max(axis=1) for name, score in figures.items()}
        ratios = {name: Ratio.mean(hit, docs) for name, hit in right.items()}
        ratios["chance"] = Ratio.mean(np.full(len(docs), 1 / CHOICES), docs)
        name = f"suffix among {CHOICES}, from {origin}"
        table.append(Row(name, ratios, ids=ids))
        truth_N = np.zeros(len(docs), int)
        table += _asked(
            subject, name, written, contexts, "How does the text go on?", spans, truth_N, docs, ids
        )
    return Table(
        "suffixes",
        "Which continuation follows?",
        f"Accuracy of choosing the true next {OPTION_WORDS} words. Distractors from other documents can be told "
        f"by topic; those of the same document cannot, so the topic label must stay near chance there.{_by(subject)}",
        table,
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
        # What stands before the position comes last: whoever has read it likes to say it again.
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
        # The first half is asked about, the probe learns from the second.
        rows += _ask(subject, task, contexts[:count], labels[:count], activations_ND, labels[count:])
    genres = subject.data.extra.get("genre")
    if genres and subject.training is not None and subject.data.contexts is not None:
        common = sorted({genre for genre in genres if genres.count(genre) >= len(genres) / 12})
        chosen = [i for i, genre in enumerate(genres) if genre in common][:count]
        # Genres of the training rows teach the probe.
        known = subject.training.extra.get("genre", [])
        teach = [i for i, genre in enumerate(known) if genre in common][: 4 * count]
        if len(common) > 1 and len({genres[i] for i in chosen}) > 1 and teach:
            task = Task("genre of the data", "Where is the text from?", {g: g for g in common}, lambda *_: "")
            activations = np.concatenate(
                [subject.data.activations[chosen], subject.training.activations[teach]]
            )
            contexts = [subject.data.contexts[i] for i in chosen]
            labels, teach_labels = [genres[i] for i in chosen], [known[i] for i in teach]
            docs = [subject.data.doc_ids[i] for i in chosen]
            ids = [subject.ids[i] for i in chosen]
            rows += _ask(subject, task, contexts, labels, activations, teach_labels, docs, ids)
    return Table(
        "questions",
        "What can be told from the explanation?",
        "Accuracy of answering a question from the explanation alone. Guess: from the answers without notes. "
        "Context: the same predictor reading the whole text, the most that it could make of a perfect "
        "explanation. Probe: a linear classifier on the activation, which says what is there to be told. What "
        f"the probe finds and the explanation does not tell is lost.{_by(subject)}",
        rows,
    )


def _behavior(subject: Subject, contexts: Sequence[str], hinted: Sequence[str]) -> list[str]:
    """Whether the target's likeliest letter is the hinted one."""
    score_NG, _ = subject.target.log_likelihood(
        contexts, [[f" {letter}" for letter in LETTERS]] * len(contexts)
    )
    chosen = [LETTERS[i] for i in score_NG.argmax(axis=1)]
    return ["followed" if own == hint else "not followed" for own, hint in zip(chosen, hinted, strict=True)]


def _ask(subject, task, contexts, labels, activations_ND, teach_labels, docs=None, ids=None) -> list[Row]:
    """The task through every predictor. Activations of the asked texts come first, then the probe's."""
    n, names = len(contexts), list(task.answers)
    docs = docs or [f"{task.name} {i}" for i in range(n)]
    ids = ids or docs
    written = subject.explain(activations_ND[:n], desc=task.name)
    options = [[task.answers[name] for name in names]] * n
    truth_N = np.array([names.index(label) for label in labels])
    guess_NG = answered(subject, None, task.question, options, task.name)
    score = {
        "AV": answered(subject, written, task.question, options, task.name) - guess_NG,
        "AV, shuffled": answered(
            subject, shuffled(written, docs, subject.seed), task.question, options, task.name
        )
        - guess_NG,
        "context": answered(subject, contexts, task.question, options, task.name) - guess_NG,
        "guess": guess_NG,
    }
    ratios = {name: Ratio.mean(of.argmax(axis=1) == truth_N, docs) for name, of in score.items()}
    ratios["probe"] = None
    if len(set(teach_labels)) > 1:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        probe.fit(np.asarray(metrics.normalize(activations_ND[n:])), teach_labels)
        found = probe.predict(np.asarray(metrics.normalize(activations_ND[:n])))
        ratios["probe"] = Ratio.mean(found == np.array(labels), docs)
    majority = max(labels.count(label) for label in set(labels)) / n
    ratios["commonest answer"] = Ratio.mean(np.full(n, majority), docs)
    name = f"{task.name} ({len(names)} answers)"
    asked = _asked(subject, name, written, contexts, task.question, options, truth_N, docs, ids)
    return [Row(name, ratios, ids=ids), *asked]


def _asked(subject, name, written, contexts, question, options, truth_N, docs, ids) -> list[Row]:
    """A further line where there is a chat model: the same questions, answered by it with a letter."""
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
    """What a table's note says of its predictors."""
    if subject.chat is None:
        return ""
    return (
        " Lines that name no predictor were answered by the target LM, by likelihood; the others by a chat model, "
        "with one letter for options in random order. No letter: the share of its answers that named none; they "
        "count as wrong."
    )
