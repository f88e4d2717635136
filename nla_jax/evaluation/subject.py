"""What is evaluated: an NLA, or several stages of one, with the held-out rows and the yardsticks around it.

Suites see texts and vectors only, through two protocols, so that a foreign NLA or a trivial baseline takes part like
our own.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Float

from nla_jax.autoencoder import metrics
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.explainers.chat import ChatModel
from nla_jax.data.splits import SPLITS
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.round_trip import EvaluationConfig, Moments
from nla_jax.evaluation.tables import Figure, Row
from nla_jax.evaluation.target import TargetLM
from nla_jax.run import Run, key_for
from nla_jax.training.loop import return_freed_memory

Texts = Sequence[str | None]
"""Explanations, None where none could be read."""


@runtime_checkable
class Verbalizer(Protocol):
    """Whatever explains activations in text."""

    def __call__(
        self, activations_ND: np.ndarray, *, temperature: float = 0.0, seed: int = 0, desc: str | None = None
    ) -> list[str | None]:
        """One explanation for each raw activation."""


@runtime_checkable
class Reconstructor(Protocol):
    """Whatever rebuilds activations from texts."""

    def __call__(self, texts: Texts) -> np.ndarray:
        """One vector (N, D) for each text; its norm may be meaningless."""


@dataclasses.dataclass(eq=False)
class Subject:
    """An NLA under evaluation.

    Attributes:
      data: held-out rows.
      training: rows with explainer texts that the NLA was trained on: what baselines are fitted on.
      moments: of all training activations.
      verbalizers: AVs by name, in order of training; the last is the one that every suite looks at.
      reconstructors: ARs by name: "own" was trained beside the AV, all others are judges that were not.
      load_target: loads the target LM; called when a suite first needs it.
      config: sizes and seeds.
      seed: of every random choice.
      tokens_of: the last AV's sampled tokens for activations, where it has tokens.
      marker: the text of the injected token, which no explanation should hold.
      chat: answers questions and checks claims beside the target LM; opened by `suites.measure` where the config names
        one.
    """

    data: ActivationDataset
    training: ActivationDataset | None
    moments: Moments
    verbalizers: Mapping[str, Verbalizer]
    reconstructors: Mapping[str, Reconstructor]
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
                "other suites with --suite, or data with these columns"
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
        rows = [self.moments.mean_D if text is None else known[text] for text in texts]
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
        target_ND, moments = self.data.activations[rows], self.moments
        docs = [self.data.doc_ids[i] for i in np.arange(len(self.data))[rows]]
        failed_N = np.zeros(len(docs), bool) if failed_N is None else np.asarray(failed_N)
        filled_ND = metrics.substitute_failed(prediction_ND, failed_N, moments.mean_D)
        scaled_ND = metrics.substitute_failed(prediction_ND * scale, failed_N, moments.mean_D)
        return {
            "fve_nrm": Ratio.explained(
                *metrics.fve_nrm_terms(filled_ND, target_ND, moments.normalized_mean_D), docs
            ),
            "fve": Ratio.explained(*metrics.fve_terms(scaled_ND, target_ND, moments.mean_D), docs),
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


def shuffled(items: Sequence[Any], doc_ids: Sequence[str], seed: int) -> list[Any]:
    """Give every row the item of a row of another document."""
    order = np.random.default_rng(seed).permutation(len(items))
    documents = np.array(doc_ids)
    for shift in range(1, len(items)):
        partner = np.empty(len(items), int)
        partner[order] = np.roll(order, shift)
        if (documents[partner] != documents).all():
            return [items[i] for i in partner]
    # No single rotation avoids the row's own document: choose a partner for each row alone.
    rng = np.random.default_rng(seed)
    return [items[rng.choice(np.flatnonzero(documents != own))] for own in documents]


def check_unseen(data: ActivationDataset, trained_on: Mapping[str, ActivationDataset]) -> None:
    """Refuse held-out rows of documents that were trained on.

    Documents are the same if their ids are, or if their texts begin alike.

    Raises:
      ValueError: with the number of documents and the first few of them.
    """

    def starts(rows: ActivationDataset) -> dict[str, str]:
        texts = [] if rows.contexts is None else rows.contexts
        return {" ".join(text.split())[:160]: doc for text, doc in zip(texts, rows.doc_ids, strict=False)}

    ours = starts(data)
    for split, rows in trained_on.items():
        shared = set(data.doc_ids) & set(rows.doc_ids)
        shared |= {doc for start, doc in ours.items() if start and start in starts(rows)}
        if shared:
            some = ", ".join(sorted(shared)[:3])
            raise ValueError(
                f"{len(shared)} of {len(set(data.doc_ids))} documents to evaluate on were trained on in {split} "
                f"({some}{', ...' if len(shared) > 3 else ''}): every figure would flatter; hold other documents "
                "out"
            )


class _RunVerbalizer:
    """An AV of a run, its weights read when they are first needed."""

    def __init__(self, run: Run, stage: str, step: int | None, held: dict[str, Any]):
        """Take where the weights are, and what the run's AVs hold their weights in: one at a time."""
        self.run, self.stage, self.step, self.held = run, stage, step, held

    def __call__(self, activations_ND, *, temperature=0.0, seed=0, desc=None):
        params, key = self.params(), jax.random.fold_in(key_for(self.run.config.seed, "evaluate"), seed)
        return self.run.round_trip.verbalize(params, activations_ND, key, temperature, desc)

    def tokens(self, activations_ND: np.ndarray) -> list[list[int]]:
        key = key_for(self.run.config.seed, "evaluate")
        return self.run.round_trip.answers(self.params(), activations_ND, key, 0.0)

    def params(self) -> Any:
        if self.stage not in self.held:
            # An AV is as large as the target.
            self.held.clear()
            return_freed_memory()
            self.held[self.stage] = self.run.trained_params(self.stage, "av", self.step)
        return self.held[self.stage]


def subject_of(run: Run) -> Subject:
    """A run's NLA before and after joint training, on its held-out rows.

    Raises:
      FileNotFoundError: no AV was trained yet.
      ValueError: documents that were trained on.
    """
    best = run.checkpoints("rl").pinned() or run.checkpoints("rl").latest()
    stages = {"warm start": ("av_sft", None)}
    ars = {"judge": ("ar_sft", None)}
    if best is not None:
        stages["after RL"] = ("rl", best)
        ars = {"own": ("rl", best), **ars}
    if run.checkpoints("second_judge").latest() is not None:
        ars["second judge"] = ("second_judge", None)
    data, config = run.held_out(run.config.evaluation.rows), run.config
    check_unseen(data, {split: run.data(split) for split in SPLITS if split != "held_out"})
    held: dict[str, Any] = {}
    verbalizers = {name: _RunVerbalizer(run, *where, held) for name, where in stages.items()}
    return Subject(
        data,
        run.data("ar_sft"),
        run.moments,
        verbalizers,
        {name: reconstructor_of(run, *where) for name, where in ars.items()},
        functools.cache(lambda: target_of(run)),
        config.evaluation,
        config.seed,
        list(verbalizers.values())[-1].tokens,
        run.tokens.injection_char,
    )


def subject_of_checkpoint(
    run: Run, data: ActivationDataset, *, judge: Reconstructor | None = None, rows: int = 256
) -> Subject:
    """An AV and an AR that come without their run, on data that they were not trained on (which is not checked).

    Args:
      run: reads the checkpoint (`interop.runs.CheckpointRun`).
      data: held-out rows; its first `rows` are taken.
      judge: an AR that never saw the AV's texts.
      rows: at most.

    Raises:
      ValueError: a judge that is the AV's own AR.
    """
    own = _RunVerbalizer(run, "rl", 1, {})
    reconstructors = {"own": reconstructor_of(run, "rl", 1)} | ({"judge": judge} if judge else {})
    subject = Subject(
        data.take(slice(0, rows)),
        None,
        run.moments,
        {"checkpoint": own},
        reconstructors,
        functools.cache(lambda: target_of(run)),
        run.config.evaluation,
        run.config.seed,
        own.tokens,
        run.tokens.injection_char,
    )
    check_judges(subject)
    return subject


def target_of(run: Run) -> TargetLM:
    """The target LM of a run, for reading and judging texts."""
    try:
        params = run.arranged(run.target.params, stacked=True)
    except ValueError:  # blocks that differ in more than their numbers cannot be stacked
        params = run.target.params
    lm = dataclasses.replace(run.target, params=params)
    run.release_target()
    return TargetLM(lm, run.lm_config, run.config.model.layer)


def reconstructor_of(run: Run, stage: str = "rl", step: int | None = None) -> Reconstructor:
    """The AR of a run, its weights read when they are first needed."""
    params = functools.cache(lambda: run.trained_params(stage, "ar", step))
    return lambda texts: run.round_trip.reconstruct(params(), texts)


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
