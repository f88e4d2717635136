"""Watches joint training: the texts that the AV writes about fixed held-out activations, and their figures."""

from collections.abc import Mapping

from nla_jax import text_analysis
from nla_jax.data.splits import shuffled
from nla_jax.pipeline.run import Run
from nla_jax.randomness import key_for
from nla_jax.training.guards import judge_drop
from nla_jax.training.loop import States


class Monitor:
    """Measures AV and AR on held-out documents during joint training, as `run_stage` asks for it."""

    def __init__(self, run: Run):
        """Read the rows that training is watched on."""
        self.run = run
        self.rows = run.monitored(run.config.evaluation.monitor_rows)
        self.other = shuffled(range(len(self.rows)), self.rows.doc_ids, run.config.seed)

    def __call__(self, states: States, highest: Mapping[str, float], step: int) -> dict[str, float]:
        """Figures of the texts that the AV writes now.

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
        swapped = [texts[i] for i in self.other]
        row = {
            "own_fve_nrm": yardstick.fve_nrm(own, texts, rows.activations),
            "judge_fve_nrm": yardstick.fve_nrm(judge, texts, rows.activations),
            "shuffled_fve_nrm": yardstick.fve_nrm(judge[self.other], swapped, rows.activations),
            "repeated": text_analysis.share(text_analysis.repeated_ngrams(text or "") for text in texts),
        }
        if rows.contexts is not None:
            pairs = zip(texts, rows.contexts, strict=True)
            row["copied"] = text_analysis.share(
                text_analysis.copied_ngrams(text or "", context) for text, context in pairs
            )
        # A share of nothing, as of texts that all failed, is not logged.
        known = {name: value for name, value in row.items() if value is not None}
        return known | {"judge_drop": judge_drop(known, highest)}
