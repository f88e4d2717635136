"""Cost: the tokens and seconds that an explanation takes, and the FVE that it brings for them."""

import time

import numpy as np

from nla_jax.evaluation.estimates import Ratio, bootstrap
from nla_jax.evaluation.subject import Subject
from nla_jax.evaluation.tables import Row, Table


def measure(subject: Subject) -> list[Table]:
    """Tokens and seconds an explanation, and FVE a token."""
    data, target, rows = subject.data, subject.target, []
    for name in subject.verbalizers:
        texts = subject.texts(name)
        tokens_N = np.array([len(target.continuation(text or "")) for text in texts], float)
        # The second run over the rows is timed: the first one compiled.
        started = time.perf_counter()
        subject.verbalizers[name](data.activations, temperature=subject.config.temperature, seed=1)
        seconds_N = np.full(len(data), (time.perf_counter() - started) / len(data))
        figures = {
            "tokens": Ratio.mean(tokens_N, data.doc_ids),
            "seconds": Ratio.mean(seconds_N, data.doc_ids),
        }
        for ar in subject.reconstructors if tokens_N.any() else ():
            fve = subject.text_figures(ar, texts)["fve_nrm"]

            def per_token(weights_N, fve=fve, tokens_N=tokens_N) -> float:
                explained = weights_N @ fve.numerator_N / (weights_N @ fve.denominator_N)
                return float(10 * explained * weights_N.sum() / (weights_N @ tokens_N))

            figures[f"fve_nrm per 10 tokens, {ar}"] = bootstrap(per_token, data.doc_ids)
        rows.append(Row(f"AV {name}", figures, ids=subject.ids))
    if data.explanations is not None:
        tokens_N = [len(target.continuation(text)) for text in data.explanations]
        rows.append(
            Row(
                "explainer texts",
                {"tokens": Ratio.mean(tokens_N, data.doc_ids)},
                group="gold",
                ids=subject.ids,
            )
        )
    return [
        Table(
            name="cost",
            title="What an explanation costs",
            note="Tokens, seconds (a batch's time over its rows, on this machine), and what ten tokens bring.",
            rows=rows,
        )
    ]
