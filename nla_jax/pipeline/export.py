"""From our runs to model directories, in the reference's layout or as adapters, and back to something like a run."""

import functools
import os
import types
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.config import CorpusConfig, ExperimentConfig, ModelConfig
from nla_jax.data.corpus import load_corpus
from nla_jax.data.extraction import ExtractionConfig, extract, tokenize
from nla_jax.interop.model_directories import (
    AdapterOrigin,
    export_reconstructor,
    export_verbalizer,
    load_reconstructor,
    load_verbalizer,
)
from nla_jax.lm.files.peft import ADAPTER_CONFIG, peft_base
from nla_jax.lm.files.sources import resolve
from nla_jax.lm.lora import merge
from nla_jax.lm.transformer import unstack_blocks
from nla_jax.pipeline.run import Run

BACKGROUND = CorpusConfig(source="docstrings", max_documents=64)
"""The documents whose activations stand in for training data that a checkpoint does not come with."""


def export_run(
    run: Run,
    directory: str | os.PathLike[str],
    *,
    stage: Literal["rl", "warm_start"] = "rl",
    step: int | None = None,
    adapters: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> list[str]:
    """Write a run's AV and AR to `directory`/av and `directory`/ar.

    Args:
      run: a finished or unfinished run.
      directory: created if need be.
      stage: joint training, or the two warm starts.
      step: of joint training; the best by the judge if None.
      adapters: of a run with `lora.rank`, write what was trained alone, in PEFT's format, in place of whole models.
      dtype: of the tensors.

    Returns:
      Why the reference's client cannot use the AV as it is; empty if it can.

    Raises:
      FileNotFoundError: the run has no checkpoint of that stage yet.
      ValueError: adapters of a run that has none, or of a family that PEFT cannot adapt so.
    """
    directory, config = Path(directory), run.config
    if adapters and not config.lora.rank:
        raise ValueError(f"{run.directory} was trained without adapters (lora.rank=0); export it whole")
    stages, step = _chosen(run, stage, step)
    codec, adapted = (
        run.models.autoencoder,
        AdapterOrigin(config.lora, run.models.lm.name) if adapters else None,
    )
    run.models.release_target()

    def params(model: Literal["av", "ar"]) -> Any:
        if adapters:
            return run.models.trainable_params(stages[model], model, step)
        return merge(unstack_blocks(run.models.model_params(stages[model], model, step)))

    shared, form = (codec.tokenizer, config.templates), {"adapted": adapted, "dtype": dtype}
    layer, tokens = config.model.layer, run.models.prompt_ids
    notes = export_verbalizer(codec.verbalizer, params("av"), *shared, directory / "av", layer=layer, **form)
    export_reconstructor(codec.reconstructor, params("ar"), *shared, directory / "ar", tokens=tokens, **form)
    return notes


def _chosen(run: Run, stage: str, step: int | None) -> tuple[dict[str, str], int | None]:
    """The stage that each model is taken from, and the step."""
    if stage == "rl":
        checkpoints = run.checkpoints("rl")
        step = step or checkpoints.pinned() or checkpoints.latest()
        if step is None:
            raise FileNotFoundError(
                f"{run.directory} holds no checkpoint of joint training; export its warm starts, or train first"
            )
    return {name: "rl" if stage == "rl" else f"{name}_sft" for name in ("av", "ar")}, step


class CheckpointRun(Run):
    """An AV and an AR in directories of their own, for everything that reads a finished run.

    Nothing is written. The training mean that errors are measured against is that of the target's activations on
    a few built-in documents, since a checkpoint does not come with its training data.
    """

    def __init__(
        self,
        av: str | os.PathLike[str],
        ar: str | os.PathLike[str],
        target: str | None = None,
        *,
        max_explanation_tokens: int = 200,
        max_reconstructor_tokens: int = 256,
        dtype: str = "float32",
    ):
        """Load both models; the target is loaded when it is first needed.

        Args:
          av: directory or hub id.
          ar: likewise.
          target: the LM that they explain, as in `ModelConfig.path`; of adapters the one that they name, if None.
          max_explanation_tokens: as in `ExperimentConfig`.
          max_reconstructor_tokens: as in `ExperimentConfig`.
          dtype: as in `ModelConfig`.

        Raises:
          FileNotFoundError: as `load_verbalizer`.
          ValueError: as `load_verbalizer`; an AV and an AR of different models or layers; or no target, and an AV that
            names none.
        """
        av, ar = resolve(av), resolve(ar)
        adapted = {path: (path / ADAPTER_CONFIG).is_file() for path in (av, ar)}
        if target is None and not adapted[av]:
            raise ValueError(f"{av} does not say which language model it explains; name it with --target")
        target = target or peft_base(av)
        shape = ExperimentConfig("checkpoints", model=ModelConfig(target, dtype=dtype), corpus=BACKGROUND)
        super().__init__(shape, av)

        def given(path: Path) -> dict[str, Any]:
            # Adapters share the target's weights.
            return {"base": self.target if adapted[path] else None, "mesh": self.mesh, "dtype": dtype}

        self.av = load_verbalizer(av, **given(av))
        self.ar = load_reconstructor(ar, **given(ar))
        pairs = {"d_model": (self.av.meta.d_model, self.ar.meta.d_model)}
        if self.av.meta.layer is not None:
            pairs["layer"] = (self.av.meta.layer, self.ar.meta.layer)
        if wrong := [f"{name}: AV {a}, AR {b}" for name, (a, b) in pairs.items() if a != b]:
            raise ValueError(
                f"{av} and {ar} do not belong together: {'; '.join(wrong)}; give the AR of this AV"
            )
        self.config = ExperimentConfig(
            shape.name,
            model=ModelConfig(target, self.ar.meta.layer, dtype),
            corpus=BACKGROUND,
            extraction=ExtractionConfig(next_words=0),
            templates=self.av.meta.templates,
            injection=self.av.meta.injection,
            max_explanation_tokens=max_explanation_tokens,
            max_reconstructor_tokens=max_reconstructor_tokens,
        )

    @functools.cached_property
    def codec(self) -> Autoencoder:
        """Both models, as their directories describe them."""
        return Autoencoder(
            self.av.tokenizer,
            self.av.verbalizer,
            self.ar.reconstructor,
            self.config.max_explanation_tokens,
            self.config.max_reconstructor_tokens,
        )

    @functools.cached_property
    def training_activations(self) -> np.ndarray:
        """Activations of the target on the background documents."""
        config, lm = self.config, self.target
        if lm.config.d_model != self.av.meta.d_model:
            raise ValueError(
                f"the target {lm.name} has d_model {lm.config.d_model}, the AV reads {self.av.meta.d_model}; "
                "name the model that AV and AR were trained from"
            )
        documents = load_corpus(BACKGROUND.source, max_documents=BACKGROUND.max_documents, seed=config.seed)
        contexts = tokenize(documents, lm.tokenizer, config.extraction, config.seed)
        parts = extract(
            contexts,
            lm.params,
            lm.tokenizer,
            self.lm_config,
            config.model.layer,
            config.extraction,
            self.mesh,
        )
        return np.stack([vector for part in parts for vector in part["activation_vector"]])

    def checkpoints(self, stage: str) -> Any:
        """The one step there is."""
        return types.SimpleNamespace(pinned=lambda: 1, latest=lambda: 1)

    def trained_params(self, stage: str, model: str, step: int | None = None) -> Any:
        """Parameters of "av" or "ar", whatever the stage."""
        return {"av": self.av, "ar": self.ar}[model].params
