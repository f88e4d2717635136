"""The models of a run: its target LM, and AV and AR as the stages initialize, train and read them.

What lives in the run directory (data, checkpoints, files) belongs to `Run`, which makes this object.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.prompts import (
    ReconstructorPrompt,
    VerbalizerPrompt,
    build_reconstructor_prompt,
    build_verbalizer_prompt,
)
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.round_trip import RoundTrip
from nla_jax.autoencoder.verbalizer import Verbalizer
from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.config import ExperimentConfig
from nla_jax.data.sidecar import PromptIds
from nla_jax.lm.attention_kernels import check_implementation
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.weights import load_language_model
from nla_jax.lm.language_model import LanguageModel
from nla_jax.lm.lora import FrozenBase, init_adapters, split_frozen, with_adapters
from nla_jax.lm.transformer import stack_blocks, unstack_blocks
from nla_jax.process import return_freed_memory
from nla_jax.randomness import key_for
from nla_jax.sharding.mesh import tree_shardings
from nla_jax.training.checkpoint import Checkpoints, restore_params
from nla_jax.training.state import TrainState

ModelName = Literal["av", "ar"]


class Models:
    """Target LM, AV and AR of a run, each read when it is first needed."""

    def __init__(
        self,
        config: ExperimentConfig,
        mesh: jax.sharding.Mesh,
        yardstick: Callable[[], Yardstick],
        checkpoints: Callable[[str], Checkpoints],
    ):
        """Remember where the models come from; nothing is read yet.

        Args:
          config: the run's.
          mesh: where parameters go.
          yardstick: called when the injection's scale depends on the training activations.
          checkpoints: from the name of a training stage.
        """
        self.config, self.mesh = config, mesh
        self._yardstick, self._checkpoints = yardstick, checkpoints

    @functools.cached_property
    def target(self) -> LanguageModel:
        """The target LM, its weights placed on the mesh as they are read; `release_target` frees them."""
        return self._read(self.config.model.path)

    def _read(self, path: str) -> LanguageModel:
        lora = self.config.lora
        dtype = lora.base_dtype if lora.rank else "float32"
        lm = load_language_model(path, mesh=self.mesh, dtype=dtype)
        return dataclasses.replace(lm, params=self.in_configured_form(lm.params))

    def in_configured_form(self, params: Any, *, stacked: bool | None = None) -> Any:
        """Parameters with their blocks stacked or not, by default as `model.scan_blocks` asks."""
        stacked = self.config.model.scan_blocks if stacked is None else stacked
        change = stack_blocks if stacked else unstack_blocks
        shapes = jax.eval_shape(change, params)
        if jax.tree.structure(shapes) == jax.tree.structure(params):
            return params
        return jax.jit(change, out_shardings=tree_shardings(shapes, self.mesh))(params)

    @functools.cached_property
    def lm(self) -> LanguageModel:
        """The target without its weights: name, config, tokenizer."""
        if "target" in self.__dict__:
            return dataclasses.replace(self.target, params={})
        return load_language_model(self.config.model.path, weights=False)

    @functools.cached_property
    def base(self) -> LanguageModel:
        """The LM that AV and AR start from: the target, or the one at `model.initial_path`."""
        if self.config.model.initial_path is None:
            return self.target
        return self._read(self.config.model.initial_path)

    @functools.cached_property
    def base_lm(self) -> LanguageModel:
        """The same without its weights.

        Raises:
          ValueError: its width is not the target's.
        """
        path = self.config.model.initial_path
        if path is None:
            return self.lm
        lm = load_language_model(path, weights=False)
        if lm.config.d_model != self.lm.config.d_model:
            raise ValueError(
                f"AV and AR cannot start from {path} (model.initial_path): its residual stream is {lm.config.d_model} "
                f"wide, and that of the target {self.lm.name} {self.lm.config.d_model}; name a model of the target's "
                "width, or none for the target itself"
            )
        return lm

    def release_target(self) -> None:
        """Let go of the weights of `target` and `base`, unless adapters need them; the next use reads them again."""
        if self.config.model.frozen_blocks and "base" in self.__dict__:
            self.bases  # noqa: B018 - what is frozen of the base stays, and would be read anew otherwise
        if not self.config.lora.rank:
            self.__dict__.pop("base", None)
        if not self.config.lora.rank or self.config.model.initial_path is not None:
            self.__dict__.pop("target", None)
        return_freed_memory()

    @functools.cached_property
    def bases(self) -> dict[str, FrozenBase]:
        """The frozen weights of "av" and "ar": those of `base` below adapters, or in its first blocks; else nothing."""
        if blocks := self.config.model.frozen_blocks:
            # Where the base is not there already, what is read of it beside the frozen blocks is let go.
            path = self.config.model.initial_path or self.config.model.path
            base = self.base if "base" in self.__dict__ else self._read(path)
            frozen, _ = split_frozen(base.params, blocks)
            return dict.fromkeys(("av", "ar"), FrozenBase(frozen, 1.0))
        if not self.config.lora.rank:
            return {}
        lm, scale = self.base.params, self.config.lora.scale
        return {
            "av": FrozenBase(lm, scale),
            "ar": FrozenBase(self.autoencoder.reconstructor.init(lm)["lm"], scale),
        }

    def initial_state(self, model: ModelName, optimizer: optax.GradientTransformation) -> TrainState:
        """The "av" or "ar" as its warm start begins."""
        part = {"av": self.autoencoder.verbalizer, "ar": self.autoencoder.reconstructor}[model]
        params, lora = part.init(self.base.params), self.config.lora
        if lora.rank:
            params = init_adapters(lora, params, key_for(self.config.seed, f"{model} lora"))
        elif blocks := self.config.model.frozen_blocks:
            params = {**params, "lm": split_frozen(params["lm"], blocks)[1]}
        return TrainState.create(params, optimizer)

    @functools.cached_property
    def lm_config(self) -> LMConfig:
        """The target's config with this run's dtypes and attention.

        Raises:
          ValueError: a layer that the LM does not have, or attention that the devices cannot compute.
        """
        return self._applied(self.lm.config)

    @functools.cached_property
    def base_config(self) -> LMConfig:
        """That of the LM that AV and AR start from; raises as `lm_config`."""
        return self._applied(self.base_lm.config)

    def _applied(self, lm_config: LMConfig) -> LMConfig:
        config = self.config.model.applied(lm_config)
        platform = self.mesh.devices.flat[0].platform
        check_implementation(
            config.attention,
            head_dim=config.head_dim,
            dtype=config.cache_dtype,
            softcap=config.attention_softcap,
            platform=platform,
        )
        return config

    @functools.cached_property
    def prompts(self) -> tuple[VerbalizerPrompt, ReconstructorPrompt]:
        """AV and AR prompts; ValueError where the templates do not fit the tokenizer."""
        tokenizer, templates = self.base_lm.tokenizer, self.config.templates
        return build_verbalizer_prompt(tokenizer, templates), build_reconstructor_prompt(tokenizer, templates)

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """AV and AR with everything that turns texts into tokens and back."""
        av_prompt, ar_prompt = self.prompts
        config, pack = self.config, self.mesh.size == 1
        scale, remat = self._injection_scale(), config.model.remat
        return Autoencoder(
            self.base_lm.tokenizer,
            Verbalizer(self.base_config, av_prompt, config.injection, scale, remat, pack),
            Reconstructor(self.base_config.truncated(config.model.layer), ar_prompt, remat, pack),
            config.max_explanation_tokens,
            config.max_reconstructor_tokens,
        )

    def _injection_scale(self) -> float:
        """The number that `injection.scale` stands for."""
        scale = self.config.injection.scale
        if scale == "p75":
            return self._yardstick().norm_p75
        return self.lm_config.d_model**0.5 if scale == "sqrt_d" else float(scale)

    @functools.cached_property
    def prompt_ids(self) -> PromptIds:
        """The token ids that bind data to this tokenizer and these templates."""
        av, ar = self.prompts
        return PromptIds(
            injection_char=av.marker_text,
            injection_token_id=av.marker,
            injection_left_neighbor_id=av.prefix[-1],
            injection_right_neighbor_id=av.tail[0],
            critic_suffix_ids=ar.suffix,
        )

    @functools.cached_property
    def round_trip(self) -> RoundTrip:
        """Explaining and reconstructing, compiled for the evaluation's batches."""
        return RoundTrip(self.autoencoder, self.mesh, self.config.evaluation.batch_size)

    def warm_start_params(self, model: ModelName) -> Any:
        """Whole parameters of the warm-start "av" (RL's reference) or "ar" (the judge)."""
        return self.model_params(self.warm_start_stage(model), model)

    def warm_start_stage(self, model: ModelName) -> str:
        """The last stage that trains "av" or "ar" before joint training."""
        return "distill" if model == "av" and self.config.distill.loop.steps else f"{model}_sft"

    def model_params(self, stage: str, model: ModelName, step: int | None = None) -> Any:
        """Whole parameters of "av" or "ar" from a checkpoint of a stage, the best by default."""
        return self.with_base(model, self.trainable_params(stage, model, step))

    def trainable_params(self, stage: str, model: ModelName, step: int | None = None) -> Any:
        """What a stage trained of "av" or "ar" (adapters alone, where there are some), the best by default."""
        checkpoints = self._checkpoints(stage)
        step = checkpoints.best() if step is None else step
        return self.in_configured_form(restore_params(checkpoints.directory, model, step, self.mesh))

    def with_base(self, model: ModelName, trained: Any) -> Any:
        """The whole parameters of "av" or "ar" from what is trained of them."""
        return with_adapters(self.bases.get(model), trained)
