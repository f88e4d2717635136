"""Degeneracy: copying, private codes, and texts that nobody could read."""

from collections.abc import Sequence

import numpy as np

from nla_jax import text_analysis
from nla_jax.evaluation import rewrites
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.subject import Subject, Texts
from nla_jax.evaluation.tables import Figure, Row, Table
from nla_jax.process import progress_bar

LONG_SPAN = 8
"""Number of words from which on a copied span counts as long."""


def measure(subject: Subject) -> list[Table]:
    """Copying, rewriting, private codes and readability."""
    subject.need("degeneracy", "contexts")
    rewritten = rewriting(subject)
    tables = [copying(subject), rewritten, private_code(subject), readability(subject)]
    return (
        [*tables, runs_by_place(subject), rewriting_by_place(subject, rewritten)]
        if subject.places
        else tables
    )


def _sources(subject: Subject) -> dict[str, Texts]:
    sources: dict[str, Texts] = {f"AV {name}": subject.texts(name) for name in subject.verbalizers}
    if subject.data.explanations is not None:
        sources["explainer texts"] = subject.data.explanations
    return sources


def _group(name: str) -> str:
    return "gold" if name == "explainer texts" else "nla"


def _share(pairs: Sequence[tuple[int, int]], docs: Sequence[str]) -> Ratio | None:
    hits, totals = np.array(pairs, float).reshape(-1, 2).T
    return Ratio.of(hits, totals, docs) if totals.sum() else None


def _copied(subject: Subject, texts: Texts) -> dict[str, Figure]:
    """What of the texts stands in their contexts word for word."""
    data = subject.data
    both = [(text or "", context) for text, context in zip(texts, data.contexts, strict=True)]
    spans = np.array([text_analysis.longest_copied_span(*pair) for pair in both])
    return {
        "copied 3-grams": _share([text_analysis.copied_ngrams(*pair) for pair in both], data.doc_ids),
        "longest span (words)": Ratio.mean(spans, data.doc_ids),
        f"spans of {LONG_SPAN} words or more": Ratio.mean(spans >= LONG_SPAN, data.doc_ids),
    }


def _repeated(subject: Subject, texts: Texts) -> dict[str, Figure]:
    """What the texts say twice, and what other documents' texts say too."""
    written, docs = [text or "" for text in texts], subject.data.doc_ids
    return {
        "repeated 2-grams": _share([text_analysis.repeated_ngrams(text) for text in written], docs),
        "boilerplate 4-grams": _share(text_analysis.boilerplate(written, docs), docs),
    }


def copying(subject: Subject) -> Table:
    """How much of the texts stands in the context word for word."""
    rows = [
        Row(name, _copied(subject, texts), group=_group(name), ids=subject.ids)
        for name, texts in _sources(subject).items()
    ]
    return Table(
        name="copying",
        title="Copying from the context",
        note="The share of a text's runs of three words that stand in the context, and the longest run of words that "
        "both share. The explainer's texts say how much quoting is in the form; more than that is an AV that "
        "recites.",
        rows=rows,
    )


def runs_by_place(subject: Subject) -> Table:
    """Copying and repetition at each place, the AV's beside the explainer's own."""
    measured = {
        name: _copied(subject, texts) | _repeated(subject, texts) for name, texts in _sources(subject).items()
    }
    rows = []
    for place, at in subject.places.items():
        for name, figures in measured.items():
            here = {key: ratio.take(at) if ratio else None for key, ratio in figures.items()}
            # Texts without a run of so many words have no share of such runs.
            defined = {
                key: ratio if ratio and ratio.denominator_N.any() else None for key, ratio in here.items()
            }
            ids = [subject.ids[row] for row in at]
            rows.append(Row(name, defined, group=_group(name), labels={"place": place}, ids=ids))
    return Table(
        name="runs_by_place",
        title="Copying and repetition by place",
        note="The figures of the tables of copying and readability at each place, where the explainer's texts tell how "
        "much of it is in the form. A text at the start of an answer that quotes the request is no explanation.",
        rows=rows,
    )


def rewriting_by_place(subject: Subject, rewritten: Table) -> Table:
    """What rewritten explanations keep at each place around the place's own mean, through the judge that counts."""
    rows = []
    for row in rewritten.rows:
        if row.labels["AR"] != subject.judge:
            continue
        some = slice(len(row.ids))
        before = subject.text_figures(subject.judge, subject.texts()[some], some)["fve_nrm"]
        before, after = (
            subject.by_place(subject.around_places(ratio, some), some)
            for ratio in (before, row.figures["fve_nrm"])
        )
        for place, (changed, ids) in after.items():
            if (kept := share_kept(before[place][0], changed)) is not None:
                rows.append(Row(row.name, {"kept": kept}, labels={**row.labels, "place": place}, ids=ids))
    return Table(
        name="rewriting_by_place",
        title="The same meaning in other words, by place",
        note="The share of the fve_nrm around the place's own mean that rewritten explanations keep. A place where the "
        "originals explain next to nothing has no such share.",
        rows=rows,
    )


def rewriting(subject: Subject) -> Table:
    """FVE of rewritten explanations, with and without their quotes."""
    rows: list[Row] = []

    def add(name: str, quotes: bool, texts: Texts, changed: Texts) -> None:
        count = len(changed)
        for ar in subject.pair:
            before, after = (
                subject.text_figures(ar, some, slice(count))["fve_nrm"] for some in (texts, changed)
            )
            labels = {"quotes": "kept" if quotes else "taken out", "AR": ar}
            rows.append(
                Row(
                    name,
                    {
                        "fve_nrm": after,
                        "kept": share_kept(before, after),
                        "empty": Ratio.mean([not text for text in changed], after.doc_ids),
                    },
                    group="nla",
                    labels=labels,
                    ids=subject.ids[:count],
                )
            )

    texts = subject.texts()[: subject.config.rewrite_rows]
    for name, edit in rewrites.RULES.items():
        for quotes in (True, False):
            add(name, quotes, texts, rewrites.edited(texts, edit, quotes=quotes, seed=subject.seed))
    texts = texts[: subject.config.generated_rows]
    for name, requests in rewrites.ASKED.items() if texts else ():
        write = _writer(subject, name)
        for quotes in (True, False):
            changed = rewrites.asked(texts, requests, write, quotes=quotes)
            add(f"{name} by the target LM", quotes, texts, changed)
    return Table(
        name="rewriting",
        title="The same meaning in other words",
        note="FVE of rewritten explanations, and the share of the original's that is kept. A text that means what it "
        "says survives its order and wording being changed; a private code does not. A weak model's paraphrases "
        "lose meaning too: compare own and judge. Empty: the share of texts of which nothing is left, or that had "
        "failed before.",
        rows=rows,
    )


def share_kept(before: Ratio, after: Ratio) -> Ratio | None:
    """The share of the explained variance before a change that is still explained after; None if it was near zero."""
    explains = before.numerator_N.sum() > 0.05 * before.denominator_N.sum()
    return Ratio.of(after.numerator_N, before.numerator_N, after.doc_ids) if explains else None


def _writer(subject: Subject, name: str) -> rewrites.Writer:
    answers: dict[str, str] = {}

    def write(requests: Sequence[str]) -> list[str]:
        fresh = [request for request in dict.fromkeys(requests) if request not in answers]
        with progress_bar(name, len(fresh), "text") as bar:
            for request, answer in subject.target.writer(fresh, max_tokens=48):
                answers[request] = answer
                bar.update()
        return [answers[request] for request in requests]

    return write


def private_code(subject: Subject) -> Table:
    """How much better the AV's own AR reads it than each judge does."""
    rows = []
    if "own" in subject.reconstructors:
        for judge in subject.judges:
            for name in subject.verbalizers:
                texts = subject.texts(name)
                own, other = (subject.text_figures(ar, texts)["fve_nrm"] for ar in ("own", judge))
                rows.append(Row(f"AV {name}", {"own minus judge": own.over(other)}, labels={"AR": judge}))
    return Table(
        name="private_code",
        title="Private code: own AR minus judge",
        note="What only the AR that trained with the AV can read. Near zero, the texts mean to others what they mean "
        "to it. The line of the warm start shows how the two ARs differ on texts that neither of them shaped.",
        rows=rows,
    )


def readability(subject: Subject) -> Table:
    """Whether texts are fluent, differ between documents, and are read back as the tokens that were sampled."""
    data, rows = subject.data, []
    for name, texts in _sources(subject).items():
        written = [text or "" for text in texts]
        # A failed text has no tokens; the full stop that is read in its place does not count.
        nats, tokens = subject.target.log_likelihood(
            [""] * len(written), [[f" {text or '.'}"] for text in written]
        )
        readable_N = np.array([bool(text) for text in written])
        figures = {
            "nats a token": Ratio.of(-nats[:, 0] * readable_N, tokens[:, 0] * readable_N, data.doc_ids)
            if readable_N.any()
            else None,
            **_repeated(subject, texts),
            "letters outside ASCII": _share(
                [text_analysis.foreign_letters(text) for text in written], data.doc_ids
            ),
            "failed": Ratio.mean([text is None for text in texts], data.doc_ids),
        }
        if subject.marker is not None:
            figures["with the marker"] = Ratio.mean(
                [subject.marker in text for text in written], data.doc_ids
            )
        if name == f"AV {subject.main}" and subject.tokens_of is not None:
            figures["read as other tokens"] = Ratio.mean(_retokenized(subject, texts), data.doc_ids)
        rows.append(Row(name, figures, group=_group(name), ids=subject.ids))
    return Table(
        name="readability",
        title="Readability and drift",
        note="Surprise of the target LM at a text (nats a token), repetition inside a text, runs of four words that "
        "other documents' texts have too, and signs of drift: foreign letters, the marker, tokens that the text "
        "is not read back as.",
        rows=rows,
    )


def sampled_tokens(subject: Subject) -> list[list[int]]:
    """The tokens of `subject.texts()`, sampled in the same way."""
    return subject.tokens_of(subject.data.activations, temperature=subject.config.temperature, seed=0)


def _retokenized(subject: Subject, texts: Texts) -> list[bool]:
    """For each text, whether tokenizing it gives other tokens than were sampled."""
    tokenizer = subject.target.tokenizer
    return [
        text is not None and tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != list(ids)
        for text, ids in zip(texts, sampled_tokens(subject), strict=True)
    ]
