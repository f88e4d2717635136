"""The setting of a benchmark: a model, its two prompts, and the sizes of the work.

Shape letters: B batch, N activations, G group, T time, P positions a document, D model.
"""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.autoencoder.prompts import (
    PromptTemplates,
    ReconstructorPrompt,
    VerbalizerPrompt,
    build_reconstructor_prompt,
    build_verbalizer_prompt,
)
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import InjectionConfig, Verbalizer
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.weights import load_language_model
from nla_jax.lm.language_model import LanguageModel
from nla_jax.lm.transformer import Params, init_params
from nla_jax.planning.architectures import read_architecture
from nla_jax.training.state import OptimizerConfig
from nla_jax.training.supervised import ReconstructorBatch, VerbalizerBatch

SHAPES = {"qwen2.5-7b-shape": "Qwen2.5-7B-Instruct", "qwen3-8b-shape": "Qwen3-8B"}
"""Models with random weights -> the name under which `read_architecture` has their config."""
TEMPLATES = PromptTemplates(
    verbalizer="A vector was read from a language model at the last word of some text. Say what the text is about, "
    "how it ends and what comes next. Write a few short statements, the most important one first, and nothing "
    "about the vector itself. Vector: {injection_char}"
)
"""Templates with an instruction of common length: 96 tokens of SmolLM2."""
OPTIMIZER = OptimizerConfig(learning_rate=1e-5, warmup_steps=0)
SCALE = 240.0
"""Norm of an injected vector; about the median norm at layer 20 of SmolLM2-135M."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the work that each row does."""

    documents: int = 16
    document_tokens: int = 128
    positions: int = 6
    """Activations kept of each document."""
    activations: tuple[int, ...] = (1, 8, 64)
    """Batches of the generation row."""
    group: int = 8
    new_tokens: int = 40
    batch: int = 16
    """Rows of a supervised step."""
    response_tokens: int = 64
    reconstructor_tokens: int = 48
    round_activations: int = 8
    micro_batches: int = 4
    """Number of parts that the batch of either update of a round is cut into, on both sides."""
    growth: dict[str, tuple[int, ...]] = dataclasses.field(
        default_factory=lambda: {
            "activations": (2, 4, 8),
            "group": (2, 4, 8),
            "answer tokens": (20, 40, 80),
        }
    )
    """Sizes that the growth table varies, one at a time around the middle value of the others."""
    growth_depths: tuple[float, ...] = (0.5, 1, 2)
    """Numbers of blocks that the growth table varies, as multiples of the model's own."""
    buffer_bytes: int = 2**29
    """Bytes that are copied to measure memory bandwidth."""
    matmul_size: int = 2048
    """Side of the matrices that measure the peak of arithmetic; a GPU takes four times as much."""


TINY = Sizes(
    documents=2,
    document_tokens=16,
    positions=2,
    activations=(2,),
    group=2,
    new_tokens=6,
    batch=2,
    response_tokens=6,
    reconstructor_tokens=16,
    round_activations=2,
    micro_batches=2,
    buffer_bytes=2**20,
    matmul_size=64,
    growth={"activations": (1, 2), "group": (2,), "answer tokens": (4,)},
    growth_depths=(1,),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model at one dtype, with all inputs that both sides get."""

    lm: LanguageModel
    exported: Path
    """Directory of the same weights for transformers."""
    sizes: Sizes
    dtype: str
    repeats: int

    @property
    def config(self) -> LMConfig:
        """The model's config at this dtype; XLA has no bfloat16 for attention's products on CPU."""
        attention_dtype = "float32" if jax.default_backend() == "cpu" else self.dtype
        return dataclasses.replace(self.lm.config, dtype=self.dtype, attention_dtype=attention_dtype)

    @property
    def layer(self) -> int:
        """The explained layer, at two thirds of the depth: 20 of SmolLM2's 30."""
        return self.lm.config.num_layers * 2 // 3

    @functools.cached_property
    def master_params(self) -> Params:
        """The model's weights in float32, for training."""
        return jax.tree.map(lambda x: x.astype(jnp.float32), self.lm.params)

    @functools.cached_property
    def prompts(self) -> tuple[VerbalizerPrompt, ReconstructorPrompt]:
        """AV and AR prompts; no sampled token ends an answer, so that all have full length."""
        vocabulary = self.config.vocab_size
        if self.lm.tokenizer is not None:
            av = build_verbalizer_prompt(self.lm.tokenizer, TEMPLATES)
            ar = build_reconstructor_prompt(self.lm.tokenizer, TEMPLATES)
        else:
            # Prompts as long as SmolLM2's.
            ids = [int(i) for i in np.random.default_rng(3).integers(0, vocabulary, 96)]
            av = VerbalizerPrompt(tuple(ids[:80]), ids[80], tuple(ids[81:]), (), 0, "")
            ar = ReconstructorPrompt("", tuple(ids[:3]), tuple(ids[3:7]))
        return dataclasses.replace(av, closing=(vocabulary,), end_token=vocabulary), ar

    @property
    def verbalizer(self) -> Verbalizer:
        """The AV: injection replaces the marker's embedding."""
        return Verbalizer(self.config, self.prompts[0], InjectionConfig(scale=SCALE), SCALE)

    @property
    def reconstructor(self) -> Reconstructor:
        """The AR."""
        return Reconstructor(self.config.truncated(self.layer), self.prompts[1])

    def activations(self, count: int) -> np.ndarray:
        """Random activations, (N, D)."""
        return np.random.default_rng(0).standard_normal((count, self.config.d_model), np.float32)

    def tokens(self, rows: int, length: int) -> np.ndarray:
        """Random token ids, (B, T)."""
        return np.random.default_rng(1).integers(0, self.config.vocab_size, (rows, length), np.int32)

    def verbalizer_batch(self, rows: int | None = None, length: int | None = None) -> VerbalizerBatch:
        """A batch of the AV step, every answer of full length."""
        rows, length = rows or self.sizes.batch, length or self.sizes.response_tokens
        columns = {
            "activations_BD": self.activations(rows),
            "responses_BT": self.tokens(rows, length),
            "lengths_B": np.full(rows, length, np.int32),
        }
        return VerbalizerBatch(**jax.device_put(columns))

    def reconstructor_batch(self) -> ReconstructorBatch:
        """A batch of the AR step; `reconstructor_tokens` counts the prefix, which the batch does not hold."""
        rows = self.sizes.batch
        length = self.sizes.reconstructor_tokens - len(self.prompts[1].prefix)
        columns = {
            "prompts_BT": self.tokens(rows, length),
            "lengths_B": np.full(rows, length, np.int32),
            "activations_BD": self.activations(rows),
            "weights_B": np.ones(rows, np.float32),
        }
        return ReconstructorBatch(**jax.device_put(columns))


def load(spec: str, layers: int | None) -> LanguageModel:
    """The model of a spec, or of a name in SHAPES, cut or stretched to `layers`; models of SHAPES have no tokenizer."""
    if spec in SHAPES:
        config = read_architecture(SHAPES[spec])
        config = dataclasses.replace(config, num_layers=layers or config.num_layers)
        return LanguageModel(config, random_params(config), None, spec)
    lm = load_language_model(spec)
    if layers:
        config, params = with_depth(lm.config, lm.params, layers)
        lm = dataclasses.replace(lm, config=config, params=params, name=f"{lm.name}, {layers} layers")
    return lm


def random_params(config: LMConfig) -> Params:
    """Random weights, made in bfloat16 on the device."""
    make = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(config, key)))
    return make(jax.random.key(0))


def with_depth(config: LMConfig, params: Params, layers: int) -> tuple[LMConfig, Params]:
    """The model with another number of blocks: its own blocks repeated in turn, sharing their weights."""
    sources = [i % config.num_layers for i in range(layers)]
    patterns = {
        name: tuple(pattern[i] for i in sources)
        for name in ("sliding_layers", "expert_layers")
        if (pattern := getattr(config, name))
    }
    outside = {name: tree for name, tree in params.items() if not name.startswith("blocks_")}
    blocks = {f"blocks_{i}": params[f"blocks_{source}"] for i, source in enumerate(sources)}
    return dataclasses.replace(config, num_layers=layers, **patterns), {**outside, **blocks}


def obstacle(row: str, setting: Setting) -> str | None:
    """The reason why a row cannot be measured here, or None; memory of activations is not counted."""
    if row == "round" and setting.lm.tokenizer is None:
        return "a model without a tokenizer cannot turn answers into AR prompts"
    count = sum(x.size for x in jax.tree.leaves(setting.lm.params))
    stored = sum(x.nbytes for x in jax.tree.leaves(setting.lm.params))
    inference, update = count * jnp.dtype(setting.dtype).itemsize, 16 * count
    needed = {
        "extraction": 2 * inference,
        "generation": 2 * inference,
        "limits": inference,
        "limits: training": update,
        "growth": inference + 2 * update,
        # Float32 masters to start from, and on each side weights, gradients and two moments.
        "ar_step": 2 * update + 4 * count,
        "av_step": 2 * update + 4 * count,
        "round": 4 * update + 4 * inference,
    }[row] + stored
    stats = jax.devices()[0].memory_stats() or {}
    available = stats.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if needed > available:
        return (
            f"it takes {needed / 1e9:.0f} GB of {available / 1e9:.0f} GB; --layers N makes the model smaller"
        )
    return None
