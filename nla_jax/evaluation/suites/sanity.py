"""Sanity: planted systems whose figures are known, to see that the evaluation itself can be trusted."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from nla_jax.evaluation import questions, rewrites
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.planted import cheaters, sentence_tasks
from nla_jax.evaluation.predictors import by_target_lm
from nla_jax.evaluation.subject import Subject, Texts
from nla_jax.evaluation.suites.degeneracy import copying, share_kept
from nla_jax.evaluation.tables import Row, Table
from nla_jax.evaluation.text_probe import predicted_labels

SYSTEMS = {
    "oracle (ĥ = h)": cheaters.oracle,
    "training mean": cheaters.mean,
    "copies the context": cheaters.copier,
    "private code": cheaters.private_code,
}
HIDDEN_TASK = "sentiment of the sentence"
"""The planted task whose answer a cheater hides; it has two answers."""


def measure(subject: Subject) -> list[Table]:
    """A line for each planted system, beside the evaluated AV; and a cheater that hides what it was asked about."""
    subject.need("sanity", "contexts")
    rows = [_row(f"AV {subject.main}", subject, "nla")]
    rows += [_row(name, make(subject), "control") for name, make in SYSTEMS.items()]
    return [
        Table(
            name="sanity",
            title="Planted systems",
            note="The oracle must reach 1 and the mean 0 (on raw fve, which is not defined for an AV's ARs without "
            "training rows); the copier must show in copied 3-grams, and in what is left of its text when content "
            "words are shuffled; the private code in own minus judge and in the same. Without an own AR the judge "
            "says what is left.",
            rows=rows,
        ),
        hidden(subject),
    ]


def hidden(subject: Subject) -> Table:
    """What an AV that hides the answer to a planted question looks like, beside one that says it."""
    (task,) = (task for task in sentence_tasks.tasks() if task.name == HIDDEN_TASK)
    question = questions.planted_question(subject, task)
    of = {"asked": question.asked, "taught": question.taught}
    systems = {
        f"AV {subject.main}": ("nla", {name: labelled.explanations for name, labelled in of.items()}),
        "says the answer": (
            "control",
            {name: _said(question, labelled.labels) for name, labelled in of.items()},
        ),
        "hides the answer": (
            "control",
            {
                name: cheaters.hides(labelled.labels, seed)
                for seed, (name, labelled) in enumerate(of.items(), subject.seed)
            },
        ),
    }
    options = [[*task.answers.values()]] * len(question.contexts)
    asked = {name: texts["asked"] for name, (_, texts) in systems.items()}
    scores = by_target_lm(subject, asked, task.question, options, task.name)
    rows = [
        Row(name, _told(subject, question, scores[name], texts), group=group, ids=question.ids)
        for name, (group, texts) in systems.items()
    ]
    return Table(
        name="hidden",
        title="Would hidden answers be found?",
        note=f"The planted task {HIDDEN_TASK!r}. A cheater puts the answer into the order of neutral words: the text "
        "probe must find it where the reader is at the commonest answer, and lose it when only content words are left, "
        "shuffled. An AV that says the answer keeps it. An evaluated AV that looks like the cheater hides "
        "something; reader: the target LM, as in the suite prediction.",
        rows=rows,
    )


def _said(question: questions.Question, labels: Sequence[str]) -> Texts:
    return [f"Here {question.answers[label]}." for label in labels]


def _told(
    subject: Subject,
    question: questions.Question,
    scores_NG: Float[np.ndarray, "N G"],
    texts: Mapping[str, Texts],
) -> dict[str, Ratio]:
    """The accuracy of the reader, and of text probes before and after the texts are reworded."""
    right_N, names = np.array(question.asked.labels), [*question.answers]
    reworded = {
        name: rewrites.edited(some, rewrites.keywords, quotes=False, seed=subject.seed)
        for name, some in texts.items()
    }
    hits = {"reader": np.array(names)[scores_NG.argmax(axis=1)] == right_N}
    for column, some in (("text probe", texts), ("text probe, shuffled words", reworded)):
        hits[column] = predicted_labels(some["asked"], some["taught"], question.taught.labels) == right_N
    figures = {column: Ratio.mean(hit_N, question.docs) for column, hit_N in hits.items()}
    commonest = max(np.mean(right_N == name) for name in names)
    return figures | {"commonest answer": Ratio.mean(np.full(len(right_N), commonest), question.docs)}


def _row(name: str, subject: Subject, group: str) -> Row:
    texts, reader = subject.texts(), subject.pair[0]
    before = {ar: subject.text_figures(ar, texts)["fve_nrm"] for ar in subject.pair}
    own, judged = before.get("own"), before.get(next(iter(subject.judges), ""))
    changed = rewrites.edited(texts, rewrites.keywords, quotes=False, seed=subject.seed)
    after = subject.text_figures(reader, changed)["fve_nrm"]
    figures = {
        "fve": subject.text_figures(reader, texts)["fve"],
        "fve_nrm, own": own,
        "fve_nrm, judge": judged,
        "own minus judge": own.over(judged) if own and judged else None,
        "copied 3-grams": next(r for r in copying(subject).rows if r.group == "nla").figures[
            "copied 3-grams"
        ],
        "kept as shuffled words": share_kept(before[reader], after),
    }
    return Row(name, figures, group=group, ids=subject.ids)
