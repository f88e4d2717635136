"""Reconstruction: how much of an activation each AR recovers from its explanation, and for which activations."""

from collections import Counter

import numpy as np

from nla_jax import text_analysis
from nla_jax.autoencoder import metrics
from nla_jax.data.splits import shuffled
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.subject import Prediction, Subject, Texts
from nla_jax.evaluation.suites.controls import lookups
from nla_jax.evaluation.tables import Row, Table

PREFIX_TOKENS = (5, 10, 20, 40, 80)
QUANTILES = 4


def measure(subject: Subject) -> list[Table]:
    """All tables of the suite."""
    spliced = [] if subject.data.contexts is None else [splice(subject)]
    places = [systems_by_place(subject)] if subject.places else []
    return [
        systems(subject),
        *places,
        gains(subject),
        best_of_n(subject),
        prefixes(subject),
        slices(subject),
        *spliced,
    ]


def _systems(subject: Subject) -> list[Prediction]:
    """What each AR rebuilds from the warm-start texts and from each AV's."""
    gold = subject.data.explanations
    return [
        subject.read(name, texts, group, ar=ar)
        for ar in subject.reconstructors
        for name, texts, group in (
            *([("explainer texts", gold, "gold")] if gold is not None else []),
            *((f"AV {name}", subject.texts(name), "nla") for name in subject.verbalizers),
        )
    ]


def systems(subject: Subject) -> Table:
    """Figures of each AV's texts, and of the warm-start texts, through each AR."""
    return Table(
        name="systems",
        title="Round trip of held-out activations",
        note="The own AR trained beside the AV and may have learned its habits; the judges never saw a text from "
        "joint training. Where own and judge disagree, believe the judge. A failed explanation counts as the "
        "training mean.",
        rows=[subject.line(prediction) for prediction in _systems(subject)],
        plotted="fve_nrm",
    )


def systems_by_place(subject: Subject) -> Table:
    """The `fve_nrm` of the same texts at each place, around the place's own mean, beside the lookups' of `controls`."""
    predictions = _systems(subject) + lookups(subject)
    return Table(
        name="systems_by_place",
        title="Round trip by place",
        note="Where an activation is read decides what there is to say about it. The fve_nrm at each place is around "
        "the place's own training mean, so that knowing the place explains nothing; it is lower than that around the "
        "mean of all. Texts that explain less than the lookups do not carry more than a table.",
        rows=[line for prediction in predictions for line in subject.place_lines(prediction)],
        plotted="fve_nrm",
    )


def gains(subject: Subject) -> Table:
    """The gain of each AV over the one before it, for all rows and by place, with paired intervals."""
    names = list(subject.verbalizers)
    rows = []
    for ar in subject.reconstructors:
        read = [subject.read("", subject.texts(name), ar=ar) for name in names]
        for before, after, name, last in zip(read, read[1:], names[1:], names, strict=False):
            rows += subject.gain_lines(f"{name} over {last}", after, before)
    return Table(
        name="gains",
        title="What joint training gained",
        note="Differences of two figures of the tables above; documents are resampled for both at once.",
        rows=rows,
    )


def best_of_n(subject: Subject) -> Table:
    """The best of several samples, chosen by one AR and measured by all."""
    n = subject.config.samples
    drawn = [subject.texts(sample=index) for index in range(n)]
    errors = {ar: np.stack([_errors(subject, ar, texts) for texts in drawn]) for ar in subject.pair}
    rows = []
    for size in sorted({1, n}):
        for chooser in subject.pair:
            best_N = errors[chooser][:size].argmin(axis=0)
            chosen = [drawn[best][row] for row, best in enumerate(best_N)]
            for ar in subject.pair:
                figures = subject.text_figures(ar, chosen)
                labels = {"chosen by": chooser if size > 1 else "-", "AR": ar}
                rows.append(
                    Row(
                        f"best of {size}" if size > 1 else "one sample",
                        figures,
                        labels=labels,
                        ids=subject.ids,
                    )
                )
            if size == 1:
                break
    return Table(
        name="best_of_n",
        title=f"Best of {n} samples at temperature 1",
        note="Chosen and measured by the same AR, the best sample flatters; chosen by one and measured by another, "
        "what is left is what both agree on.",
        rows=rows,
    )


def _errors(subject: Subject, ar: str, texts: Texts) -> np.ndarray:
    failed_N = np.array([text is None for text in texts])
    error_N = metrics.direction_mse(subject.rebuilt(ar, texts), subject.data.activations)
    return np.where(failed_N, np.inf, np.asarray(error_N))


def prefixes(subject: Subject) -> Table:
    """Figures of the first tokens of each explanation alone."""
    rows, tokenizer = [], subject.target.tokenizer
    for count in PREFIX_TOKENS:
        cut = [
            None
            if text is None
            else tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:count])
            for text in subject.texts()
        ]
        rows += subject.text_rows(f"first {count} tokens", cut, ars=[subject.judge])
        if cut == subject.texts():
            break
    return Table(
        name="prefixes",
        title="The beginning of each explanation alone",
        note="Where the curve is flat, the words that follow tell the AR nothing more.",
        rows=rows,
        plotted="fve_nrm",
    )


def slices(subject: Subject) -> Table:
    """Figures by context length, place in the sentence, norm and genre: for which activations the AV does well."""
    data, texts = subject.data, subject.texts()
    columns: dict[str, list[str]] = {
        "tokens of context": _quantiles(data.n_raw_tokens),
        "norm of the activation": _quantiles(np.linalg.norm(data.activations, axis=1)),
    }
    if data.contexts is not None:
        since = [
            len(text_analysis.words(text_analysis.sentences(context or ".")[-1])) for context in data.contexts
        ]
        columns["words since the sentence began"] = _quantiles(np.array(since))
    if genres := data.extra.get("genre"):
        rows_of = Counter(genres)
        columns["genre"] = [genre if rows_of[genre] >= len(genres) / 20 else "all others" for genre in genres]
    rows = []
    for title, values in columns.items():
        for value in sorted(set(values), key=_lower_end):
            chosen = np.array([i for i, other in enumerate(values) if other == value])
            if len({data.doc_ids[i] for i in chosen}) < 2:
                continue
            figures = subject.text_figures(subject.judge, [texts[i] for i in chosen], chosen)
            ids = [subject.ids[i] for i in chosen]
            rows.append(Row(f"{title}: {value}", figures, labels={"AR": subject.judge}, ids=ids))
    return Table(
        name="slices",
        title="Where it works",
        note="The same explanations, by what they explain. Each slice has its own denominator: compare with care.",
        rows=rows,
    )


def _quantiles(values_N: np.ndarray) -> list[str]:
    """The quantile that each value falls in, as "low to high"; ends that are not whole have three digits."""
    edges = np.unique(np.quantile(values_N, np.linspace(0, 1, QUANTILES + 1)).astype(values_N.dtype))
    bins = np.clip(np.searchsorted(edges, values_N, side="right") - 1, 0, max(len(edges) - 2, 0))
    high = edges[1:] if len(edges) > 1 else edges

    def shown(end: np.number) -> str:
        whole = np.issubdtype(values_N.dtype, np.integer)
        return str(end) if whole else np.format_float_positional(end, precision=3, fractional=False, trim="-")

    return [f"{shown(edges[b])} to {shown(high[b])}" for b in bins]


def _lower_end(label: str) -> tuple[float, str]:
    """What sorts quantiles by their lower ends, and other labels by their letters."""
    low, to, _ = label.partition(" to ")
    try:
        return (float(low) if to else 0.0), label
    except ValueError:
        return 0.0, label


def splice(subject: Subject) -> Table:
    """The target LM's loss when the rebuilt activation takes the place of the true one."""
    data, yardstick, docs = subject.data, subject.yardstick, subject.data.doc_ids
    norm = np.linalg.norm(data.activations, axis=1, keepdims=True)
    partner_N = np.array(shuffled(range(len(data)), docs, subject.seed))
    vectors: dict[tuple[str, str], np.ndarray] = {
        ("training mean", "-"): np.broadcast_to(yardstick.mean_D, data.activations.shape),
        ("training mean, at the true norm", "-"): _unit(yardstick.mean_D) * norm,
    }
    vectors["another document's activation", "-"] = data.activations[partner_N]
    for ar in subject.reconstructors:
        sources: dict[str, Texts] = {f"AV {subject.main}": subject.texts()}
        if data.explanations is not None:
            sources = {"explainer texts": data.explanations} | sources
        for name, texts in sources.items():
            rebuilt = subject.rebuilt(ar, texts)
            vectors[name, ar] = _unit(rebuilt) * norm
    stacked_NVD = np.stack(list(vectors.values()), axis=1).astype(np.float32)
    kl_NV, there_ND = subject.target.divergence(data.contexts, stacked_NVD, desc="splice")
    # A stored text that is tokenized in another way than its document has another activation at its end.
    same_N = np.asarray(metrics.direction_mse(there_ND, data.activations)) < 0.02
    kept = np.flatnonzero(same_N)
    rows = []
    if len({docs[i] for i in kept}) > 1:
        ids, kept_docs = [subject.ids[i] for i in kept], [docs[i] for i in kept]
        baseline_N = kl_NV[kept, 0]
        for column, (name, ar) in enumerate(vectors):
            kl_N = kl_NV[kept, column]
            group = "nla" if name.startswith("AV") else "gold" if name == "explainer texts" else "control"
            figures = {
                "KL (nats)": Ratio.mean(kl_N, kept_docs),
                "share recovered": Ratio.explained(kl_N, baseline_N, kept_docs),
            }
            rows.append(Row(name, figures, group=group, labels={"AR": ar}, ids=ids))
    return Table(
        name="splice",
        title="Put back into the model",
        note="The KL divergence of the target's next token when the rebuilt direction, at the true norm, takes the "
        "activation's place, and the share of the training mean's damage that it undoes. The norm is told, not "
        "rebuilt: the mean at the true norm says what that alone undoes. "
        f"{len(data) - len(kept)} of {len(data)} rows are left out, whose stored text is read as other tokens.",
        rows=rows,
        plotted="share recovered",
    )


def _unit(vector: np.ndarray) -> np.ndarray:
    """Vectors scaled to norm 1; the zero vector stays zero."""
    return np.asarray(metrics.normalize(vector)) / np.sqrt(vector.shape[-1])
