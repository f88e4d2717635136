"""Questions with few answers about texts: what readers make of explanations, and what probes find in them.

A reader has to understand an explanation to answer from it; a probe learns its words from the explanations of other
texts, which share no filler with those that are asked about. Beside both stands a probe on the activation itself, which
says what there is to be told.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from nla_jax.autoencoder import metrics
from nla_jax.data.splits import shuffled
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.oracle import oracle_scores
from nla_jax.evaluation.planted.task import LETTERS, Example, Task
from nla_jax.evaluation.planted.tasks import tasks
from nla_jax.evaluation.predictors import by_chat_model, by_target_lm, who_answered
from nla_jax.evaluation.subject import Subject, Texts
from nla_jax.evaluation.tables import Figure, Row, Table
from nla_jax.evaluation.text_probe import predicted_labels, teachable

AV, SHUFFLED, REBUILT, WRITER = "AV", "AV, shuffled", "rebuilt from the AV's", "explainer"
"""What a probe reads in place of the activation."""
HALF = 0.5
"""The share of the way from chance to the probe on the activation that counts as telling a property."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Texts with the right answer to a question about each of them, and what the NLA says of their last tokens."""

    labels: Sequence[str]
    activations_ND: Float[np.ndarray, "N D"]
    """Activations at the texts' ends."""
    lengths_N: np.ndarray
    """Numbers of tokens."""
    explanations: Texts
    """The evaluated AV's."""
    written: Texts | None
    """Texts of the run's own writer about the same tokens; None where they are not known."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about texts, with those that are asked about and those that teach probes."""

    name: str
    question: str
    answers: Mapping[str, str]
    """Label -> the answer as a phrase."""
    place: str | None
    """Where the texts are read; None where in several places."""
    asked: Labelled
    taught: Labelled
    contexts: Sequence[str]
    """The texts that are asked about."""
    docs: Sequence[str]
    """Document of each."""
    ids: Sequence[str]
    """Name of each."""

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the question's line in a table."""
        return {} if self.place is None else {"place": self.place}


@dataclasses.dataclass(frozen=True)
class Found:
    """How probes did on one question."""

    question: Question
    hits: Mapping[str, Float[np.ndarray, "N"] | None]
    """What the probe reads -> for each text that is asked about, whether (or how likely) it is labelled rightly; None
    where there are too few examples, or nothing to read."""

    @property
    def chance(self) -> float:
        """The accuracy of the commonest answer."""
        labels = self.question.asked.labels
        return max(labels.count(label) for label in set(labels)) / len(labels)

    def ratio(self, read: str) -> Ratio | None:
        """The accuracy of a probe."""
        return None if self.hits[read] is None else Ratio.mean(self.hits[read], self.question.docs)

    def is_readable(self) -> bool:
        """Whether the probe on the activation is above chance, with its interval clear of it."""
        probe = self.ratio("activation")
        return probe is not None and probe.estimate().low > self.chance

    def share(self, read: str) -> Ratio | None:
        """How far a probe gets on the way from chance to the probe on the activation.

        None where that probe is not clear of chance, or this one is missing.
        """
        if self.hits[read] is None or not self.is_readable():
            return None
        gained_N, there_N = (self.hits[name] - self.chance for name in (read, "activation"))
        return Ratio.of(gained_N, there_N, self.question.docs)


def tables(subject: Subject) -> list[Table]:
    """The table of questions, and what it comes to: how much of what the activation tells the words tell."""
    rows, found = [], []
    for question in [*_planted(subject), *_genres(subject)]:
        found.append(probed(subject, question))
        rows += _lines(subject, found[-1])
    told = summary(found)
    return [
        Table(
            name="questions",
            title="What can be told from the explanation?",
            note="Accuracy of answering a question from the explanation alone. Guess: from the answers without notes. "
            "Context: the same predictor reading the whole text, the most that it could make of a perfect "
            "explanation. Probe: a linear classifier on the activation, which says what is there to be told. Text "
            "probe: one on the words and pairs of words of the AV's texts, of another text's (the mean over all other "
            "texts), and of the explainer's on the same tokens; rebuilt: the probe on what the judge rebuilds from the "
            "AV's texts. All probes learned from other texts, which share no filler with planted ones. Share of the "
            "way: of that from the commonest answer to the probe, where the probe is clear of it. Length: a classifier "
            f"on the number of tokens alone. Where an explanation failed, the guess counts.{who_answered(subject)}",
            rows=rows,
        ),
        *([told] if told.rows else []),
    ]


def summary(found: Sequence[Found]) -> Table:
    """How far the probes on texts get, over all questions that the activation answers, and over those of one place."""
    places = dict.fromkeys(one.question.place for one in found if one.question.place is not None)
    rows = []
    for place in (None, *places):
        chosen = [one for one in found if place is None or one.question.place == place]
        for read, group in ((AV, "nla"), (SHUFFLED, "control"), (WRITER, "gold"), (REBUILT, "nla")):
            shares = {one.question.name: share for one in chosen if (share := one.share(read)) is not None}
            if len(shares) > 1:
                labels = {} if place is None else {"place": place}
                rows.append(Row(read, _summed(shares), group=group, labels=labels, ids=[*shares]))
    return Table(
        name="told",
        title="How much of what the activation tells do the words tell?",
        note="Over the questions that a probe on the activation answers better than chance: the mean share of the way "
        "from chance to that probe which a probe on texts goes, and the share of questions for which it is more than "
        "half. Shuffled texts must stay near 0.",
        rows=rows,
    )


def _summed(shares: Mapping[str, Ratio]) -> dict[str, Figure]:
    """Means over questions, which are resampled as documents are elsewhere."""
    names = [*shares]
    value_N = np.array([ratio.numerator_N.sum() / ratio.denominator_N.sum() for ratio in shares.values()])
    return {
        "share of the way": Ratio.mean(value_N, names),
        "more than half": Ratio.mean(value_N > HALF, names),
    }


def _planted(subject: Subject) -> list[Question]:
    """The planted tasks."""
    return [planted_question(subject, task) for task in tasks(subject.target.tokenizer)]


def planted_question(subject: Subject, task: Task) -> Question:
    """A planted task as a question, with what the NLA says of its texts."""
    config = subject.config
    asked = task.examples(config.task_examples, subject.seed)
    taught = task.examples(config.task_taught, subject.seed, teaching=True)
    ids = [f"{task.name} {example.id}" for example in asked]
    return Question(
        name=task.name,
        question=task.question,
        answers=task.answers,
        place=task.place,
        asked=_explained(subject, task, asked),
        taught=_explained(subject, task, taught),
        contexts=[example.context for example in asked],
        docs=ids,
        ids=ids,
    )


def _explained(subject: Subject, task: Task, examples: Sequence[Example]) -> Labelled:
    contexts, labels = [e.context for e in examples], [e.label for e in examples]
    activations_ND = subject.target.activations(contexts)[:, 0]
    return Labelled(
        labels=_behavior(subject, contexts, labels) if task.behavior else labels,
        activations_ND=activations_ND,
        lengths_N=np.array([len(subject.target.encode(context)) for context in contexts]),
        explanations=subject.explain(activations_ND, desc=task.name),
        written=None if subject.write is None else subject.write([e.document for e in examples]),
    )


def _behavior(subject: Subject, contexts: Sequence[str], hinted: Sequence[str]) -> list[str]:
    """For each context, "followed" where the target's likeliest letter is the hinted one, else "not followed"."""
    score_NG, _ = subject.target.log_likelihood(
        contexts, [[f" {letter}" for letter in LETTERS]] * len(contexts)
    )
    chosen = [LETTERS[i] for i in score_NG.argmax(axis=1)]
    return ["followed" if own == hint else "not followed" for own, hint in zip(chosen, hinted, strict=True)]


def _genres(subject: Subject) -> list[Question]:
    """The question about the data's own genres, where there are several; genres of training rows teach the probes."""
    data, training, count = subject.data, subject.training, subject.config.task_examples
    genres = data.extra.get("genre")
    if not genres or training is None or data.contexts is None:
        return []
    common = sorted({genre for genre in genres if genres.count(genre) >= len(genres) / 12})
    chosen = [i for i, genre in enumerate(genres) if genre in common][:count]
    of_training = training.extra.get("genre", [])
    taught = [i for i, genre in enumerate(of_training) if genre in common][: 4 * count]
    if len(common) < 2 or len({genres[i] for i in chosen}) < 2 or not taught:
        return []
    asked, teaching = (
        Labelled(
            labels=[rows.extra["genre"][i] for i in some],
            activations_ND=rows.activations[some],
            lengths_N=rows.n_raw_tokens[some],
            explanations=subject.explain(rows.activations[some], desc="genre of the data"),
            written=rows.explanations and [rows.explanations[i] for i in some],
        )
        for rows, some in ((data, chosen), (training, taught))
    )
    return [
        Question(
            name="genre of the data",
            question="Where is the text from?",
            answers={genre: genre for genre in common},
            place=None,
            asked=asked,
            taught=teaching,
            contexts=[data.contexts[i] for i in chosen],
            docs=[data.doc_ids[i] for i in chosen],
            ids=[subject.ids[i] for i in chosen],
        )
    ]


def probed(subject: Subject, question: Question) -> Found:
    """Let probes learn from what teaches a question, and label what is asked about."""
    asked, taught = question.asked, question.taught
    if not teachable(taught.labels):
        return Found(question, dict.fromkeys(("activation", "length", AV, SHUFFLED, REBUILT, WRITER)))
    right_N, known = np.array(asked.labels), np.array(taught.labels)

    def linear(taught_ND: np.ndarray, asked_ND: np.ndarray) -> Bool[np.ndarray, "N"]:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        known_ND, unknown_ND = (np.asarray(metrics.normalize(rows_ND)) for rows_ND in (taught_ND, asked_ND))
        return probe.fit(known_ND, known).predict(unknown_ND) == right_N

    tree = DecisionTreeClassifier(max_leaf_nodes=2 * len(question.answers), random_state=0)
    told_N = predicted_labels(asked.explanations, taught.explanations, taught.labels)
    rebuilt = [subject.rebuilt(subject.judge, of.explanations) for of in (taught, asked)]
    written_N = None
    if asked.written is not None and taught.written is not None:
        written_N = predicted_labels(asked.written, taught.written, taught.labels) == right_N
    hits = {
        "activation": linear(taught.activations_ND, asked.activations_ND),
        "length": tree.fit(taught.lengths_N[:, None], known).predict(asked.lengths_N[:, None]) == right_N,
        AV: told_N == right_N,
        SHUFFLED: of_other_texts(told_N, right_N),
        REBUILT: linear(*rebuilt),
        WRITER: written_N,
    }
    return Found(question, {name: None if hit is None else hit.astype(float) for name, hit in hits.items()})


def of_other_texts(told_N: np.ndarray, right_N: np.ndarray) -> Float[np.ndarray, "N"]:
    """For each text, the share of all other texts from which its own label was told: shuffling without its chance."""
    same_NN = told_N[None, :] == right_N[:, None]
    np.fill_diagonal(same_NN, False)
    return same_NN.sum(axis=1) / max(len(told_N) - 1, 1)


def _lines(subject: Subject, found: Found) -> list[Row]:
    """A line with the accuracy of every predictor and probe, and one of a chat model's where there is one."""
    question = found.question
    names, written = [*question.answers], question.asked.explanations
    options = [[question.answers[name] for name in names]] * len(question.contexts)
    truth_N = np.array([names.index(label) for label in question.asked.labels])
    notes = {
        AV: written,
        SHUFFLED: shuffled(written, question.docs, subject.seed),
        "context": question.contexts,
    }
    scores = by_target_lm(subject, notes, question.question, options, question.name)
    figures: dict[str, Figure] = {
        name: Ratio.mean(scores[name].argmax(axis=1) == truth_N, question.docs) for name in (*notes, "guess")
    }
    figures |= {
        "probe": found.ratio("activation"),
        "text probe": found.ratio(AV),
        "text probe, shuffled": found.ratio(SHUFFLED),
        "text probe, explainer": found.ratio(WRITER),
        "probe on rebuilt": found.ratio(REBUILT),
        "share of the way": found.share(AV),
        "share of the way, shuffled": found.share(SHUFFLED),
        "length": found.ratio("length"),
        "commonest answer": Ratio.mean(np.full(len(truth_N), found.chance), question.docs),
    }
    asked_NG = oracle_scores(subject.oracle, question.asked.activations_ND, question.question, options[0])
    if asked_NG is not None:
        figures["oracle"] = Ratio.mean(asked_NG.argmax(axis=1) == truth_N, question.docs)
    name = f"{question.name} ({len(names)} answers)"
    told_by_chat = by_chat_model(
        subject,
        name,
        written=written,
        contexts=question.contexts,
        question=question.question,
        options=options,
        truth_N=truth_N,
        docs=question.docs,
        ids=question.ids,
    )
    told_by_chat = [dataclasses.replace(row, labels=question.labels | row.labels) for row in told_by_chat]
    return [Row(name, figures, labels=question.labels, ids=question.ids), *told_by_chat]
