"""Controls and baselines: the FVE of explanations that are wrong or empty, and of methods that need none."""

import numpy as np

from nla_jax.autoencoder.yardstick import row_chunks
from nla_jax.data.splits import shuffled
from nla_jax.evaluation.baselines import (
    PCACode,
    dictionary_texts,
    logit_lens_words,
    nearest_by_activation,
    nearest_by_text,
    ridge_from_words,
)
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.subject import Subject
from nla_jax.evaluation.tables import Row, Table

FIXED_TEXT = "This text is about a general topic and goes on with common words."
"""The same sentence for every activation, as a control."""
LENS_WORDS = 8
PCA_CODE = "PCA code of as many bits as the texts carry"


def measure(subject: Subject) -> list[Table]:
    """One table: controls that an NLA must beat, and baselines that it should."""
    return [
        Table(
            name="controls",
            title="Controls and baselines",
            note="Controls know nothing of the activation and must be low. Baselines do without a writer, without a "
            "reader or without words: they say what an explanation of this length is up against. Bits: the target LM's "
            "surprise at a text.",
            rows=[*without_information(subject), *other_texts(subject), *without_reader(subject)],
            plotted="fve_nrm",
        )
    ]


def without_information(subject: Subject) -> list[Row]:
    """Texts that cannot tell this activation from others, and the training mean."""
    data, texts = subject.data, subject.texts()
    mean_ND = np.broadcast_to(subject.yardstick.mean_D, data.activations.shape)
    rows = [
        Row("training mean", subject.figures(mean_ND), group="control", labels={"AR": "-"}, ids=subject.ids)
    ]
    rows += subject.text_rows("AV, shuffled", shuffled(texts, data.doc_ids, subject.seed), "control")
    if len(sibling := _siblings(subject)):
        here = np.array(list(sibling))
        for ar in subject.reconstructors:
            figures = subject.text_figures(ar, [texts[sibling[i]] for i in here], here)
            ids = [subject.ids[i] for i in here]
            rows.append(
                Row(
                    "AV, another position of the document",
                    figures,
                    group="control",
                    labels={"AR": ar},
                    ids=ids,
                )
            )
    rows += subject.text_rows("empty text", [""] * len(data), "control")
    return rows + subject.text_rows("fixed text", [FIXED_TEXT] * len(data), "control")


def _siblings(subject: Subject) -> dict[int, int]:
    """For each row the next other row of its document, where there is one."""
    members: dict[str, list[int]] = {}
    for row, doc in enumerate(subject.data.doc_ids):
        members.setdefault(doc, []).append(row)
    return {
        row: rows[(at + 1) % len(rows)]
        for rows in members.values()
        if len(rows) > 1
        for at, row in enumerate(rows)
    }


def other_texts(subject: Subject) -> list[Row]:
    """Texts that simple rules write, read by the ARs."""
    data, target, rows = subject.data, subject.target, []
    if data.explanations is not None:
        rows += subject.text_rows("explainer texts", data.explanations, "gold", subject.pair)
    if data.contexts is not None:
        lengths = [len(target.continuation(text or "")) for text in subject.texts()]
        tails = [
            target.tokenizer.decode(target.continuation(context)[-max(length, 1) :])
            for context, length in zip(data.contexts, lengths, strict=True)
        ]
        rows += subject.text_rows("context tail of as many tokens", tails, "gold", subject.pair)
    if "next_words" in data.extra:
        expected = [", ".join(words) for words in data.extra["next_words"]]
        rows += subject.text_rows("the target's next words", expected, "gold", subject.pair)
    lens = [", ".join(words) for words in logit_lens_words(target, data.activations, LENS_WORDS)]
    rows += subject.text_rows("logit lens words", lens, "baseline", subject.pair)
    if subject.config.dictionary is not None:
        texts = dictionary_texts(subject.config.dictionary, target, data.activations)
        rows += subject.text_rows("sparse dictionary words", texts, "baseline", subject.pair)
    return rows


def without_reader(subject: Subject) -> list[Row]:
    """Vectors from lookups, linear maps and codes."""
    data, training = subject.data, subject.training
    if training is None:
        return []
    written, training_MD = [text or "" for text in subject.texts()], training.activations
    nearest = {"nearest training activation": nearest_by_activation(data.activations, training_MD)}
    directions = {}
    if (taught := training.explanations) is not None:
        nearest["nearest training text to the AV's"] = nearest_by_text(written, taught, training_MD)
        directions["ridge from the AV's words"] = ridge_from_words(written, taught, training_MD)
        if data.explanations is not None:
            directions["ridge from the explainer's words"] = ridge_from_words(
                data.explanations, taught, training_MD
            )
    nats_N1, _ = subject.target.log_likelihood([""] * len(written), [[f" {text}"] for text in written])
    # A failed text carries nothing, whatever the blank that is read in its place costs.
    carried_N = np.where([bool(text) for text in written], -nats_N1[:, 0], 0)
    bits_N = carried_N / np.log(2)
    code = PCACode.fit(training_MD, max(int(bits_N.mean()), 1))
    directions[PCA_CODE] = code(data.activations)
    # One scalar takes directions to raw vectors, as it does for the ARs: by least squares, the mean norm over √d.
    norms = [np.linalg.norm(rows_BD, axis=1) for rows_BD in row_chunks(training_MD)]
    scale = float(np.concatenate(norms).mean() / np.sqrt(training_MD.shape[1]))
    return [
        Row(
            name,
            subject.figures(vector_ND, scale=factor)
            | ({"bits": Ratio.mean(bits_N, data.doc_ids)} if name == PCA_CODE else {}),
            group="baseline",
            labels={"AR": "-"},
            ids=subject.ids,
        )
        for vectors, factor in ((nearest, 1.0), (directions, scale))
        for name, vector_ND in vectors.items()
    ]
