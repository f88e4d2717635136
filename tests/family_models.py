"""One small random transformers model for each family, with odd sizes and everything on that the family has."""

from typing import Any

VOCABULARY, BLOCKS, WINDOW = 61, 3, 5
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
}
_PLAIN_SHAPE = {key: value for key, value in _SHAPE.items() if key not in ("num_key_value_heads", "head_dim")}
_PATTERN = ["sliding_attention", "full_attention", "sliding_attention"]
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    # So short that the five frequencies fall on all three sides of the borders.
    "original_max_position_embeddings": 16,
}
_GEMMA = _SHAPE | {
    "sliding_window": WINDOW,
    "layer_types": _PATTERN,
    "query_pre_attn_scalar": 7,
    "final_logit_softcapping": 2.0,
    "tie_word_embeddings": True,
}
_EXPERTS = {"num_experts_per_tok": 2}
CONFIGS = {
    "llama": (
        "llama",
        _SHAPE | {"rope_theta": 100.0, "rope_scaling": _LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    "llama_linear": (
        "llama",
        _SHAPE | {"rope_scaling": {"rope_type": "linear", "factor": 2.5}, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", _SHAPE | {"sliding_window": WINDOW}),
    "qwen2": (
        "qwen2",
        _SHAPE
        | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "rope_theta": 1e6},
    ),
    "qwen3": ("qwen3", _SHAPE | {"attention_bias": True}),
    "gemma2": ("gemma2", _GEMMA | {"attn_logit_softcapping": 1.5}),
    "gemma3": (
        "gemma3_text",
        _GEMMA
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ),
    # These take the head size from the others: 24 / 4 = 6.
    "olmo2": ("olmo2", {key: value for key, value in _SHAPE.items() if key != "head_dim"}),
    "phi3": (
        "phi3",
        {key: value for key, value in _SHAPE.items() if key != "head_dim"}
        | {
            "hidden_size": 40,
            "partial_rotary_factor": 0.6,
            "sliding_window": WINDOW,
        },
    ),
    "gpt_neox": ("gpt_neox", _PLAIN_SHAPE | {"hidden_size": 40, "rotary_pct": 0.4, "rotary_emb_base": 100}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 24,
            "n_layer": BLOCKS,
            "n_head": 4,
            "n_positions": 64,
            "n_inner": 40,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        _SHAPE
        | _EXPERTS
        | {"num_experts": 5, "moe_intermediate_size": 12, "mlp_only_layers": [1], "norm_topk_prob": False},
    ),
    "mixtral": ("mixtral", _SHAPE | _EXPERTS | {"num_local_experts": 4, "sliding_window": WINDOW}),
}


def build(name: str, **changes: Any) -> Any:
    """The torch model of a family, every weight random and large enough to matter, with eager attention.

    `changes` are fields of its config.
    """
    import torch
    import transformers

    model_type, settings = CONFIGS[name]
    ids = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])
    config = transformers.AutoConfig.for_model(model_type, **settings | ids | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(spread * torch.randn_like(parameter))
    return model


def decoder_layers(model: Any) -> Any:
    """The blocks, whatever the family calls them."""
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers
