"""Controls and baselines: the FVE of explanations that are wrong or empty, and of methods that need none."""

from collections.abc import Mapping, Sequence

import numpy as np

from nla_jax.autoencoder.yardstick import row_chunks
from nla_jax.data.splits import shuffled
from nla_jax.evaluation.baselines import (
    PCACode,
    last_tokens,
    logit_lens_words,
    means_by_key,
    nearest_by_activation,
    nearest_by_text,
    ridge_from_words,
)
from nla_jax.evaluation.dictionary_baseline import dictionary_predictions, dictionary_tables
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.oracle import oracle_predictions
from nla_jax.evaluation.subject import Prediction, Subject, Texts
from nla_jax.evaluation.tables import LAST_TOKEN, LAST_TWO, NEAREST, PLACE_MEAN, Table

FIXED_TEXT = "This text is about a general topic and goes on with common words."
"""The same sentence for every activation, as a control."""
LENS_WORDS = 8
PCA_CODE = "PCA code of as many bits as the texts carry"


def measure(subject: Subject) -> list[Table]:
    """Controls that an NLA must beat and baselines that it should, for all rows and by place; gains over lookups."""
    looked_up = lookups(subject)
    predictions = [
        *without_information(subject),
        *looked_up,
        *other_texts(subject),
        *without_reader(subject),
        *dictionary_predictions(subject),
        *oracle_predictions(subject),
    ]
    by_place = [line for prediction in predictions for line in subject.place_lines(prediction)]
    tables = [
        Table(
            name="controls",
            title="Controls and baselines",
            note="Controls know nothing of the activation and must be low, or know its last tokens alone: an NLA that "
            f"is no better than the {LAST_TOKEN!r} has learned nothing worth reading. Baselines do without a writer, "
            "without a reader or without words: they say what an explanation of this length is up against. Means of "
            "training activations are not scaled to the norm of activations, as an AR's vectors are. Bits: the target "
            "LM's surprise at a text, or what it takes to name a training row.",
            rows=[subject.line(prediction) for prediction in predictions],
            plotted="fve_nrm",
        )
    ]
    if by_place:
        tables.append(
            Table(
                name="controls_by_place",
                title="Controls and baselines by place",
                note="The fve_nrm of the table above at each place, around the place's own training mean.",
                rows=by_place,
            )
        )
    over = gains_over_lookups(subject, looked_up)
    return [*tables, *([over] if over.rows else []), *dictionary_tables(subject)]


def without_information(subject: Subject) -> list[Prediction]:
    """Texts that cannot tell this activation from others, the training mean, and that of the same place."""
    data, texts = subject.data, subject.texts()
    mean_ND = np.broadcast_to(subject.yardstick.mean_D, data.activations.shape)
    predictions = [Prediction("training mean", mean_ND, "control")]
    if subject.places:
        predictions.append(_mean(subject, PLACE_MEAN, subject.place_means_ND))
    wrong = {"AV, shuffled": shuffled(texts, data.doc_ids, subject.seed)}
    same = {"empty text": [""] * len(data), "fixed text": [FIXED_TEXT] * len(data)}
    predictions += _read(subject, wrong, "control", list(subject.reconstructors))
    if len(sibling := _siblings(subject)):
        here = np.array(list(sibling))
        others = [texts[sibling[i]] for i in here]
        predictions += [
            subject.read("AV, another position of the document", others, "control", ar=ar, rows=here)
            for ar in subject.reconstructors
        ]
    return predictions + _read(subject, same, "control", list(subject.reconstructors))


def _read(subject: Subject, sources: Mapping[str, Texts], group: str, ars: Sequence[str]) -> list[Prediction]:
    return [subject.read(name, texts, group, ar=ar) for name, texts in sources.items() for ar in ars]


def _mean(subject: Subject, name: str, means_ND: np.ndarray) -> Prediction:
    """Means of normalized training activations as a prediction."""
    scale = None if subject.training is None else _norm_scale(subject.training.activations)
    return Prediction(name, means_ND, "control", scale=scale, of_directions=True)


def _norm_scale(training_MD: np.ndarray) -> float:
    """The scalar that takes directions to raw vectors, as for the ARs: by least squares, the mean norm over √d."""
    norms = [np.linalg.norm(rows_BD, axis=1) for rows_BD in row_chunks(training_MD)]
    return float(np.concatenate(norms).mean() / np.sqrt(training_MD.shape[1]))


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


def lookups(subject: Subject) -> list[Prediction]:
    """`tables.LOOKUPS` in training rows; those of last tokens look among the rows of the same place."""
    data, training = subject.data, subject.training
    if training is None:
        return []
    nearest = nearest_by_activation(data.activations, training.activations)
    named = Ratio.mean(np.full(len(data), np.log2(len(training))), data.doc_ids)
    found = [Prediction(NEAREST, nearest, "baseline", further={"bits": named})]
    needs_target = "last_token_ids" not in data.extra or "last_token_ids" not in training.extra
    target = subject.target if needs_target else None
    tokens_N, training_tokens_M = last_tokens(data, target), last_tokens(training, target)
    if tokens_N is None or training_tokens_M is None:
        return found
    told = "place" in data.extra and "place" in training.extra
    place_N, training_place_M = (
        rows.extra["place"] if told else [None] * len(rows) for rows in (data, training)
    )
    means_ND, tables = subject.place_means_ND, []
    for name, count in ((LAST_TOKEN, 1), (LAST_TWO, 2)):
        keys_N, training_keys_M = (
            [(place, ids[-count:]) for place, ids in zip(places, tokens, strict=True)]
            for places, tokens in ((place_N, tokens_N), (training_place_M, training_tokens_M))
        )
        means_ND = means_by_key(keys_N, training_keys_M, training.activations, means_ND)
        tables.append(_mean(subject, name, means_ND))
    return tables + found


def other_texts(subject: Subject) -> list[Prediction]:
    """Texts that simple rules write, read by the ARs."""
    data, target = subject.data, subject.target
    seeing, blind = {}, {}
    if data.explanations is not None:
        seeing["explainer texts"] = data.explanations
    if data.contexts is not None:
        lengths = [len(target.continuation(text or "")) for text in subject.texts()]
        seeing["context tail of as many tokens"] = [
            target.tokenizer.decode(target.continuation(context)[-max(length, 1) :])
            for context, length in zip(data.contexts, lengths, strict=True)
        ]
    if "next_words" in data.extra:
        seeing["the target's next words"] = [", ".join(words) for words in data.extra["next_words"]]
    lens = logit_lens_words(target, data.activations, LENS_WORDS)
    blind["logit lens words"] = [", ".join(words) for words in lens]
    return _read(subject, seeing, "gold", subject.pair) + _read(subject, blind, "baseline", subject.pair)


def without_reader(subject: Subject) -> list[Prediction]:
    """Vectors that are made of the AV's words without an AR, and of a code without words."""
    data, training = subject.data, subject.training
    if training is None:
        return []
    written, training_MD = [text or "" for text in subject.texts()], training.activations
    predictions, directions = [], {}
    if (taught := training.explanations) is not None:
        nearest_ND = nearest_by_text(written, taught, training_MD)
        predictions.append(Prediction("nearest training text to the AV's", nearest_ND, "baseline"))
        directions["ridge from the AV's words"] = ridge_from_words(written, taught, training_MD)
        if data.explanations is not None:
            directions["ridge from the explainer's words"] = ridge_from_words(
                data.explanations, taught, training_MD
            )
    scale, bits_N = _norm_scale(training_MD), _bits(subject)
    predictions += [
        Prediction(name, vectors_ND, "baseline", scale=scale) for name, vectors_ND in directions.items()
    ]
    coded_ND = PCACode.fit(training_MD, max(int(bits_N.mean()), 1))(data.activations)
    further = {"bits": Ratio.mean(bits_N, data.doc_ids)}
    return [*predictions, Prediction(PCA_CODE, coded_ND, "baseline", scale=scale, further=further)]


def _bits(subject: Subject) -> np.ndarray:
    """The bits that each text of the AV carries: the target LM's surprise at it."""
    written = [text or "" for text in subject.texts()]
    nats_N1, _ = subject.target.log_likelihood([""] * len(written), [[f" {text}"] for text in written])
    # A failed text carries nothing, whatever the blank that is read in its place costs.
    return np.where([bool(text) for text in written], -nats_N1[:, 0], 0) / np.log(2)


def gains_over_lookups(subject: Subject, looked_up: Sequence[Prediction]) -> Table:
    """What the AV's texts explain more than each lookup, for all rows and by place, with paired intervals."""
    read = [subject.read("", subject.texts(), ar=ar) for ar in subject.pair]
    rows = [
        line
        for lookup in looked_up
        for texts in read
        for line in subject.gain_lines(f"AV {subject.main} over the {lookup.name}", texts, lookup)
    ]
    return Table(
        name="gains_over_lookups",
        title="Gains over lookups",
        note="The fve_nrm of the AV's texts less that of each lookup, on the same rows; documents are resampled for "
        "both at once. Explanations are worth reading where an interval lies above zero.",
        rows=rows,
    )
