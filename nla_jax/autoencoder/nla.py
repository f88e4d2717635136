"""A trained NLA: explain activations, rebuild them from texts, and score the texts.

An `NLA` is what a run, an export or a pair of released checkpoints becomes when it is loaded (`pipeline.load`). It
holds both models with their weights, the prompts, the scale and the training means; where any of them lives on disk it
does not know. Shape letters: N activations, D model.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from nla_jax.autoencoder import metrics
from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.results import Explanations, Scores
from nla_jax.autoencoder.round_trip import RoundTrip, finite
from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.lm.activations import Activations
from nla_jax.lm.chat_template import Message
from nla_jax.lm.language_model import LanguageModel
from nla_jax.lm.prompt_batches import row_batches
from nla_jax.randomness import key_for

Texts = Sequence[str | None]
Vectors = Activations | np.ndarray | jax.Array
NO_MEAN = (
    "this NLA came without a training mean, so only the cosine is known; nla.with_yardstick(texts) measures one on "
    "texts of your own"
)


_fve_nrm_terms = jax.jit(metrics.fve_nrm_terms)


@dataclasses.dataclass(frozen=True, eq=False)
class NLA:
    """A trained NLA in memory."""

    name: str
    """Where it was loaded from."""
    autoencoder: Autoencoder
    av_params: Any
    ar_params: Any | None
    """None where the AV came alone, which is enough to explain."""
    layer: int | None
    """The residual stream that is explained, counted from 0; None where an AV alone does not say."""
    mesh: Mesh
    load_target: Callable[[bool], LanguageModel]
    """Reads the explained LM: all of it, or with False blocks 0 to `layer` alone."""
    yardstick: Yardstick | None = None
    """What FVE is measured against."""
    judges: Mapping[str, Callable[[Texts], np.ndarray]] = dataclasses.field(default_factory=dict)
    """Other ARs by name, from texts to vectors (N, D); their weights are read when they are first asked."""
    min_position: int | None = None
    """The first position that the NLA was trained at; earlier tokens see little context. None where it is not known."""
    batch_size: int = 64
    """Activations or texts of one compiled batch, at most."""
    scan_blocks: bool = False
    """Whether the parameters' blocks are stacked, and programs loop over them: fast to compile, slower to run."""

    @functools.cached_property
    def round_trip(self) -> RoundTrip:
        """Both directions as compiled programs."""
        return RoundTrip(self.autoencoder, self.mesh, self.batch_size, scan=self.scan_blocks)

    @functools.cached_property
    def target(self) -> LanguageModel:
        """The LM that is explained, as far as activations need it: blocks 0 to `layer`.

        Raises:
          ValueError: an AV alone that does not say which layer it explains.
        """
        if self.layer is None:
            raise ValueError(
                f"{self.name} does not say which layer it explains; load it with its AR, or pass activations that you "
                "have read yourself"
            )
        return self.load_target(False)

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.autoencoder.verbalizer.config.d_model

    def activations(
        self, text: str | Sequence[str] | None = None, *, messages: Sequence[Message] | None = None
    ) -> Activations | list[Activations]:
        """The target's activations at the explained layer, at every token but a BOS.

        Args:
          text: a text, or several.
          messages: a conversation ({"role": ..., "content": ...}) instead, through the target's chat template.

        Returns:
          The activations of the text; a list of them where several texts are given.

        Raises:
          ValueError: see `LanguageModel.activations`.
        """
        with self._on_mesh():
            return self.target.activations(text, messages=messages, layer=self.layer)

    def explain(
        self,
        activations: Vectors | Sequence[Activations],
        *,
        samples: int = 1,
        temperature: float | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Explanations:
        """Write explanations of activations.

        Args:
          activations: from `activations`, whole or chosen rows of it; or raw vectors (N, D) or (D,).
          samples: explanations of each activation; they are adjacent in the result.
          temperature: of the AV; None takes 0 for one sample, where the likeliest token is taken, and 1 for several.
          seed: of the samples.
          progress: whether a progress bar is shown; None shows one for more than a batch.

        Raises:
          ValueError: no rows, another width than the AV reads, or values that are not finite.
        """
        batches = self.stream(
            activations, samples=samples, temperature=temperature, seed=seed, progress=progress
        )
        texts = tuple(text for batch in batches for text in batch)
        return Explanations(texts, samples, activations if isinstance(activations, Activations) else None)

    def stream(
        self,
        activations: Vectors | Sequence[Activations],
        *,
        samples: int = 1,
        temperature: float | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Iterator[list[str | None]]:
        """What `explain` writes, a batch of texts at a time, as soon as it is there; arguments as of `explain`."""
        if samples < 1:
            raise ValueError(f"samples is {samples}; at least one explanation has to be written")
        vectors_ND = self.checked_vectors(activations).repeat(samples, axis=0)
        if temperature is None:
            temperature = float(samples > 1)
        if progress is None:
            progress = len(vectors_ND) > self.batch_size
        with self._on_mesh():
            yield from self.round_trip.stream(
                self.av_params,
                vectors_ND,
                key_for(seed, "explain"),
                temperature,
                "explain" if progress else None,
            )

    def reconstruct(self, texts: str | Texts) -> Float[np.ndarray, "N D"]:
        """Rebuild activations from texts alone; only the direction of a prediction means something.

        Args:
          texts: one text or several; None counts as an empty text.

        Raises:
          ValueError: no texts, an NLA without an AR, or an AR that rebuilds NaN or infinity.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if self.ar_params is None:
            raise ValueError(
                f"{self.name} holds an AV alone, which can explain and not reconstruct; load it with its AR: "
                "nla_jax.load(av, ar=...)"
            )
        if not texts:
            raise ValueError("there are no texts to reconstruct from; give at least one")
        with self._on_mesh():
            return finite(f"the AR of {self.name}", self.round_trip.reconstruct(self.ar_params, texts))

    def score(
        self, activations: Vectors | Sequence[Activations], texts: str | Texts, *, judges: bool = True
    ) -> Scores:
        """How much of the activations their explanations carry, through the NLA's own AR and through its judges.

        Args:
          activations: what is explained. `Explanations` know their rows, so these may then be the whole text's.
          texts: one explanation a row, or as many for every row, adjacent; None counts as the training mean.
          judges: whether the judges are asked as well.

        Raises:
          ValueError: a number of texts that is no multiple of that of the activations, or explanations of another
            text; see also `explain` and `reconstruct`.
        """
        texts, rows = ([texts], activations) if isinstance(texts, str) else (texts, activations)
        explained = texts.activations if isinstance(texts, Explanations) else None
        if explained is not None and isinstance(activations, Activations):
            if explained.text != activations.text:
                raise ValueError(
                    f"the explanations are of the text {explained.text[:40]!r}, these activations are of "
                    f"{activations.text[:40]!r}; score them against the activations that they explain"
                )
            rows = activations.at(explained.positions)
        vectors_ND = self.checked_vectors(rows)
        if not len(texts) or len(texts) % len(vectors_ND):
            raise ValueError(
                f"{len(texts)} texts for {len(vectors_ND)} activations; give one text a row, or as many for every row"
            )
        vectors_ND = vectors_ND.repeat(len(texts) // len(vectors_ND), axis=0)
        texts = list(texts)
        own = self.score_predictions(vectors_ND, self.reconstruct(texts), texts)
        if not judges:
            return own
        by_judge = {
            name: self.score_predictions(vectors_ND, finite(f"the AR {name!r}", judge(texts)), texts)
            for name, judge in self.judges.items()
        }
        return dataclasses.replace(own, judges=by_judge)

    def score_predictions(
        self, vectors_ND: Float[np.ndarray, "N D"], rebuilt_ND: Float[np.ndarray, "N D"], texts: Texts
    ) -> Scores:
        """Scores of what any AR rebuilt from texts; a row without a text counts as the training mean."""
        yardstick, failed_N = self.yardstick, np.array([text is None for text in texts])
        unknown_D = np.full(self.d_model, np.nan, np.float32)
        mean_D = unknown_D if yardstick is None else yardstick.mean_D
        normalized_mean_D = unknown_D if yardstick is None else yardstick.normalized_mean_D
        filled_ND = np.where(failed_N[:, None], mean_D, rebuilt_ND)
        terms = [
            np.stack(_fve_nrm_terms(filled_ND[rows_B], vectors_ND[rows_B], normalized_mean_D))[:, :real]
            for rows_B, real in row_batches(len(filled_ND), self.batch_size)
        ]
        # The numerator of a row's `fve_nrm` is its direction MSE.
        mse_N, spread_N = np.concatenate(terms, axis=1)
        if yardstick is None:
            return Scores(1 - mse_N / 2, mse_N, None, None, NO_MEAN)
        return Scores(
            cosine_N=1 - mse_N / 2,
            mse_nrm_N=mse_N,
            fve_nrm_N=1 - mse_N / yardstick.spread,
            fve_nrm=float(1 - mse_N.sum() / spread_N.sum()),
            measured_against=f"against the {yardstick.description}",
        )

    def with_yardstick(self, texts: Sequence[str]) -> "NLA":
        """The same NLA with its FVE measured against the activations of texts of one's own.

        Activations before `min_position` are left out, as they were in training.

        Raises:
          ValueError: texts that are all too short.
        """
        first = self.min_position or 0
        rows = [
            own.vectors_ND[row]
            for own in self.activations(list(texts))
            for row, position in enumerate(own.positions)
            if position >= first
        ]
        if len(rows) < 2:
            raise ValueError(
                f"{len(texts)} texts give {len(rows)} activations from position {first} on, too few for a mean; give "
                "more or longer texts"
            )
        measured = Yardstick.of(np.stack(rows), f"activations of {len(texts)} texts")
        return dataclasses.replace(self, yardstick=measured)

    def checked_vectors(self, activations: Vectors | Sequence[Activations]) -> Float[np.ndarray, "N D"]:
        """Activations as float32 rows.

        Raises:
          ValueError: no rows, another width than the AV reads, values that are not finite, or another layer.
        """
        parts = activations if isinstance(activations, Sequence) else [activations]
        layers = {one.layer for one in parts if isinstance(one, Activations)}
        if self.layer is not None and (others := layers - {self.layer}):
            raise ValueError(
                f"the activations are of layer {min(others)}, this NLA explains layer {self.layer}; read them with "
                "nla.activations(text)"
            )
        if isinstance(activations, Sequence) and all(isinstance(one, Activations) for one in activations):
            activations = np.concatenate(
                [np.zeros((0, self.d_model)), *(one.vectors_ND for one in activations)]
            )
        vectors = np.asarray(activations, np.float32)
        vectors_ND = vectors[None] if vectors.ndim == 1 else vectors
        if vectors_ND.ndim != 2 or vectors_ND.shape[1] != self.d_model:
            raise ValueError(
                f"the activations have the shape {vectors.shape}; this NLA reads vectors of width {self.d_model}, as "
                f"(N, {self.d_model}) or ({self.d_model},)"
            )
        if not len(vectors_ND):
            raise ValueError("there are no activations to explain; choose at least one row")
        if not (finite_N := np.isfinite(vectors_ND).all(axis=1)).all():
            rows = np.flatnonzero(~finite_N)[:5].tolist()
            raise ValueError(
                f"{int((~finite_N).sum())} of {len(vectors_ND)} activations hold NaN or infinity (rows {rows}); leave "
                "them out"
            )
        return vectors_ND

    @property
    def description(self) -> str:
        """What is held, and what it costs in memory."""
        parts = {"AV": self.av_params, "AR": self.ar_params}
        if "target" in self.__dict__:
            parts["target"] = self.target.params
        counted: set[int] = set()
        held = []
        for name, params in parts.items():
            if params is None:
                continue
            leaves = [leaf for leaf in jax.tree.leaves(params) if id(leaf) not in counted]
            counted |= {id(leaf) for leaf in leaves}
            size = f"{sum(leaf.nbytes for leaf in leaves) / 2**30:.2f} GiB" if leaves else "(shared)"
            held.append(f"{name} {size}")
        explained = "an unknown layer" if self.layer is None else f"layer {self.layer}"
        against = (
            "no training mean" if self.yardstick is None else f"FVE against the {self.yardstick.description}"
        )
        judges = f", judges: {', '.join(self.judges)}" if self.judges else ""
        return f"NLA {self.name}: {explained}, d {self.d_model}; {', '.join(held)}; {against}{judges}"

    def __repr__(self) -> str:
        return f"<{self.description}>"

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        """Sets the mesh, which programs over several devices read."""
        return jax.set_mesh(self.mesh) if self.mesh.size > 1 else contextlib.nullcontext()
