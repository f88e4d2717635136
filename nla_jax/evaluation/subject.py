"""The subject of an evaluation: an NLA, or several stages of one, with held-out rows and a yardstick.

Suites see texts and vectors only, through two protocols, so that they can measure a foreign NLA or a trivial baseline
like one of ours.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from nla_jax.autoencoder import metrics
from nla_jax.autoencoder.round_trip import finite
from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.chat.models import ChatModel
from nla_jax.data.dataset import ActivationDataset
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.tables import Figure, Row
from nla_jax.evaluation.target_lm import TargetLM

Texts = Sequence[str | None]
"""Explanations; None stands for one that failed, so that no text could be read."""


@runtime_checkable
class ExplainFn(Protocol):
    """A function that explains activations in text."""

    def __call__(
        self, activations_ND: np.ndarray, *, temperature: float = 0.0, seed: int = 0, desc: str | None = None
    ) -> list[str | None]:
        """One explanation for each raw activation."""


@runtime_checkable
class RebuildFn(Protocol):
    """A function that rebuilds activations from texts."""

    def __call__(self, texts: Texts) -> np.ndarray:
        """One vector (N, D) for each text; its norm may be meaningless."""


@runtime_checkable
class TokensFn(Protocol):
    """A function that tells the tokens of which an `ExplainFn` makes its texts."""

    def __call__(
        self, activations_ND: np.ndarray, *, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        """The sampled tokens of each explanation that is written with the same arguments, without its closing."""


@dataclasses.dataclass(eq=False)
class Subject:
    """An NLA under evaluation.

    Attributes:
      data: held-out rows.
      training: rows with warm-start texts that the NLA was trained on; baselines are fitted on them.
      yardstick: means of all training activations, which figures are measured against.
      verbalizers: AVs by name, in order of training; the last is the one that every suite measures.
      reconstructors: ARs by name: "own" was trained together with the AV, all others are judges that were not.
      load_target: loads the target LM; called when a suite first needs it.
      config: suites and sizes of the evaluation.
      seed: seed of every random choice.
      tokens_of: the tokens of the last AV's explanations; None if it has no tokens.
      marker: the text of the injected token, which no explanation should contain.
      chat: a chat model that answers questions and checks claims beside the target LM; `measure_suites` opens it where
        the config names one.
    """

    data: ActivationDataset
    training: ActivationDataset | None
    yardstick: Yardstick
    verbalizers: Mapping[str, ExplainFn]
    reconstructors: Mapping[str, RebuildFn]
    load_target: Callable[[], TargetLM]
    config: EvaluationConfig = EvaluationConfig()
    seed: int = 0
    tokens_of: TokensFn | None = None
    marker: str | None = None
    chat: ChatModel | None = None

    def __post_init__(self):
        self._texts: dict[Any, list[str | None]] = {}
        self._rebuilt: dict[str, dict[str, np.ndarray]] = {name: {} for name in self.reconstructors}

    @functools.cached_property
    def target(self) -> TargetLM:
        """The target LM."""
        return self.load_target()

    @property
    def main(self) -> str:
        """Name of the AV that is evaluated."""
        return list(self.verbalizers)[-1]

    @property
    def judges(self) -> list[str]:
        """Names of the ARs that never saw the evaluated AV's texts."""
        return [name for name in self.reconstructors if name != "own"]

    @property
    def judge(self) -> str:
        """Name of the AR whose figures count: the first judge, or the AV's own AR if there is no judge."""
        return (self.judges or ["own"])[0]

    @property
    def pair(self) -> list[str]:
        """Names of the AV's own AR and of the judge that counts, for tables in which further judges add nothing."""
        return list(dict.fromkeys(name for name in ("own", self.judge) if name in self.reconstructors))

    @functools.cached_property
    def ids(self) -> list[str]:
        """Names of the held-out rows, the same in every run on the same data."""
        return [f"{doc}@{n}" for doc, n in zip(self.data.doc_ids, self.data.n_raw_tokens, strict=True)]

    def need(self, suite: str, *columns: str) -> None:
        """Check that the held-out rows have the columns that a suite reads.

        Raises:
          ValueError: a column is missing; the message names it.
        """
        has = {
            "contexts": self.data.contexts is not None,
            "explanations": self.data.explanations is not None,
            "training rows": self.training is not None,
        } | dict.fromkeys(self.data.extra, True)
        if missing := [column for column in columns if not has.get(column)]:
            raise ValueError(
                f"the suite {suite!r} needs {', '.join(missing)}, which the held-out data does not carry; choose "
                "other suites (evaluation.suites), or data with these columns"
            )

    def texts(self, name: str | None = None, *, sample: int | None = None) -> list[str | None]:
        """Explanations of the held-out rows by an AV, the evaluated one by default.

        Args:
          name: name of the AV.
          sample: None for the evaluation's own temperature, else the index of a sample at temperature 1.
        """
        name = name or self.main
        if (name, sample) not in self._texts:
            temperature, seed = (self.config.temperature, 0) if sample is None else (1.0, 1 + sample)
            self._texts[name, sample] = self.verbalizers[name](
                self.data.activations, temperature=temperature, seed=seed, desc=f"explain ({name})"
            )
        return self._texts[name, sample]

    def explain(self, activations_ND: np.ndarray, desc: str | None = None) -> list[str | None]:
        """Explanations of other activations by the evaluated AV."""
        return self.verbalizers[self.main](activations_ND, temperature=self.config.temperature, desc=desc)

    def rebuilt(self, reconstructor: str, texts: Texts) -> Float[np.ndarray, "N D"]:
        """The vectors that an AR rebuilds; equal texts are read once, and a failed one counts as the training mean.

        Raises:
          ValueError: vectors that are not finite; the message names the AR.
        """
        vector_of = self._rebuilt[reconstructor]
        if fresh := list(dict.fromkeys(text for text in texts if text is not None and text not in vector_of)):
            vectors = finite(
                f"the AR {reconstructor!r}", np.asarray(self.reconstructors[reconstructor](fresh))
            )
            vector_of.update(zip(fresh, vectors, strict=True))
        rows = [self.yardstick.mean_D if text is None else vector_of[text] for text in texts]
        return np.array(rows, np.float32).reshape(len(rows), -1)

    @functools.cache  # noqa: B019 - a subject lives as long as its process
    def scale(self, reconstructor: str) -> float | None:
        """The scalar that takes an AR's vectors to raw norms for `fve`, fitted on training rows.

        None without training rows that have texts: the norms of an AR's vectors mean nothing of themselves.
        """
        if self.training is None or self.training.explanations is None:
            return None
        fit = self.training.take(slice(0, self.config.rows))
        rebuilt_ND = self.rebuilt(reconstructor, fit.explanations)
        return float(metrics.least_squares_scale(rebuilt_ND, fit.activations))

    def figures(
        self,
        prediction_ND: Float[np.ndarray, "N D"],
        failed_N: Bool[np.ndarray, "N"] | None = None,
        scale: float | None = 1.0,
        rows: Any = slice(None),
    ) -> dict[str, Figure]:
        """`fve_nrm`, `fve`, mean cosine and failed share of predictions of held-out rows, all or some.

        Args:
          prediction_ND: vectors as an AR gives them.
          failed_N: rows without a prediction, which count as the training mean.
          scale: factor of the predictions for raw `fve`, which is not defined (None) without one.
          rows: index of the held-out rows that are predicted.
        """
        target_ND, yardstick = self.data.activations[rows], self.yardstick
        docs = [self.data.doc_ids[i] for i in np.arange(len(self.data))[rows]]
        failed_N = np.zeros(len(docs), bool) if failed_N is None else np.asarray(failed_N)
        filled_ND = metrics.substitute_failed(prediction_ND, failed_N, yardstick.mean_D)
        fve = None
        if scale is not None:
            scaled_ND = metrics.substitute_failed(prediction_ND * scale, failed_N, yardstick.mean_D)
            fve = Ratio.explained(*metrics.fve_terms(scaled_ND, target_ND, yardstick.mean_D), docs)
        return {
            "fve_nrm": Ratio.explained(
                *metrics.fve_nrm_terms(filled_ND, target_ND, yardstick.normalized_mean_D), docs
            ),
            "fve": fve,
            "cosine": Ratio.mean(1 - metrics.direction_mse(filled_ND, target_ND) / 2, docs),
            "failed": Ratio.mean(failed_N, docs),
        }

    def text_figures(self, reconstructor: str, texts: Texts, rows: Any = slice(None)) -> dict[str, Figure]:
        """The `figures` of an AR's predictions from texts; arguments as there."""
        failed_N = np.array([text is None for text in texts])
        rebuilt_ND = self.rebuilt(reconstructor, texts)
        return self.figures(rebuilt_ND, failed_N, self.scale(reconstructor), rows)

    def text_rows(
        self, name: str, texts: Texts, group: str = "nla", ars: Sequence[str] | None = None
    ) -> list[Row]:
        """Table lines with the figures of texts: one for each AR, or for each of the ARs named."""
        return [
            Row(name, self.text_figures(ar, texts), group=group, labels={"AR": ar}, ids=self.ids)
            for ar in ars or self.reconstructors
        ]

    def digest(self) -> str:
        """A hash that identifies the held-out rows."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(np.ascontiguousarray(self.data.activations).tobytes())
        digest.update("\n".join(self.ids).encode())
        return digest.hexdigest()


def check_judges(subject: Subject) -> None:
    """Refuse a judge that is the AV's own AR.

    Raises:
      ValueError: both rebuild the same vectors.
    """
    if "own" not in subject.reconstructors:
        return
    probe = ["A probe of what is rebuilt.", "About nothing. Next words: the, a."]
    for judge in subject.judges:
        if np.array_equal(subject.rebuilt("own", probe), subject.rebuilt(judge, probe)):
            raise ValueError(
                f"the AR {judge!r} and the co-trained AR rebuild the same vectors: it cannot judge what it was "
                "trained on; give an AR that never saw the AV's texts, or none"
            )
