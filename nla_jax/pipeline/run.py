"""A run: its directory, its config, and what its stages and its readers share."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.prompts import build_reconstructor_prompt, build_verbalizer_prompt
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.round_trip import RoundTrip
from nla_jax.autoencoder.verbalizer import Verbalizer, resolve_scale
from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.config import ExperimentConfig, stage_digest
from nla_jax.data.dataset import ActivationDataset, load_dataset
from nla_jax.data.sidecar import PromptIds, Sidecar, sidecar_path_for
from nla_jax.data.splits import SPLITS
from nla_jax.files import write_json
from nla_jax.lm.attention_kernels import check_implementation
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.weights import LanguageModel, load_language_model
from nla_jax.lm.lora import FrozenBase, init_adapters, with_adapters
from nla_jax.lm.transformer import stack_blocks, unstack_blocks
from nla_jax.process import return_freed_memory
from nla_jax.randomness import key_for
from nla_jax.sharding.mesh import make_mesh, tree_shardings
from nla_jax.training.checkpoint import Checkpoints, restore_params
from nla_jax.training.metrics_log import MetricsLog
from nla_jax.training.state import TrainState


class Run:
    """A run directory and its config, with everything that its stages and its readers share."""

    def __init__(self, config: ExperimentConfig, directory: Path | str):
        directory = Path(directory)
        self.config, self.directory = config, directory
        self.mesh = make_mesh(config.mesh)
        events = directory / "tensorboard" if config.tensorboard else None
        self.log = MetricsLog(directory / "metrics.jsonl", tensorboard=events)

    @functools.cached_property
    def target(self) -> LanguageModel:
        """The target LM, its weights placed on the mesh as they are read; `release_target` frees them."""
        lora = self.config.lora
        dtype = lora.base_dtype if lora.rank else "float32"
        lm = load_language_model(self.config.model.path, mesh=self.mesh, dtype=dtype)
        return dataclasses.replace(lm, params=self.arranged(lm.params))

    def arranged(self, params: Any, *, stacked: bool | None = None) -> Any:
        """Parameters with their blocks stacked or not, by default as the config asks."""
        stacked = self.config.model.scan_blocks if stacked is None else stacked
        change = stack_blocks if stacked else unstack_blocks
        shapes = jax.eval_shape(change, params)
        if jax.tree.structure(shapes) == jax.tree.structure(params):
            return params
        return jax.jit(change, out_shardings=tree_shardings(shapes, self.mesh))(params)

    @functools.cached_property
    def lm(self) -> LanguageModel:
        """The target LM without its weights: name, config, tokenizer."""
        return dataclasses.replace(self.target, params={})

    def release_target(self) -> None:
        """Let go of the target's weights, unless adapters need them; the next use of `target` reads them again."""
        assert self.lm.name  # what stays must be there before the rest goes
        if not self.config.lora.rank:
            self.__dict__.pop("target", None)
        return_freed_memory()

    @functools.cached_property
    def bases(self) -> dict[str, FrozenBase]:
        """The frozen weights of "av" and "ar" where adapters are trained, which are the target's own; else nothing."""
        if not self.config.lora.rank:
            return {}
        lm, scale = self.target.params, self.config.lora.scale
        return {
            "av": FrozenBase(lm, scale),
            "ar": FrozenBase(self.codec.reconstructor.init(lm)["lm"], scale),
        }

    def initial_state(self, model: str, optimizer: optax.GradientTransformation) -> TrainState:
        """The "av" or "ar" as its warm start begins."""
        part = {"av": self.codec.verbalizer, "ar": self.codec.reconstructor}[model]
        params, lora = part.init(self.target.params), self.config.lora
        if lora.rank:
            params = init_adapters(lora, params, key_for(self.config.seed, f"{model} lora"))
        return TrainState.create(params, optimizer)

    @functools.cached_property
    def lm_config(self) -> LMConfig:
        """The LM's config with this run's dtypes and attention."""
        config = self.config.model.applied(self.lm.config)
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
    def prompts(self):
        """AV and AR prompts."""
        tokenizer, templates = self.lm.tokenizer, self.config.templates
        return build_verbalizer_prompt(tokenizer, templates), build_reconstructor_prompt(tokenizer, templates)

    @functools.cached_property
    def codec(self) -> Autoencoder:
        """AV and AR with everything that turns texts into tokens and back."""
        av_prompt, ar_prompt = self.prompts
        config, passes = self.config, (self.config.model.remat, self.mesh.size == 1)
        scale = resolve_scale(config.injection.scale, self.training_activations)
        return Autoencoder(
            self.lm.tokenizer,
            Verbalizer(self.lm_config, av_prompt, config.injection, scale, *passes),
            Reconstructor(self.lm_config.truncated(config.model.layer), ar_prompt, *passes),
            config.max_explanation_tokens,
            config.max_reconstructor_tokens,
        )

    @functools.cached_property
    def tokens(self) -> PromptIds:
        """The token ids that bind data to this tokenizer and these templates."""
        av, ar = self.prompts
        return PromptIds(
            injection_char=av.marker_text,
            injection_token_id=av.marker,
            injection_left_neighbor_id=av.prefix[-1],
            injection_right_neighbor_id=av.tail[0],
            critic_suffix_ids=ar.suffix,
        )

    def data(self, split: str) -> ActivationDataset:
        """Rows of a split, checked against the live model and tokenizer."""
        return self._splits[split]

    @functools.cached_property
    def _splits(self) -> dict[str, ActivationDataset]:
        loaded = {split: load_dataset(self.directory / "data" / split) for split in SPLITS}
        for data in loaded.values():
            self.check(data.sidecar)
        return loaded

    def check(self, sidecar: Sidecar) -> None:
        """Raise ValueError where a data set contradicts the live model or tokenizer."""
        sidecar.check(
            base_model=self.lm.name,
            layer_index=self.config.model.layer,
            d_model=self.lm_config.d_model,
            tokens=self.tokens,
        )

    @functools.cached_property
    def training_activations(self) -> np.ndarray:
        """All activations but the held-out ones."""
        return np.concatenate([self.data(split).activations for split in SPLITS if split != "held_out"])

    @functools.cached_property
    def moments(self) -> Yardstick:
        """Means of the training activations."""
        return Yardstick.of(self.training_activations)

    @functools.cached_property
    def round_trip(self) -> RoundTrip:
        """Compiled evaluation."""
        return RoundTrip(self.codec, self.mesh, self.config.evaluation.batch_size)

    def held_out(self, rows: int) -> ActivationDataset:
        """The first `rows` held-out rows in an order that mixes documents."""
        data = self.data("held_out")
        order = np.random.default_rng(self.config.seed).permutation(len(data))
        return data.take(np.sort(order[:rows]))

    def checkpoints(self, stage: str) -> Checkpoints:
        """Checkpoints of a training stage."""
        # The second judge is a second warm start of the AR, and belongs to the same config.
        configured = "ar_sft" if stage == "second_judge" else stage
        return Checkpoints(
            self.directory / "checkpoints" / stage,
            digest=stage_digest(self.config, configured),
            keep=getattr(self.config, configured).loop.keep_checkpoints,
            # Cores that write would be missing where they compute.
            background=jax.default_backend() != "cpu",
        )

    def warm_start_params(self, model: str) -> Any:
        """Parameters of the warm-start "av" (RL's reference) or "ar" (the judge)."""
        return self.trained_params(f"{model}_sft", model)

    def trained_params(self, stage: str, model: str, step: int | None = None) -> Any:
        """Parameters of "av" or "ar" from a checkpoint of a stage, the latest by default; adapters with their base."""
        return self.attached(model, self.restored_params(stage, model, step))

    def restored_params(self, stage: str, model: str, step: int | None = None) -> Any:
        """What was trained of "av" or "ar", from a checkpoint of a stage, the latest by default."""
        checkpoints = self.checkpoints(stage)
        step = step or checkpoints.latest()
        return self.arranged(restore_params(checkpoints.directory, model, step, self.mesh))

    def attached(self, model: str, trained: Any) -> Any:
        """The whole parameters of "av" or "ar" from what is trained of them."""
        return with_adapters(self.bases.get(model), trained)

    def timings(self) -> dict[str, float]:
        """Seconds that each finished stage took."""
        path = self.directory / "timings.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write_json(self, name: str, value: Any) -> None:
        """Write a file of the run directory, atomically; of several processes the first does."""
        write_json(self.directory / name, value)

    def split_paths(self) -> dict[str, Path]:
        """The data file of each split."""
        return {split: self.directory / "data" / split / f"{split}.parquet" for split in SPLITS}

    def is_written(self, path: Path, digest: str) -> bool:
        """Whether a data file is complete.

        Raises:
          ValueError: it was written with another config.
        """
        sidecar = sidecar_path_for(path)
        if not (path.exists() and sidecar.exists()):
            return False
        found = Sidecar.load(sidecar).dataset_id
        if found != digest:
            raise ValueError(
                f"{path} was written with another config (digest {found}, this run has {digest}); "
                "use another run directory, or delete this one's data/ to make it again"
            )
        return True
