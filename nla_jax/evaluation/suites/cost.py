"""Cost: the tokens and seconds that an explanation takes, and the FVE that it brings for them."""

import functools
import time

import numpy as np
from jaxtyping import Float

from nla_jax.evaluation.estimates import Ratio, bootstrap
from nla_jax.evaluation.subject import Subject
from nla_jax.evaluation.tables import Row, Table


def measure(subject: Subject) -> list[Table]:
    """Tokens and seconds an explanation, and FVE for ten tokens."""
    data, target, rows = subject.data, subject.target, []
    for name in subject.verbalizers:
        texts = subject.texts(name)
        tokens_N = np.array([len(target.continuation(text or "")) for text in texts], float)
        figures = {
            "tokens": Ratio.mean(tokens_N, data.doc_ids),
            "seconds": Ratio.mean(_seconds(subject, name), data.doc_ids),
        }
        for ar in subject.reconstructors if tokens_N.any() else ():
            fve = subject.text_figures(ar, texts)["fve_nrm"]

            def per_token(weights_N, fve=fve, tokens_N=tokens_N) -> float:
                explained = weights_N @ fve.numerator_N / (weights_N @ fve.denominator_N)
                return float(10 * explained * weights_N.sum() / (weights_N @ tokens_N))

            figures[f"10 tokens' fve_nrm, {ar}"] = bootstrap(per_token, data.doc_ids)
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
            note="Tokens, none for a failed explanation; seconds, which are a batch's time over its rows, on this "
            "machine, with the weights loaded and the programs compiled; and ten times the fve_nrm over the "
            "mean number of tokens.",
            rows=rows,
        )
    ]


def _seconds(subject: Subject, name: str) -> Float[np.ndarray, "N"]:
    """The time of each held-out row's batch over the batch's rows, in seconds."""
    activations_ND, size = subject.data.activations, subject.config.batch_size
    write = functools.partial(subject.verbalizers[name], temperature=subject.config.temperature, seed=1)
    batches = [activations_ND[start : start + size] for start in range(0, len(activations_ND), size)]
    # The first and the last batch, which may be smaller, load the weights and compile.
    write(batches[0])
    write(batches[-1])
    seconds = []
    for batch_BD in batches:
        started = time.perf_counter()
        write(batch_BD)
        seconds += [(time.perf_counter() - started) / len(batch_BD)] * len(batch_BD)
    return np.array(seconds)
