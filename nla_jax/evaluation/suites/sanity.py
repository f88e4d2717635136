"""Sanity: planted systems whose figures are known, to see that the evaluation itself can be trusted."""

from nla_jax.evaluation import rewrites
from nla_jax.evaluation.planted import cheaters
from nla_jax.evaluation.subject import Subject
from nla_jax.evaluation.suites.degeneracy import copying, share_kept
from nla_jax.evaluation.tables import Row, Table

SYSTEMS = {
    "oracle (ĥ = h)": cheaters.oracle,
    "training mean": cheaters.mean,
    "copies the context": cheaters.copier,
    "private code": cheaters.private_code,
}


def measure(subject: Subject) -> list[Table]:
    """One table: a line for each planted system, beside the evaluated AV."""
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
        )
    ]


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
