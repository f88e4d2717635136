"""The round trip activation -> explanation -> activation on held-out documents, beside its controls.

Every system is a list of texts (or none) put through an AR and compared with the true activations; failed
explanations count as the training mean. Intervals are bootstrapped over documents.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from nla_jax.autoencoder import metrics
from nla_jax.data.batches import evaluation_batches
from nla_jax.data.dataset import ActivationDataset
from nla_jax.mesh import shard_batch, to_host
from nla_jax.training.rl import TextCodec

FIXED_TEXT = "This text is about a general topic and goes on with common words."
"""The same sentence for every activation, as a control."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated at the end, and how often on the way."""

    rows: int = 256
    """Held-out activations of the final evaluation."""
    monitor_rows: int = 128
    """Held-out activations looked at during training."""
    batch_size: int = 64
    temperature: float = 0.0
    """Temperature of the evaluated explanations; 0 takes the likeliest token."""
    bootstrap_samples: int = 2000
    examples: int = 20
    """Examples in the report."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Means of the training activations: the yardstick of every FVE."""

    mean_D: np.ndarray
    normalized_mean_D: np.ndarray

    @classmethod
    def of(cls, activations_ND: np.ndarray) -> "Moments":
        """Compute both means; the second is not normalized again."""
        return cls(activations_ND.mean(axis=0), np.asarray(metrics.mean_of_normalized(activations_ND)))


class RoundTrip:
    """Compiled verbalizing and reconstructing in batches of one size."""

    def __init__(self, codec: TextCodec, mesh: Mesh, batch_size: int):
        self.codec, self.mesh, self.batch_size = codec, mesh, batch_size
        verbalizer, T = codec.verbalizer, codec.max_explanation_tokens
        self._sample = jax.jit(
            lambda params, activations_ND, key, temperature: verbalizer.sample(
                params, activations_ND, key, group=1, max_tokens=T, temperature=temperature
            )
        )
        self._reconstruct = jax.jit(codec.reconstructor.__call__)

    def verbalize(
        self,
        av_params: Any,
        activations_ND: np.ndarray,
        key: jax.Array,
        temperature: float,
        desc: str | None = None,
    ) -> list[str | None]:
        """One explanation for each activation, None where extraction failed; `desc` shows a progress bar."""
        texts: list[str | None] = []
        batches = evaluation_batches({"activations_BD": activations_ND}, self.batch_size)
        quiet = desc is None or jax.process_index() > 0
        with tqdm(
            total=len(activations_ND), desc=desc, unit="text", dynamic_ncols=True, disable=quiet
        ) as bar:
            for index, (batch, real) in enumerate(batches):
                placed = shard_batch(batch["activations_BD"], self.mesh)
                samples = self._sample(
                    av_params, placed, jax.random.fold_in(key, index), np.float32(temperature)
                )
                texts += self.codec.decode(*to_host(samples.answers))[:real]
                bar.update(real)
        return texts

    def reconstruct(self, ar_params: Any, texts: Sequence[str | None]) -> np.ndarray:
        """Predicted activations (N, D), of meaningless norm; a failed text is read as empty."""
        width = self.codec.reconstructor.config.d_model
        rows = self.codec.encode(np.zeros((len(texts), width), np.float32), texts)
        return np.concatenate(
            [
                to_host(
                    self._reconstruct(
                        ar_params, *shard_batch((batch["prompts_BT"], batch["lengths_B"]), self.mesh)
                    )
                )[:real]
                for batch, real in evaluation_batches(rows, self.batch_size)
            ]
        )

    def fve_nrm(
        self, ar_params: Any, texts: Sequence[str | None], activations_ND: np.ndarray, moments: Moments
    ) -> float:
        """The held-out figure that training watches."""
        prediction_ND = self.reconstruct(ar_params, texts)
        failed_N = np.array([text is None for text in texts])
        prediction_ND = metrics.substitute_failed(prediction_ND, failed_N, moments.mean_D)
        return float(metrics.fve_nrm(prediction_ND, activations_ND, moments.normalized_mean_D))


def shuffled(texts: Sequence[Any], doc_ids: Sequence[str], seed: int) -> list[Any]:
    """Give every row the text of a row of another document."""
    order = np.random.default_rng(seed).permutation(len(texts))
    documents = np.array(doc_ids)
    for shift in range(1, len(texts)):
        partner = np.empty(len(texts), int)
        partner[order] = np.roll(order, shift)
        if (documents[partner] != documents).all():
            return [texts[i] for i in partner]
    # No single rotation avoids the row's own document: choose a partner for each row alone.
    rng = np.random.default_rng(seed)
    return [texts[rng.choice(np.flatnonzero(documents != own))] for own in documents]


def system_row(
    name: str,
    group: str,
    reconstructor: str,
    prediction_ND: np.ndarray,
    failed_N: np.ndarray,
    data: ActivationDataset,
    moments: Moments,
    scale: float,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """One row of the evaluation's table.

    Args:
      name: what is evaluated.
      group: "gold", "nla" or "control".
      reconstructor: "own", "judge" or "-".
      prediction_ND: reconstructions, before any rescaling.
      failed_N: rows without an explanation.
      data: held-out rows.
      moments: of the training activations.
      scale: factor for raw `fve`, fitted on training rows.
      config: bootstrap settings.
    """

    def result(terms: Callable, prediction: np.ndarray, mean: np.ndarray) -> dict[str, Any]:
        prediction = metrics.substitute_failed(prediction, failed_N, moments.mean_D)
        numerator_N, denominator_N = (np.asarray(x) for x in terms(prediction, data.activations, mean))
        samples = config.bootstrap_samples
        return dataclasses.asdict(
            metrics.fve_result(numerator_N, denominator_N, data.doc_ids, seed=0, samples=samples)
        )

    filled_ND = metrics.substitute_failed(prediction_ND, failed_N, moments.mean_D)
    return {
        "name": name,
        "group": group,
        "reconstructor": reconstructor,
        "fve_nrm": result(metrics.fve_nrm_terms, prediction_ND, moments.normalized_mean_D),
        "fve": result(metrics.fve_terms, prediction_ND * scale, moments.mean_D),
        "cosine_mean": float(1 - metrics.direction_mse(filled_ND, data.activations).mean() / 2),
        "failed_fraction": float(failed_N.mean()),
    }


def gain_row(
    name: str,
    reconstructor: str,
    before_ND: np.ndarray,
    after_ND: np.ndarray,
    data: ActivationDataset,
    moments: Moments,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """`fve_nrm` after less `fve_nrm` before, of the same rows, and its paired interval.

    Documents are resampled for both at once, so that what makes a document hard cancels.
    """
    (before_N, denominator_N), (after_N, _) = (
        map(np.asarray, metrics.fve_nrm_terms(prediction, data.activations, moments.normalized_mean_D))
        for prediction in (before_ND, after_ND)
    )
    # 1 - sum(d - before + after) / sum(d) is the difference of the two.
    numerator_N = denominator_N - before_N + after_N
    samples = config.bootstrap_samples
    gain = metrics.fve_result(numerator_N, denominator_N, data.doc_ids, seed=0, samples=samples)
    return {"name": name, "reconstructor": reconstructor, "fve_nrm": dataclasses.asdict(gain)}


def evaluate_texts(
    round_trip: RoundTrip,
    texts: Mapping[str, Sequence[str | None]],
    judges: Mapping[str, Any],
    training: ActivationDataset,
    data: ActivationDataset,
    moments: Moments,
    config: EvaluationConfig,
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, np.ndarray]]:
    """The table of systems and controls, and what each AV gains over the one before it.

    Args:
      round_trip: compiled functions.
      texts: AV name ("warm start", "after RL"), in order of training -> its explanation of each held-out row.
      judges: AR name ("own", "judge") -> params; each AV is put through each.
      training: rows with explainer texts, on which the scalar for raw `fve` is fitted.
      data: held-out rows with explainer texts.
      moments: of all training activations.
      config: bootstrap settings.
      seed: of the shuffled control.

    Returns:
      Rows as `system_row` makes them, rows as `gain_row` makes them, and the reconstructions of the last AV
      through each AR.
    """
    none_failed = np.zeros(len(data), bool)
    mean_ND = np.broadcast_to(moments.mean_D, data.activations.shape)
    rows = [system_row("training mean", "control", "-", mean_ND, none_failed, data, moments, 1.0, config)]
    gains, last = [], {}
    for judge, params in judges.items():
        fit_ND = round_trip.reconstruct(params, training.explanations)
        scale = float(metrics.least_squares_scale(fit_ND, training.activations))

        def add(name, group, written, judge=judge, params=params, scale=scale):
            prediction_ND = round_trip.reconstruct(params, written)
            failed_N = np.array([text is None for text in written])
            rows.append(system_row(name, group, judge, prediction_ND, failed_N, data, moments, scale, config))
            return metrics.substitute_failed(prediction_ND, failed_N, moments.mean_D)

        add("explainer texts", "gold", data.explanations)
        rebuilt = {}
        for name, written in texts.items():
            rebuilt[name] = add(f"AV {name}", "nla", written)
            add(f"AV {name}, shuffled", "control", shuffled(written, data.doc_ids, seed))
        for before, after in itertools.pairwise(rebuilt):
            pair = rebuilt[before], rebuilt[after]
            gains.append(gain_row(f"{after} over {before}", judge, *pair, data, moments, config))
        last[judge] = list(rebuilt.values())[-1]
        add("empty text", "control", [""] * len(data))
        add("fixed text", "control", [FIXED_TEXT] * len(data))
    return rows, gains, last
