"""Watches joint training: what the AV writes about fixed held-out activations, and the figures of these texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nla_jax import text_analysis
from nla_jax.autoencoder import metrics
from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.splits import hash_fraction, shuffled
from nla_jax.evaluation.subject import PLACE_ROWS
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.watched_tasks import watched_tasks
from nla_jax.randomness import key_for
from nla_jax.training.guards import excess, judge_drop
from nla_jax.training.loop import States

WATCHED = 8
"""Activations whose texts are kept at each evaluation."""
CONTEXT_CHARACTERS = 240
"""Characters of the end of a context that are kept with a text."""

Texts = Sequence[str | None]


class Monitor:
    """Measures AV and AR on held-out documents during joint training, as `run_stage` asks for it."""

    def __init__(self, run: Run):
        """Read the rows that training is watched on, and the activations of planted texts if there are any."""
        self.run = run
        self.rows = run.monitored(run.config.evaluation.monitor_rows)
        self.other = shuffled(range(len(self.rows)), self.rows.doc_ids, run.config.seed)
        self.watched = watched_rows(self.rows, run.config.seed)
        self.tasks = watched_tasks(run)

    def __call__(self, states: States, highest: Mapping[str, float], step: int) -> dict[str, float]:
        """Figures of the texts that the AV writes now; a few of the texts go into the run's history.

        Args:
          states: of "av" and "ar".
          highest: the highest value of each figure so far.
          step: rounds that were made.
        """
        run, rows = self.run, self.rows
        models, yardstick = run.models, run.yardstick
        key, temperature = key_for(run.config.seed, "monitor"), run.config.evaluation.temperature
        verbalizer = models.with_base("av", states["av"].params)
        texts = models.round_trip.verbalize(verbalizer, rows.activations, key, temperature)
        own, judge = (
            models.round_trip.reconstruct(params, texts)
            # The judge is read anew each time: held all along, it would cost as much memory as the AR itself.
            for params in (
                models.with_base("ar", states["ar"].params),
                models.warm_start_params("ar"),
            )
        )
        run.log.write_texts("rl", step, history_rows(rows, self.watched, texts, judge))
        swapped = [texts[i] for i in self.other]
        figures = {
            "own_fve_nrm": yardstick.fve_nrm(own, texts, rows.activations),
            "judge_fve_nrm": yardstick.fve_nrm(judge, texts, rows.activations),
            "shuffled_fve_nrm": yardstick.fve_nrm(judge[self.other], swapped, rows.activations),
            **fve_by_place("judge_fve_nrm", yardstick, judge, texts, rows),
            **text_shares(texts, rows),
        }
        if self.tasks is not None:
            about = models.round_trip.verbalize(verbalizer, self.tasks.activations_ND, key, temperature)
            figures |= self.tasks.figures(about)
        return figures | {"judge_drop": judge_drop(figures, highest)} | excess(figures)


def watched_rows(rows: ActivationDataset, seed: int, count: int = WATCHED) -> list[int]:
    """Indices of the rows whose texts are kept: of each place in turn the next in an order that a key decides.

    Rows of one document come after those of documents that have none yet.
    """
    ids = rows.row_ids
    places = rows.extra.get("place", [None] * len(rows))
    order = sorted(range(len(rows)), key=lambda i: hash_fraction(ids[i], seed=seed, purpose="watched"))
    chosen: list[int] = []
    while len(chosen) < min(count, len(rows)):
        for place in sorted(set(places), key=str):
            left = [i for i in order if places[i] == place and i not in chosen]
            documents = {rows.doc_ids[i] for i in chosen}
            left.sort(key=lambda i: rows.doc_ids[i] in documents)
            chosen += left[:1]
    return chosen[:count]


def history_rows(
    rows: ActivationDataset, watched: Sequence[int], texts: Texts, judge_ND: Float[np.ndarray, "N D"]
) -> list[dict[str, Any]]:
    """What the history keeps of each watched row.

    Args:
      rows: those that training is watched on.
      watched: indices of those whose texts are kept.
      texts: what the AV writes about each row now.
      judge_ND: what the judge rebuilds from the texts. Its cosine with the activation is kept; None for a text that
        failed.
    """
    cosine_N = 1 - np.asarray(metrics.direction_mse(judge_ND, rows.activations)) / 2
    ids, nothing = rows.row_ids, [None] * len(rows)
    places, contexts = rows.extra.get("place", nothing), rows.contexts or [""] * len(rows)
    return [
        {
            "id": ids[i],
            "place": places[i],
            "context_tail": contexts[i][-CONTEXT_CHARACTERS:],
            "writer_text": (rows.explanations or nothing)[i],
            "text": texts[i],
            "cosine": None if texts[i] is None else float(cosine_N[i]),
        }
        for i in watched
    ]


def fve_by_place(
    name: str,
    yardstick: Yardstick,
    rebuilt_ND: Float[np.ndarray, "N D"],
    texts: Texts,
    rows: ActivationDataset,
) -> dict[str, float]:
    """`fve_nrm` of the rows of each place around that place's own mean, as `NAME_PLACE`.

    Places with fewer than `PLACE_ROWS` rows have none, and there is none at all in data that does not tell places.
    """
    figures = {}
    places = rows.extra.get("place", [])
    for place in sorted({place for place in places if place is not None}):
        at = [i for i, one in enumerate(places) if one == place]
        if len(at) >= PLACE_ROWS:
            of_place = [texts[i] for i in at]
            figures[f"{name}_{place}"] = yardstick.fve_nrm(
                rebuilt_ND[at], of_place, rows.activations[at], [place] * len(at)
            )
    return figures


def text_shares(texts: Texts, rows: ActivationDataset) -> dict[str, float]:
    """How much texts repeat and copy, and how much the writer's texts about the same rows repeat.

    Returns:
      `repeated`, the share of a text's 2-grams that it has said before; `boilerplate`, the share of its 4-grams that
      stand in texts about other documents too; both of the writer's texts, as `writer_repeated` and so on; and
      `copied`, the share of its 3-grams that stand in its context. A share of nothing, as of texts that all failed, is
      left out, and so is what the rows have no column for.
    """
    shares = _repetition(texts, rows.doc_ids)
    if rows.explanations is not None:
        written = _repetition(rows.explanations, rows.doc_ids)
        shares |= {f"writer_{name}": value for name, value in written.items()}
    if rows.contexts is not None:
        pairs = zip(texts, rows.contexts, strict=True)
        shares["copied"] = text_analysis.share(
            text_analysis.copied_ngrams(text or "", context) for text, context in pairs
        )
    return {name: value for name, value in shares.items() if value is not None}


def _repetition(texts: Texts, doc_ids: Sequence[str]) -> dict[str, float | None]:
    read = [text or "" for text in texts]
    return {
        "repeated": text_analysis.share(map(text_analysis.repeated_ngrams, read)),
        "boilerplate": text_analysis.share(text_analysis.boilerplate(read, doc_ids)),
    }
