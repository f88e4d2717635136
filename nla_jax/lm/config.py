"""LMConfig: one frozen description for every decoder family; families differ in fields, never in classes."""

import dataclasses
from typing import Literal

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining."""

    kind: Literal["linear", "llama3"]
    """linear divides every frequency by `factor`; llama3 divides only the slow ones, with a smooth transition."""
    factor: float
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_positions / low_freq_factor are divided by the whole `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_positions / high_freq_factor are not scaled."""
    original_positions: int = 8192
    """llama3: context length of pretraining, in tokens."""


@dataclasses.dataclass(frozen=True)
class Experts:
    """Feed-forward layers of which a router picks a few for each token."""

    count: int
    per_token: int
    d_ff: int
    normalize: bool = True
    """Whether the weights of a token's experts are divided by their sum."""


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Shape and arithmetic of a decoder-only transformer; the defaults are Llama's."""

    family: str
    """Key of `FAMILIES` in `lm/files/families.py`; it decides names of tensors and config fields, not arithmetic."""
    vocab_size: int
    d_model: int
    num_layers: int
    """Number of blocks; the residual stream after block k is layer k, counted from 0."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    norm: Literal["rms", "layer"] = "rms"
    """Root-mean-square norm, or LayerNorm with bias."""
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    """Added to the stored scales of all norms. Gemma stores them around 0, so that its offset is 1."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """The place of norms: the inputs of attention and MLP, their outputs to the residual stream, or both."""
    parallel_residual: bool = False
    """Whether the MLP reads the stream that entered the block, as attention does, without attention's output."""
    qk_norm: Literal["none", "head", "whole"] = "none"
    """Norm of queries and keys before rotation: each head by itself, or the whole projection at once."""
    qkv_bias: bool = False
    out_bias: bool = False
    """Whether attention's output projection has a bias."""
    mlp_bias: bool = False
    activation: str = "silu"
    """Key of `ACTIVATIONS` in `lm/layers.py`, by transformers' names."""
    gated_mlp: bool = True
    scale_embeddings: bool = False
    """Whether token embeddings are multiplied by sqrt(d_model)."""
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0
    """Share of each head's entries, from the first on, that is rotated; the other entries carry no position."""
    local_rope_theta: float | None = None
    """Theta of sliding layers, whose frequencies are then not scaled; None rotates them like the other layers."""
    sliding_window: int | None = None
    """Sliding layers see the keys at distance 0..sliding_window - 1."""
    sliding_layers: tuple[bool, ...] = ()
    """For each block, whether its attention slides; empty means that none does."""
    attention_scale_dim: int | None = None
    """Scores are divided by the square root of this; None means head_dim."""
    attention_softcap: float | None = None
    """With a number c, attention scores s become c * tanh(s / c)."""
    logit_softcap: float | None = None
    """With a number c, logits x become c * tanh(x / c)."""
    experts: Experts | None = None
    expert_layers: tuple[bool, ...] = ()
    """For each block, whether it routes to `experts` instead of having an MLP; empty means that none does."""
    tie_embeddings: bool = False
    """Whether the LM head is the transposed embedding."""
    max_positions: int = 8192
    """Context length; with learned positions a position past it gives NaN."""
    has_lm_head: bool = True
    """False for truncated backbones (the AR): no final norm and no LM head."""
    dtype: str = "float32"
    """Operand dtype of the products with weights; results, norms, softmax and losses stay in float32."""
    attention_dtype: str = "float32"
    """Operand dtype of attention's own products and of cached keys and values. XLA:CPU has no bfloat16 for them."""
    attention: Literal["xla", "cudnn", "splash"] = "xla"
    """The implementation of attention among one piece's own tokens, see `lm/attention_kernels.py`."""

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "grouped attention needs equal groups"
            )
        for name, needs in (("sliding_layers", "sliding_window"), ("expert_layers", "experts")):
            pattern = getattr(self, name)
            if pattern and len(pattern) != self.num_layers:
                raise ValueError(
                    f"{name} has {len(pattern)} entries for {self.num_layers} blocks; give one a block"
                )
            if any(pattern) and getattr(self, needs) is None:
                raise ValueError(f"{name} names blocks, but {needs} is None")

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a JAX dtype."""
        return jnp.dtype(self.dtype)

    @property
    def cache_dtype(self) -> jnp.dtype:
        """`attention_dtype` as a JAX dtype."""
        return jnp.dtype(self.attention_dtype)

    @property
    def attention_scale(self) -> float:
        """The factor of attention scores."""
        return (self.attention_scale_dim or self.head_dim) ** -0.5

    def window(self, layer: int) -> int | None:
        """The sliding window of a block; None where it sees everything before it."""
        return self.sliding_window if self.sliding_layers and self.sliding_layers[layer] else None

    def rope(self, layer: int) -> tuple[float, RopeScaling | None]:
        """Theta and scaling of a block's rotary frequencies."""
        if self.local_rope_theta is not None and self.window(layer) is not None:
            return self.local_rope_theta, None
        return self.rope_theta, self.rope_scaling

    def routes(self, layer: int) -> bool:
        """Whether a block has experts instead of an MLP."""
        return bool(self.expert_layers) and self.expert_layers[layer]

    def check_layer(self, layer: int) -> int:
        """Return `layer` if it names a block of this model; raise ValueError with the valid range if not."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(
                f"layer {layer} is outside the model: it has blocks 0 to {self.num_layers - 1} "
                f"(layer k is the residual stream after block k)"
            )
        return layer

    def truncated(self, layer: int) -> "LMConfig":
        """The config of blocks 0..layer alone, without final norm and LM head: the AR's backbone."""
        blocks = self.check_layer(layer) + 1
        return dataclasses.replace(
            self,
            num_layers=blocks,
            sliding_layers=self.sliding_layers[:blocks],
            expert_layers=self.expert_layers[:blocks],
            has_lm_head=False,
        )
