"""What is evaluated: an NLA, or several stages of one, with the held-out rows and the yardsticks around it.

Suites see texts and vectors only, through two protocols, so that a foreign NLA or a trivial baseline takes part like
our own.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from nla_jax.autoencoder import metrics
from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.chat.models import ChatModel
from nla_jax.data.dataset import ActivationDataset
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.tables import Figure, Row
from nla_jax.evaluation.target_lm import TargetLM

Texts = Sequence[str | None]
"""Explanations, None where none could be read."""


@runtime_checkable
class ExplainFn(Protocol):
    """Whatever explains activations in text."""

    def __call__(
        self, activations_ND: np.ndarray, *, temperature: float = 0.0, seed: int = 0, desc: str | None = None
    ) -> list[str | None]:
        """One explanation for each raw activation."""


@runtime_checkable
class RebuildFn(Protocol):
    """Whatever rebuilds activations from texts."""

    def __call__(self, texts: Texts) -> np.ndarray:
        """One vector (N, D) for each text; its norm may be meaningless."""


@dataclasses.dataclass(eq=False)
class Subject:
    """An NLA under evaluation.

    Attributes:
      data: held-out rows.
      training: rows with explainer texts that the NLA was trained on: what baselines are fitted on.
      yardstick: of all training activations.
      verbalizers: AVs by name, in order of training; the last is the one that every suite looks at.
      reconstructors: ARs by name: "own" was trained beside the AV, all others are judges that were not.
      load_target: loads the target LM; called when a suite first needs it.
      config: sizes and seeds.
      seed: of every random choice.
      tokens_of: the last AV's sampled tokens for activations, where it has tokens.
      marker: the text of the injected token, which no explanation should hold.
      chat: answers questions and checks claims beside the target LM; `measure_suites` opens it where the config names
        one.
    """

    data: ActivationDataset
    training: ActivationDataset | None
    yardstick: Yardstick
    verbalizers: Mapping[str, ExplainFn]
    reconstructors: Mapping[str, RebuildFn]
    load_target: Callable[[], TargetLM]
    config: EvaluationConfig = EvaluationConfig()
    seed: int = 0
    tokens_of: Callable[[np.ndarray], list[list[int]]] | None = None
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
        """The AR that counts: the first judge, or the AV's own where there is none."""
        return (self.judges or ["own"])[0]

    @property
    def pair(self) -> list[str]:
        """The AV's own AR and the judge that counts, for tables in which further judges add nothing."""
        return list(dict.fromkeys(name for name in ("own", self.judge) if name in self.reconstructors))

    @functools.cached_property
    def ids(self) -> list[str]:
        """Names of the held-out rows, the same in every run on the same data."""
        return [f"{doc}@{n}" for doc, n in zip(self.data.doc_ids, self.data.n_raw_tokens, strict=True)]

    def need(self, suite: str, *columns: str) -> None:
        """Check that the held-out rows carry what a suite reads.

        Raises:
          ValueError: a missing column, by name.
        """
        has = {
            "contexts": self.data.contexts is not None,
            "explanations": self.data.explanations is not None,
            "training rows": self.training is not None,
            **dict.fromkeys(self.data.extra, True),
        }
        if missing := [column for column in columns if not has.get(column)]:
            raise ValueError(
                f"the suite {suite!r} needs {', '.join(missing)}, which the held-out data does not carry; choose "
                "other suites (evaluation.suites), or data with these columns"
            )

    def texts(self, name: str | None = None, *, sample: int | None = None) -> list[str | None]:
        """Explanations of the held-out rows by an AV, the evaluated one by default.

        Args:
          name: of the AV.
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
        """What an AR rebuilds; a text is read once, and a failed one counts as the training mean."""
        known = self._rebuilt[reconstructor]
        if fresh := list(dict.fromkeys(text for text in texts if text is not None and text not in known)):
            known.update(zip(fresh, np.asarray(self.reconstructors[reconstructor](fresh)), strict=True))
        rows = [self.yardstick.mean_D if text is None else known[text] for text in texts]
        return np.array(rows, np.float32).reshape(len(rows), -1)

    @functools.cache  # noqa: B019 - a subject lives as long as its process
    def scale(self, reconstructor: str) -> float:
        """The scalar for raw `fve`, fitted on training rows; 1 without any."""
        if self.training is None:
            return 1.0
        fit = self.training.take(slice(0, self.config.rows))
        rebuilt_ND = self.rebuilt(reconstructor, fit.explanations)
        return float(metrics.least_squares_scale(rebuilt_ND, fit.activations))

    def figures(
        self,
        prediction_ND: Float[np.ndarray, "N D"],
        failed_N: Bool[np.ndarray, "N"] | None = None,
        scale: float = 1.0,
        rows: Any = slice(None),
    ) -> dict[str, Figure]:
        """`fve_nrm`, `fve`, mean cosine and failed share of predictions of held-out rows, all or some.

        Args:
          prediction_ND: as an AR gives them.
          failed_N: rows without a prediction, which count as the training mean.
          scale: factor for raw `fve`.
          rows: which held-out rows.
        """
        target_ND, yardstick = self.data.activations[rows], self.yardstick
        docs = [self.data.doc_ids[i] for i in np.arange(len(self.data))[rows]]
        failed_N = np.zeros(len(docs), bool) if failed_N is None else np.asarray(failed_N)
        filled_ND = metrics.substitute_failed(prediction_ND, failed_N, yardstick.mean_D)
        scaled_ND = metrics.substitute_failed(prediction_ND * scale, failed_N, yardstick.mean_D)
        return {
            "fve_nrm": Ratio.explained(
                *metrics.fve_nrm_terms(filled_ND, target_ND, yardstick.normalized_mean_D), docs
            ),
            "fve": Ratio.explained(*metrics.fve_terms(scaled_ND, target_ND, yardstick.mean_D), docs),
            "cosine": Ratio.mean(1 - metrics.direction_mse(filled_ND, target_ND) / 2, docs),
            "failed": Ratio.mean(failed_N, docs),
        }

    def text_figures(self, reconstructor: str, texts: Texts, rows: Any = slice(None)) -> dict[str, Figure]:
        """The same of texts through an AR."""
        failed_N = np.array([text is None for text in texts])
        rebuilt_ND = self.rebuilt(reconstructor, texts)
        return self.figures(rebuilt_ND, failed_N, self.scale(reconstructor), rows)

    def text_rows(
        self, name: str, texts: Texts, group: str = "nla", ars: Sequence[str] | None = None
    ) -> list[Row]:
        """A line for each AR, or for each of those named."""
        return [
            Row(name, self.text_figures(ar, texts), group, {"AR": ar}, self.ids)
            for ar in ars or self.reconstructors
        ]

    def digest(self) -> str:
        """Identifies the held-out rows."""
        found = hashlib.blake2b(digest_size=8)
        found.update(np.ascontiguousarray(self.data.activations).tobytes())
        found.update("\n".join(self.ids).encode())
        return found.hexdigest()


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
