"""Faithfulness: what explanations claim, how much of it is true, and whether the AR can tell.

A claim about the context is checked against the context; a claim about what comes next, against the words that the
target expects there and the words that did come.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain

import numpy as np
from sklearn.metrics import roc_auc_score

from nla_jax import text_analysis
from nla_jax.autoencoder import metrics
from nla_jax.data.splits import shuffled
from nla_jax.evaluation import chat_questions
from nla_jax.evaluation.estimates import Estimate, Ratio, bootstrap
from nla_jax.evaluation.subject import Subject, Texts
from nla_jax.evaluation.tables import Row, Table

RECURRENCE_TOKENS = 10
NEWLINE = " newline "
"""The word by which the built-in writer of warm-start texts stands for a line break."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """A claim, the held-out row that it is about, and whether evidence holds it."""

    claim: text_analysis.Claim
    row: int
    exact: bool
    """Whether the row's evidence holds the claim word for word."""
    stem: bool
    """Whether the row's evidence holds the claim by word stem."""
    exact_elsewhere: bool
    """As `exact`, for the evidence of another document; claims that are true of anything score there too."""
    stem_elsewhere: bool
    """As `stem`, for the evidence of another document."""

    @property
    def is_true(self) -> bool:
        """Whether the row's own evidence holds the claim."""
        return self.exact or self.stem


def measure(subject: Subject) -> list[Table]:
    """Claims, their recurrence over neighboring tokens, and what leaving each out costs."""
    subject.need("faithfulness", "contexts")
    sources: dict[str, Texts] = {f"AV {subject.main}": subject.texts()}
    if subject.data.explanations is not None:
        sources["explainer texts"] = subject.data.explanations
    checked = {name: check(subject, texts) for name, texts in sources.items()}
    main = checked[f"AV {subject.main}"]
    tables = [claims(subject, checked), left_out(subject, main), recurrence(subject)]
    if subject.places:
        tables.insert(1, claims_by_place(subject, checked))
    return tables if subject.chat is None else [*tables, claims_by_model(subject, sources)]


def evidence(subject: Subject) -> tuple[list[str], list[str]]:
    """For each row, its context, and the words expected after it or truly after it; a line break is a word too."""
    data = subject.data
    contexts = [f"{text}\n{text.replace(chr(10), NEWLINE)}" for text in data.contexts]
    nothing = [""] * len(data)
    words = [" ".join(row) for row in data.extra.get("next_words", [[]] * len(data))]
    after = data.extra.get("true_continuation", nothing)
    return contexts, [f"{a} {b}" for a, b in zip(words, after, strict=True)]


def check(subject: Subject, texts: Texts) -> list[Checked]:
    """All claims of texts, one text a row, each compared with the row's and with another document's evidence."""
    contexts, after = evidence(subject)
    frame = text_analysis.frame_words(text or "" for text in texts)
    partner = shuffled(range(len(texts)), subject.data.doc_ids, subject.seed)
    checked = []
    for row, text in enumerate(texts):
        for claim in text_analysis.claims(text or "", frame):
            source = after if claim.kind == "expectation" else contexts
            exact, stem = _says(claim, source[row], frame)
            exact_elsewhere, stem_elsewhere = _says(claim, source[partner[row]], frame)
            checked.append(
                Checked(
                    claim=claim,
                    row=row,
                    exact=exact,
                    stem=stem,
                    exact_elsewhere=exact_elsewhere,
                    stem_elsewhere=stem_elsewhere,
                )
            )
    return checked


def _says(claim: text_analysis.Claim, context: str, frame: Collection[str]) -> tuple[bool, bool]:
    """Whether the evidence holds a claim exactly, and by word stem."""
    if claim.kind == "detail":
        exact = text_analysis.stands_in(claim.text, context)
    else:
        exact = text_analysis.says_exactly(claim.text, context, frame)
    return exact, text_analysis.says_by_stem(claim.text, context, frame)


def claims(subject: Subject, checked: dict[str, list[Checked]]) -> Table:
    """Share of true claims by kind, beside the share that is true of another document."""
    rows, docs, n = [], subject.data.doc_ids, len(subject.data)
    for name, found in checked.items():
        margins = entailed(subject, found)
        for kind, meaning in text_analysis.KINDS.items():
            numbered = [(i, c) for i, c in enumerate(found) if c.claim.kind == kind]
            chosen = [c for _, c in numbered]
            if len({docs[c.row] for c in chosen}) < 2:
                continue
            of = [docs[c.row] for c in chosen]
            counts = Counter(c.row for c in chosen)
            figures = {
                "a text": Ratio.mean([counts[row] for row in range(n)], docs),
                "in the context": Ratio.mean([c.exact for c in chosen], of),
                "in another": Ratio.mean([c.exact_elsewhere for c in chosen], of),
                "by stem": Ratio.mean([c.is_true for c in chosen], of),
                "in another by stem": Ratio.mean([c.exact_elsewhere or c.stem_elsewhere for c in chosen], of),
            }
            judged = [(margins[i], docs[c.row]) for i, c in numbered if i in margins]
            if len({doc for _, doc in judged}) > 1:
                hits, of_judged = zip(*judged, strict=True)
                figures["made likelier"] = Ratio.mean([hit > 0 for hit in hits], of_judged)
            rows.append(Row(f"{kind}: {meaning}", figures, group=_group(name), labels={"texts": name}))
    return Table(
        name="claims",
        title="What explanations claim, and how much of it is true",
        note="Claims a text, and the share that stands in the context (claims about what comes next: among the "
        "target's expected words or in what came), word for word or by word stem, beside the same for another "
        "document. Made likelier: the target LM gives the claim a higher likelihood after its own context than "
        "after another; a half is chance.",
        rows=rows,
    )


def claims_by_place(subject: Subject, checked: Mapping[str, Sequence[Checked]]) -> Table:
    """Share of claims that are true of the row's own evidence, by kind and place."""
    rows, docs = [], subject.data.doc_ids
    rows_at = {place: set(at.tolist()) for place, at in subject.places.items()}
    for name, found in checked.items():
        for kind, meaning in text_analysis.KINDS.items():
            for place, at in rows_at.items():
                here = [c for c in found if c.claim.kind == kind and c.row in at]
                of = [docs[c.row] for c in here]
                if len(set(of)) > 1:
                    labels = {"texts": name, "place": place}
                    figures = {"by stem": Ratio.mean([c.is_true for c in here], of)}
                    rows.append(Row(f"{kind}: {meaning}", figures, group=_group(name), labels=labels))
    return Table(
        name="claims_by_place",
        title="How much of it is true, by place",
        note="The share of claims that stand in the context by word stem, as in the table above, at each place; n "
        "counts claims.",
        rows=rows,
    )


def entailed(subject: Subject, found: Sequence[Checked]) -> dict[int, float]:
    """Index of a claim -> its log-likelihood after its own context minus that after another's, for the first rows."""
    contexts, docs = subject.data.contexts, subject.data.doc_ids
    rows = range(min(subject.config.prediction_rows, len(contexts)))
    if len({docs[row] for row in rows}) < 2:
        return {}
    partner = shuffled(rows, [docs[row] for row in rows], subject.seed)
    # Every context is read once, with all claims that are compared in it.
    asked: dict[int, list[int]] = {row: [] for row in rows}
    for index, checked in enumerate(found):
        if checked.row in asked:
            asked[checked.row].append(index)
            asked[partner[checked.row]].append(index)
    most = max(map(len, asked.values()))
    if not most:
        return {}
    options = [
        [f" {found[i].claim.text}" for i in asked[row]] + [" ."] * (most - len(asked[row])) for row in rows
    ]
    nats_NG, _ = subject.target.log_likelihood([contexts[row] for row in rows], options, desc="claims")
    score = {(row, i): nats_NG[row, at] for row in rows for at, i in enumerate(asked[row])}
    chosen = [i for i, checked in enumerate(found) if checked.row in asked]
    return {i: score[found[i].row, i] - score[partner[found[i].row], i] for i in chosen}


def claims_by_model(subject: Subject, sources: Mapping[str, Texts]) -> Table:
    """As `claims`, on the first rows, with a chat model taking the claims out and checking them."""
    count = min(subject.config.prediction_rows, len(subject.data))
    docs, contexts, rows = subject.data.doc_ids[:count], subject.data.contexts[:count], []
    for name, texts in sources.items() if len(set(docs)) > 1 else ():
        elsewhere = shuffled(contexts, docs, subject.seed)
        listed = chat_questions.claims(subject.chat, texts[:count], desc=f"claims of {name}")
        found = [claimed or [] for claimed in listed]
        own, other = (
            list(chain(*chat_questions.verdicts(subject.chat, found, where, desc=f"claims of {name}")))
            for where in (contexts, elsewhere)
        )
        at = [(row, kind) for row, claimed in enumerate(found) for kind, _ in claimed]
        for chosen_kind in (None, *chat_questions.KINDS):
            chosen = [i for i, (_, kind) in enumerate(at) if chosen_kind in (None, kind)]
            of, counts = [docs[at[i][0]] for i in chosen], Counter(at[i][0] for i in chosen)
            figures = {"a text": Ratio.mean([counts[row] for row in range(count)], docs)}
            if chosen_kind is None:
                figures["lists not read"] = Ratio.mean([claimed is None for claimed in listed], docs)
            if len(set(of)) > 1:
                for verdict in (*chat_questions.VERDICTS, None):
                    label = verdict or "checks not read"
                    figures[label] = Ratio.mean([own[i] == verdict for i in chosen], of)
                    figures[f"{label}, another"] = Ratio.mean([other[i] == verdict for i in chosen], of)
            labels = {"texts": name, "checked by": subject.chat.name}
            rows.append(Row(chosen_kind or "all claims", figures, group=_group(name), labels=labels))
    return Table(
        name="claims_by_model",
        title="The same, taken out and checked by a chat model",
        note="Claims a text, and what the chat model says of them before the context, and before another document's "
        "(another): what is supported there is true of anything. Not read: answers that were no JSON list of what was "
        "asked for. A text whose list was not read has no claims; a check that was not read is no verdict.",
        rows=rows,
    )


def _group(source: str) -> str:
    return "gold" if source == "explainer texts" else "nla"


def left_out(subject: Subject, found: Sequence[Checked]) -> Table:
    """The loss of reconstruction without a claim, and how well that loss tells true claims from false ones."""
    texts, docs = subject.texts(), subject.data.doc_ids
    rows = []
    for ar in subject.pair if found else ():
        whole_N = np.asarray(metrics.direction_mse(subject.rebuilt(ar, texts), subject.data.activations))
        at = np.array([c.row for c in found], int)
        without = subject.rebuilt(ar, [c.claim.rest for c in found])
        loss = np.asarray(metrics.direction_mse(without, subject.data.activations[at])) - whole_N[at]
        for kind in (None, *text_analysis.KINDS):
            chosen = [i for i, c in enumerate(found) if kind in (None, c.claim.kind)]
            of = [docs[found[i].row] for i in chosen]
            if len(set(of)) < 2:
                continue
            true = np.array([found[i].is_true for i in chosen])
            figures = {"all": Ratio.mean(loss[chosen], of), "AUROC": _auroc(true, loss[chosen], of)}
            for name, mask in (("true", true), ("false", ~true)):
                some = np.flatnonzero(mask)
                enough = len({of[i] for i in some}) > 1
                figures[name] = Ratio.mean(loss[chosen][some], [of[i] for i in some]) if enough else None
            rows.append(Row(kind or "all claims", figures, labels={"AR": ar}))
    return Table(
        name="left_out",
        title="What the AR loses without a claim",
        note="Rise of the direction MSE when one claim is left out: large for claims that it relies on. AUROC: how "
        "well that rise tells true claims from false ones; 0.5 is chance.",
        rows=rows,
    )


def _auroc(true: np.ndarray, score: np.ndarray, docs: Sequence[str]) -> Estimate | None:
    def auroc(weights: np.ndarray) -> float:
        kept = weights > 0
        if len(set(true[kept])) < 2:
            return float("nan")
        return roc_auc_score(true[kept], score[kept], sample_weight=weights[kept])

    return bootstrap(auroc, docs) if len(set(true)) > 1 else None


def recurrence(subject: Subject) -> Table:
    """Whether what is claimed at a token is also claimed at the tokens before it."""
    data, target, count = subject.data, subject.target, subject.config.recurrence_rows
    long = [i for i, text in enumerate(data.contexts) if len(target.encode(text)) > RECURRENCE_TOKENS][:count]
    rows = []
    if len({data.doc_ids[i] for i in long}) > 1:
        activations_NPD = target.activations([data.contexts[i] for i in long], RECURRENCE_TOKENS)
        flat = subject.explain(activations_NPD.reshape(-1, activations_NPD.shape[-1]), desc="last tokens")
        texts = np.array([text or "" for text in flat], object).reshape(len(long), RECURRENCE_TOKENS)
        frame = text_analysis.frame_words(texts.ravel())
        docs = [data.doc_ids[i] for i in long]
        partner = shuffled(range(len(long)), docs, subject.seed)
        seen: dict[str, list[tuple[float, float, str]]] = {}
        for row, doc in enumerate(docs):
            for claim in text_analysis.claims(texts[row, -1], frame):
                again, elsewhere = (
                    np.mean(
                        [text_analysis.says_by_stem(claim.text, text, frame) for text in texts[where, :-1]]
                    )
                    for where in (row, partner[row])
                )
                seen.setdefault(claim.kind, []).append((again, elsewhere, doc))
        for kind in text_analysis.KINDS:
            if len({doc for *_, doc in seen.get(kind, [])}) > 1:
                again, elsewhere, of = zip(*seen[kind], strict=True)
                figures = {"same document": Ratio.mean(again, of), "another": Ratio.mean(elsewhere, of)}
                rows.append(Row(kind, figures))
    return Table(
        name="recurrence",
        title=f"Does a claim recur over the last {RECURRENCE_TOKENS} tokens?",
        note="Share of the other tokens' explanations that hold the words of a claim made at the last token. What is "
        "true of the text should recur more often than in another document; what is about the next token need "
        "not.",
        rows=rows,
    )
