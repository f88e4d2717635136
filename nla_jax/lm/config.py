"""LMConfig: one frozen description for every decoder family; families differ in fields, never in classes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

KNOWN_ARCHITECTURES = {
    # Hugging Face `architectures[0]` and GGUF `general.architecture` -> family.
    "LlamaForCausalLM": "llama",
    "llama": "llama",
}


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Shape and arithmetic of a decoder-only transformer."""

    family: str
    """Name of the weight table in `lm/weights.py`."""
    vocab_size: int
    d_model: int
    num_layers: int
    """Number of blocks; the residual stream after block k is layer k, counted from 0."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    """Whether the LM head is the transposed embedding."""
    max_positions: int = 8192
    has_lm_head: bool = True
    """False for truncated backbones (the AR): no final norm and no LM head."""
    dtype: str = "float32"
    """Operand dtype of the products with weights; results, norms, softmax and losses stay in float32."""
    attention_dtype: str = "float32"
    """Operand dtype of attention's own products and of cached keys and values. XLA:CPU has no bfloat16 for them."""

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "grouped attention needs equal groups"
            )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a JAX dtype."""
        return jnp.dtype(self.dtype)

    @property
    def cache_dtype(self) -> jnp.dtype:
        """`attention_dtype` as a JAX dtype."""
        return jnp.dtype(self.attention_dtype)

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
        return dataclasses.replace(self, num_layers=self.check_layer(layer) + 1, has_lm_head=False)


def family_of(architecture: str) -> str:
    """Map an architecture name to its family; an unknown one raises ValueError with the known ones."""
    if architecture not in KNOWN_ARCHITECTURES:
        raise ValueError(
            f"unknown architecture {architecture!r}; known: {', '.join(sorted(KNOWN_ARCHITECTURES))}"
        )
    return KNOWN_ARCHITECTURES[architecture]


def config_from_hf(hf: Mapping[str, Any]) -> LMConfig:
    """Read a Hugging Face `config.json` mapping.

    Raises:
      ValueError: unknown architecture, or a field whose value this port does not implement.
    """
    family = family_of((hf.get("architectures") or [hf.get("model_type", "missing")])[0])
    # transformers 5 writes rope settings into `rope_parameters`; earlier versions at the top level.
    rope = hf.get("rope_parameters") or {}
    rope_type = rope.get("rope_type") or (hf.get("rope_scaling") or {}).get("rope_type", "default")
    unsupported = {
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(hf.get("attention_bias")),
        "mlp_bias": bool(hf.get("mlp_bias")),
        "rope_scaling": rope_type != "default",
    }
    if bad := [name for name, is_bad in unsupported.items() if is_bad]:
        values = ", ".join(f"{name}={hf.get(name, rope_type)!r}" for name in bad)
        raise ValueError(f"config fields not supported by this port: {values}")
    num_heads = hf["num_attention_heads"]
    return LMConfig(
        family=family,
        vocab_size=hf["vocab_size"],
        d_model=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads") or num_heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
        d_ff=hf["intermediate_size"],
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta") or hf.get("rope_theta", 10000.0),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        max_positions=hf.get("max_position_embeddings", 2048),
    )


def config_from_gguf(header: Mapping[str, Any], tensor_names: frozenset[str]) -> LMConfig:
    """Read a GGUF header (`key -> value`); `tensor_names` tells whether the LM head is tied.

    Raises:
      ValueError: unknown architecture or unsupported rope scaling.
    """
    arch = header["general.architecture"]
    family = family_of(arch)
    if header.get(f"{arch}.rope.scaling.type", "none") != "none":
        raise ValueError(f"{arch}.rope.scaling.type={header[f'{arch}.rope.scaling.type']!r} is not supported")
    num_heads = header[f"{arch}.attention.head_count"]
    d_model = header[f"{arch}.embedding_length"]
    return LMConfig(
        family=family,
        vocab_size=len(header["tokenizer.ggml.tokens"]),
        d_model=d_model,
        num_layers=header[f"{arch}.block_count"],
        num_heads=num_heads,
        num_kv_heads=header.get(f"{arch}.attention.head_count_kv", num_heads),
        head_dim=header.get(f"{arch}.attention.key_length", d_model // num_heads),
        d_ff=header[f"{arch}.feed_forward_length"],
        rms_norm_eps=header[f"{arch}.attention.layer_norm_rms_epsilon"],
        rope_theta=header.get(f"{arch}.rope.freq_base", 10000.0),
        tie_embeddings="output.weight" not in tensor_names,
        max_positions=header.get(f"{arch}.context_length", 2048),
    )
