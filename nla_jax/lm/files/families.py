"""The names that model families use: of tensors in their weight files, and of fields in their config.json.

A row of a family's table says which of our parameters hold a tensor's numbers. A model uses the rows whose parameters
it has; families therefore share rows, and no row has to say when a bias or a norm is there. Every row works in both
directions, reading and writing.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.tensor_rows import TensorRow
from nla_jax.lm.transformer import parameter_shapes


def _linear(
    hf: str, *paths: str, gguf: str = "", transpose: bool = True, by_head: bool = False
) -> list[TensorRow]:
    kernels, biases = (tuple(f"{path}/{leaf}" for path in paths) for leaf in ("kernel", "bias"))
    return [
        TensorRow(f"{hf}.weight", kernels, f"{gguf}.weight", transpose, by_head),
        TensorRow(f"{hf}.bias", biases, f"{gguf}.bias", False, by_head),
    ]


def _norm(hf: str, path: str, gguf: str = "") -> list[TensorRow]:
    return [
        TensorRow(f"{hf}.weight", (f"{path}/scale",), f"{gguf}.weight"),
        TensorRow(f"{hf}.bias", (f"{path}/bias",), f"{gguf}.bias"),
    ]


def _blocks(prefix: str, *groups: list[TensorRow]) -> list[TensorRow]:
    return [
        row._replace(
            hf=f"{prefix}.{row.hf}",
            gguf=f"blk.{{i}}.{row.gguf}",
            paths=tuple(f"blocks_{{i}}/{path}" for path in row.paths),
        )
        for group in groups
        for row in group
    ]


_QKV = ("attention/query", "attention/key", "attention/value")
_ENDS = [
    TensorRow("model.embed_tokens.weight", ("embed/embedding",), "token_embd.weight"),
    *_norm("model.norm", "final_norm", "output_norm"),
    *_linear("lm_head", "lm_head", gguf="output"),
]
_ATTENTION = [
    *_linear("self_attn.q_proj", _QKV[0], gguf="attn_q"),
    *_linear("self_attn.k_proj", _QKV[1], gguf="attn_k"),
    *_linear("self_attn.v_proj", _QKV[2], gguf="attn_v"),
    *_norm("self_attn.q_norm", "attention/query_norm", "attn_q_norm"),
    *_norm("self_attn.k_norm", "attention/key_norm", "attn_k_norm"),
]
_OUT = _linear("self_attn.o_proj", "attention/out", gguf="attn_output")
_PRE_NORMS = [
    *_norm("input_layernorm", "attention_norm", "attn_norm"),
    *_norm("post_attention_layernorm", "mlp_norm", "ffn_norm"),
]
_OUTER_NORMS = [
    *_norm("input_layernorm", "attention_norm", "attn_norm"),
    *_norm("post_attention_layernorm", "attention_post_norm", "post_attention_norm"),
    *_norm("pre_feedforward_layernorm", "mlp_norm", "ffn_norm"),
    *_norm("post_feedforward_layernorm", "mlp_post_norm", "post_ffw_norm"),
]
_DOWN = _linear("mlp.down_proj", "mlp/down", gguf="ffn_down")
_MLP = [
    *_linear("mlp.gate_proj", "mlp/gate", gguf="ffn_gate"),
    *_linear("mlp.up_proj", "mlp/up", gguf="ffn_up"),
    *_DOWN,
]


def _routed(prefix: str, gate: str, up: str, down: str) -> list[TensorRow]:
    return [TensorRow(f"{prefix}.gate.weight", ("mlp/router",), transpose=True)] + [
        TensorRow(f"{prefix}.experts.{{e}}.{hf}.weight", (f"mlp/{path}",), transpose=True)
        for hf, path in ((gate, "gate"), (up, "up"), (down, "down"))
    ]


_LAYERS = "model.layers.{i}"
_LLAMA = [*_ENDS, *_blocks(_LAYERS, _ATTENTION, _OUT, _PRE_NORMS, _MLP)]
_GEMMA = [*_ENDS, *_blocks(_LAYERS, _ATTENTION, _OUT, _OUTER_NORMS, _MLP)]
_QWEN_MOE = [*_LLAMA, *_blocks(_LAYERS, _routed("mlp", "gate_proj", "up_proj", "down_proj"))]
_MIXTRAL = [
    *_ENDS,
    *_blocks(_LAYERS, _ATTENTION, _OUT, _PRE_NORMS, _routed("block_sparse_moe", "w1", "w3", "w2")),
]
_PHI = [
    *_ENDS,
    *_blocks(
        _LAYERS,
        _linear("self_attn.qkv_proj", *_QKV),
        _OUT,
        _PRE_NORMS,
        _linear("mlp.gate_up_proj", "mlp/gate", "mlp/up"),
        _DOWN,
    ),
]
_NEOX = [
    TensorRow("gpt_neox.embed_in.weight", ("embed/embedding",)),
    *_norm("gpt_neox.final_layer_norm", "final_norm"),
    *_linear("embed_out", "lm_head"),
    *_blocks(
        "gpt_neox.layers.{i}",
        _linear("attention.query_key_value", *_QKV, by_head=True),
        _linear("attention.dense", "attention/out"),
        _PRE_NORMS,
        _linear("mlp.dense_h_to_4h", "mlp/up"),
        _linear("mlp.dense_4h_to_h", "mlp/down"),
    ),
]
_GPT2 = [
    TensorRow("transformer.wte.weight", ("embed/embedding",)),
    TensorRow("transformer.wpe.weight", ("position_embed/embedding",)),
    *_norm("transformer.ln_f", "final_norm"),
    *_linear("lm_head", "lm_head"),
    *_blocks(
        "transformer.h.{i}",
        _norm("ln_1", "attention_norm"),
        _linear("attn.c_attn", *_QKV, transpose=False),
        _linear("attn.c_proj", "attention/out", transpose=False),
        _norm("ln_2", "mlp_norm"),
        _linear("mlp.c_fc", "mlp/up", transpose=False),
        _linear("mlp.c_proj", "mlp/down", transpose=False),
    ),
]

_COMMON = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "activation": "hidden_act",
}
_GROUPED = _COMMON | {"num_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps"}
_MODERN = _GROUPED | {"head_dim": "head_dim"}
_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_GEMMA_NAMES = (
    _MODERN
    | _ATTENTION_BIAS
    | {
        "activation": "hidden_activation",
        "logit_softcap": "final_logit_softcapping",
        "attention_scale_dim": "query_pre_attn_scalar",
    }
)
_GEMMA_FIXED = {"norm_offset": 1.0, "norm_placement": "both", "scale_embeddings": True}
_PLAIN_MLP = {"norm": "layer", "gated_mlp": False, "mlp_bias": True}


def _slides(config: LMConfig) -> bool:
    return config.sliding_window is not None


def _blocks_without_experts(config: LMConfig) -> list[int]:
    return [layer for layer in range(config.num_layers) if not config.routes(layer)]


class Family(NamedTuple):
    """The names and fixed settings in the config.json and weight files of one family."""

    architecture: str
    model_type: str
    rows: list[TensorRow]
    names: Mapping[str, str]
    """Field of LMConfig -> field of config.json."""
    fixed: Mapping[str, Any] = {}
    """Fields of LMConfig that are the same for the whole family."""
    rope: Mapping[str, str] = {"rope_theta": "rope_theta"}
    """Rotary field of LMConfig -> field of config.json that it is written to; reading takes normalised values."""
    experts: Mapping[str, str] = {}
    """Field of Experts -> field of config.json."""
    windows: Literal["none", "all", "by layer"] = "none"
    """The blocks that `sliding_window` applies to; "by layer" means those that `layer_types` calls sliding."""
    written: Mapping[str, Callable[[LMConfig], Any]] = {}
    """Further fields of config.json that are computed from LMConfig when it is written, and not read back."""
    only: Mapping[str, tuple[Any, ...]] = {}
    """Fields of config.json that must have one of these values."""
    renames: tuple[tuple[str, str], ...] = ()
    """Patterns and replacements that bring other spellings of tensor names to those of the rows."""
    skipped: str = r"rotary_emb\.inv_freq$"
    """Pattern of tensor names that are left unread on purpose; by default buffers that follow from the config."""
    permuted_in_gguf: bool = False
    """Whether GGUF files hold queries and keys in interleaved rotary order."""


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        "llama",
        _LLAMA,
        _MODERN | _ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
        permuted_in_gguf=True,
    ),
    "mistral": Family("MistralForCausalLM", "mistral", _LLAMA, _MODERN, windows="all"),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen2",
        _LLAMA,
        _MODERN,
        {"qkv_bias": True},
        windows="by layer",
        written={"use_sliding_window": _slides},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        _LLAMA,
        _MODERN | _ATTENTION_BIAS,
        {"qk_norm": "head"},
        windows="by layer",
        written={"use_sliding_window": _slides},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "gemma2",
        _GEMMA,
        _GEMMA_NAMES | {"attention_softcap": "attn_logit_softcapping"},
        _GEMMA_FIXED,
        windows="by layer",
        only={"use_bidirectional_attention": (None, False)},
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _GEMMA,
        _GEMMA_NAMES,
        _GEMMA_FIXED | {"qk_norm": "head"},
        windows="by layer",
        rope={"rope_theta": "rope_theta", "local_rope_theta": "rope_local_base_freq"},
        # transformers has the field, but computes nothing with it.
        only={"use_bidirectional_attention": (False, None), "attn_logit_softcapping": (None,)},
        renames=(
            (r"^(language_model\.model|model\.language_model)\.", "model."),
            (r"^language_model\.lm_head", "lm_head"),
        ),
        # The other half of Gemma3ForConditionalGeneration reads images.
        skipped=r"rotary_emb\.inv_freq$|^(model\.)?(vision_tower|multi_modal_projector)\.",
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        "olmo2",
        _GEMMA,
        _GROUPED | _ATTENTION_BIAS,
        {"norm_placement": "post", "qk_norm": "whole"},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "phi3",
        _PHI,
        _GROUPED,
        rope={"rope_theta": "rope_theta", "rotary_fraction": "partial_rotary_factor"},
        windows="all",
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        _NEOX,
        _COMMON
        | _ATTENTION_BIAS
        | {"norm_eps": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
        _PLAIN_MLP,
        rope={"rope_theta": "rotary_emb_base", "rotary_fraction": "rotary_pct"},
        skipped=r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "gpt2",
        _GPT2,
        _COMMON
        | {
            "d_model": "n_embd",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "d_ff": "n_inner",
            "max_positions": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
        },
        _PLAIN_MLP | {"positions": "learned", "qkv_bias": True, "out_bias": True},
        rope={},
        only={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        renames=((r"^(?=h\.|wte\.|wpe\.|ln_f\.)", "transformer."),),
        skipped=r"\.attn\.(masked_)?bias$",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        _QWEN_MOE,
        _MODERN | _ATTENTION_BIAS,
        {"qk_norm": "head"},
        experts={
            "count": "num_experts",
            "per_token": "num_experts_per_tok",
            "d_ff": "moe_intermediate_size",
            "normalize": "norm_topk_prob",
        },
        windows="all",
        written={"use_sliding_window": _slides, "mlp_only_layers": _blocks_without_experts},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "mixtral",
        _MIXTRAL,
        _MODERN,
        experts={
            "count": "num_local_experts",
            "per_token": "num_experts_per_tok",
            "d_ff": "intermediate_size",
        },
        windows="all",
    ),
}
WRAPPERS = {"Gemma3ForConditionalGeneration": "gemma3"}
"""Architectures that contain a language model, which their `text_config` describes, and the family of that model."""


def named_family(architecture: str) -> str:
    """Map a Hugging Face architecture to its family; an unknown one raises ValueError with the known ones."""
    families = {family.architecture: name for name, family in FAMILIES.items()} | WRAPPERS
    if architecture not in families:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(sorted(families))}")
    return families[architecture]


@functools.lru_cache(maxsize=16)
def tensor_rows(config: LMConfig) -> tuple[TensorRow, ...]:
    """The rows of a model with this config, one for each block; together they name every parameter once."""
    shapes = parameter_shapes(config)
    rows = [
        row.at(block)
        for row in FAMILIES[config.family].rows
        for block in (range(config.num_layers) if "{i}" in row.hf else (0,))
    ]
    rows = [row for row in rows if row.paths[0] in shapes]
    nameless = shapes.keys() - {path for row in rows for path in row.paths}
    if nameless:
        raise ValueError(f"a {config.family} checkpoint has no names for {', '.join(sorted(nameless))}")
    return tuple(rows)
