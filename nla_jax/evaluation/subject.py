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
from jaxtyping import Bool, Float, Int

from nla_jax.autoencoder import metrics
from nla_jax.autoencoder.round_trip import finite
from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.chat.models import ChatModel
from nla_jax.data.corpora.documents import Document
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.positions import SPAN_PLACE
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.evaluation.estimates import Estimate, Ratio
from nla_jax.evaluation.tables import Figure, Row
from nla_jax.evaluation.target_lm import TargetLM

Texts = Sequence[str | None]
"""Explanations; None stands for one that failed, so that no text could be read."""
PLACES = ("answer_start", "sentence_end", "turn_end", "line_end", SPAN_PLACE, "inside")
"""The places of `lm.places` and of spans in the order of tables: those with much to say come first."""
PLACE_ROWS = 8
"""Fewest held-out rows of a place that has lines of its own."""
AROUND_PLACES = "all, around the means of their places"
"""In the column of places: all rows, each measured around the training mean of its own place."""


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


@runtime_checkable
class Oracle(Protocol):
    """A model that answers questions about activations."""

    def scores(
        self, activations_ND: np.ndarray, question: str, options: Sequence[str], desc: str | None = None
    ) -> Float[np.ndarray, "N G"]:
        """How much each activation raises the log-likelihood (nats) of each answer, over the mean activation."""

    def answers(self, activations_ND: np.ndarray, question: str, desc: str | None = None) -> list[str | None]:
        """The likeliest answer about each activation; None where it did not end."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What one system predicts of held-out rows; lines of tables are made of it."""

    name: str
    """Name of the system."""
    vectors_ND: Float[np.ndarray, "N D"]
    group: str = "nla"
    """The kind of line, see `tables.Row`."""
    ar: str = "-"
    """The AR that rebuilt the vectors; a dash where none did."""
    failed_N: Bool[np.ndarray, "N"] | None = None
    """Rows without a prediction, which count as the training mean."""
    scale: float | None = 1.0
    """Factor of the vectors for raw `fve`, which is not defined (None) without one."""
    rows: Any = dataclasses.field(default_factory=lambda: slice(None))
    """Index of the held-out rows that are predicted."""
    of_directions: bool = False
    """Whether the vectors are means of normalized activations, which `fve_nrm` does not normalize again."""
    further: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
    """Further figures of the line of all rows."""


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
      oracle: a model of the same size that was taught to answer questions about activations; None where there is none.
      write: texts that the writer of the warm-start texts gives about the last tokens of documents; None where that
        writer is not at hand, or asks a model.
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
    oracle: Oracle | None = None
    write: Callable[[Sequence[Document]], list[str | None]] | None = None

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
        return self.data.row_ids

    @functools.cached_property
    def places(self) -> dict[str, Int[np.ndarray, "_"]]:
        """The held-out rows of each place that has lines of its own, in the order of tables.

        These are places whose training mean is known, with rows of several documents; there are none where the data
        or the yardstick does not tell places.
        """
        place_N = np.array(self.data.extra.get("place", []), object)
        known = sorted(self.yardstick.places, key=lambda place: (*PLACES, place).index(place))
        rows_of = {place: np.flatnonzero(place_N == place) for place in known}
        return {place: rows for place, rows in rows_of.items() if self._are_enough(rows)}

    def _are_enough(self, rows: Sequence[int] | np.ndarray) -> bool:
        return len(rows) >= PLACE_ROWS and len({self.data.doc_ids[row] for row in rows}) > 1

    @functools.cached_property
    def place_means_ND(self) -> Float[np.ndarray, "N D"]:
        """For each held-out row, the mean of the normalized training activations of its place, or of all places."""
        places = self.data.extra.get("place", [None] * len(self.data))
        return np.stack([self.yardstick.at(place).normalized_mean_D for place in places])

    def by_place(self, ratio: Ratio, rows: Any = slice(None)) -> dict[str, tuple[Ratio, list[str]]]:
        """A figure of held-out rows for each place alone: place -> the figure, and the names of its rows.

        Args:
          ratio: the figure, with its terms row by row.
          rows: index of the held-out rows that it is of; places of which too few are among them are left out.
        """
        index_N = np.arange(len(self.data))[rows]
        at = {place: np.flatnonzero(np.isin(index_N, rows_N)) for place, rows_N in self.places.items()}
        return {
            place: (ratio.take(kept), [self.ids[row] for row in index_N[kept]])
            for place, kept in at.items()
            if self._are_enough(index_N[kept])
        }

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
        of_directions: bool = False,
    ) -> dict[str, Figure]:
        """`fve_nrm`, `fve`, mean cosine and failed share of predictions of held-out rows, all or some.

        Args:
          prediction_ND: vectors as an AR gives them.
          failed_N: rows without a prediction, which count as the training mean.
          scale: factor of the predictions for raw `fve`, which is not defined (None) without one.
          rows: index of the held-out rows that are predicted.
          of_directions: the vectors are means of normalized activations, which `fve_nrm` does not normalize again.
        """
        target_ND, yardstick = self.data.activations[rows], self.yardstick
        docs = [self.data.doc_ids[i] for i in np.arange(len(self.data))[rows]]
        failed_N = np.zeros(len(docs), bool) if failed_N is None else np.asarray(failed_N)
        filled_ND = metrics.substitute_failed(prediction_ND, failed_N, yardstick.mean_D)
        fve = None
        if scale is not None:
            scaled_ND = metrics.substitute_failed(prediction_ND * scale, failed_N, yardstick.mean_D)
            fve = Ratio.explained(*metrics.fve_terms(scaled_ND, target_ND, yardstick.mean_D), docs)
        error_N, variance_N = metrics.fve_nrm_terms(filled_ND, target_ND, yardstick.normalized_mean_D)
        if of_directions:
            error_N, _ = metrics.fve_terms(
                filled_ND, metrics.normalize(target_ND), yardstick.normalized_mean_D
            )
        return {
            "fve_nrm": Ratio.explained(error_N, variance_N, docs),
            "fve": fve,
            "cosine": Ratio.mean(1 - metrics.direction_mse(filled_ND, target_ND) / 2, docs),
            "failed": Ratio.mean(failed_N, docs),
        }

    def around_places(self, fve_nrm: Ratio, rows: Any = slice(None)) -> Ratio:
        """The `fve_nrm` of held-out rows with the mean of each row's own place in place of the mean of all.

        The errors stay the same: a text that failed does not tell the place either, and counts as the mean of all.
        """
        error_N = fve_nrm.denominator_N - fve_nrm.numerator_N
        target_ND = metrics.normalize(self.data.activations[rows])
        variance_N = np.mean((target_ND - self.place_means_ND[rows]) ** 2, axis=1)
        return Ratio.explained(error_N, variance_N, fve_nrm.doc_ids)

    def line(self, prediction: Prediction) -> Row:
        """The table line with the `figures` of a prediction."""
        p, ids = prediction, np.array(self.ids, object)[prediction.rows].tolist()
        figures = {**self.prediction_figures(p), **p.further}
        return Row(p.name, figures, group=p.group, labels={"AR": p.ar}, ids=ids)

    def fve_by_place(self, prediction: Prediction) -> dict[str, tuple[Ratio, list[str]]]:
        """The `fve_nrm` of a prediction around the means of places, of all rows (`AROUND_PLACES`) and of each place.

        Each figure comes with the names of its rows; there are none where places are not known.
        """
        if not self.places:
            return {}
        ratio = self.prediction_figures(prediction)["fve_nrm"]
        around = self.around_places(ratio, prediction.rows)
        ids = np.array(self.ids, object)[prediction.rows].tolist()
        return {AROUND_PLACES: (around, ids)} | self.by_place(around, prediction.rows)

    def place_lines(self, prediction: Prediction) -> list[Row]:
        """Table lines with the figures of `fve_by_place`."""
        p = prediction
        return [
            Row(p.name, {"fve_nrm": part}, group=p.group, labels={"AR": p.ar, "place": place}, ids=ids)
            for place, (part, ids) in self.fve_by_place(p).items()
        ]

    def gain_lines(self, name: str, after: Prediction, before: Prediction) -> list[Row]:
        """Table lines with the `fve_nrm` of a prediction less that of another: of all rows, then by place.

        The intervals are paired: documents are resampled for both at once.
        """
        whole, part = (self.prediction_figures(p)["fve_nrm"] for p in (after, before))
        gains: dict[str | None, Estimate] = {None: whole.over(part)}
        of_before = self.fve_by_place(before)
        for place, (ratio, _) in self.fve_by_place(after).items():
            gains[place] = ratio.over(of_before[place][0])
        return [
            Row(name, {"fve_nrm": gain}, labels={"AR": after.ar} | ({"place": place} if place else {}))
            for place, gain in gains.items()
        ]

    def prediction_figures(self, prediction: Prediction) -> dict[str, Figure]:
        """The `figures` of a prediction."""
        p = prediction
        return self.figures(p.vectors_ND, p.failed_N, p.scale, p.rows, p.of_directions)

    def text_figures(self, reconstructor: str, texts: Texts, rows: Any = slice(None)) -> dict[str, Figure]:
        """The `figures` of an AR's predictions from texts; arguments as there."""
        return self.prediction_figures(self.read("", texts, ar=reconstructor, rows=rows))

    def read(
        self, name: str, texts: Texts, group: str = "nla", *, ar: str, rows: Any = slice(None)
    ) -> Prediction:
        """What an AR predicts from texts about held-out rows, all or some."""
        failed_N = np.array([text is None for text in texts])
        return Prediction(name, self.rebuilt(ar, texts), group, ar, failed_N, self.scale(ar), rows)

    def text_rows(
        self, name: str, texts: Texts, group: str = "nla", ars: Sequence[str] | None = None
    ) -> list[Row]:
        """Table lines with the figures of texts: one for each AR, or for each of the ARs named."""
        return [self.line(self.read(name, texts, group, ar=ar)) for ar in ars or self.reconstructors]

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
