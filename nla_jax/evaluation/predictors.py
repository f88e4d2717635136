"""Predictors: who answers a question with few options after reading notes, the target LM or a chat model."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from nla_jax.data.splits import shuffled
from nla_jax.evaluation.chat_questions import choices
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.subject import Subject
from nla_jax.evaluation.tables import Row


def by_target_lm(
    subject: Subject,
    notes: Mapping[str, Sequence[str | None]],
    question: str,
    options: Sequence[Sequence[str]],
    desc: str,
) -> dict[str, Float[np.ndarray, "N G"]]:
    """What the target LM makes of each option for each row, after each kind of notes, and for "guess" after none.

    After notes it is how much they raise the option's log-likelihood. A row whose notes are missing, because its
    explanation failed, keeps its guess: the log-likelihood after the question alone.

    Args:
      subject: the NLA, with its target LM.
      notes: name -> a text about each row; None where there is none.
      question: the question, the same for all rows.
      options: possible answers for each row.
      desc: name of the progress bar.
    """
    spaced = [[f" {option}" for option in row] for row in options]

    heads = {"guess": [""] * len(options)} | {
        name: [f"Notes on a text: {text}\n" if text else "" for text in texts]
        for name, texts in notes.items()
    }
    # A note that is read for several rows with the same options is scored once, and so is none at all.
    pairs = [(head, tuple(row)) for texts in heads.values() for head, row in zip(texts, spaced, strict=True)]
    asked = list(dict.fromkeys(pairs))
    scored, _ = subject.target.log_likelihood(
        [f"{head}{question}" for head, _ in asked], [row for _, row in asked], desc=desc
    )
    score_of = dict(zip(asked, scored, strict=True))
    all_NG = np.stack([score_of[pair] for pair in pairs]).reshape(len(heads), len(options), -1)
    scores = dict(zip(heads, all_NG, strict=True))
    for name, texts in notes.items():
        missing_N1 = np.array([not text for text in texts])[:, None]
        scores[name] = np.where(missing_N1, scores["guess"], scores[name] - scores["guess"])
    return scores


def by_chat_model(
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


def who_answered(subject: Subject) -> str:
    """A sentence for a table's note about its predictors; empty if there is only one."""
    if subject.chat is None:
        return ""
    return (
        " Lines that name no predictor were answered by the target LM, by likelihood; the others by a chat model, "
        "with one letter for options in random order. No letter: the share of its answers that named none; they "
        "count as wrong."
    )
