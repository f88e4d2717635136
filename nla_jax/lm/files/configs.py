"""LMConfig from config.json and from GGUF headers, and config.json from LMConfig.

transformers' config classes fill in the fields that a config.json leaves out and turn older spellings into one form,
so that no default is guessed here. Code from a model's directory is never run.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from nla_jax.lm.config import Experts, LMConfig, RopeScaling
from nla_jax.lm.files.families import FAMILIES, WRAPPERS, Family, named_family
from nla_jax.lm.layers import ACTIVATIONS
from nla_jax.lm.rotary import frequencies, scaled

_TOKEN_IDS = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])
"""Token ids are set to None: without them, transformers assumes ids that mean something else in most vocabularies."""
_SCALINGS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_positions": "original_max_position_embeddings",
    },
}
"""Kind of scaling -> fields of RopeScaling and their names in config.json. longrope is not supported: it picks its
frequencies by the length of the whole text, so keys that were cached when it was shorter would be wrong."""
GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
"""Values of `general.architecture` that can be read; each is the name of a family as well."""


def config_from_hf(hf: Mapping[str, Any]) -> LMConfig:
    """Read a Hugging Face `config.json` mapping.

    Raises:
      KeyError: a field without which nothing can be said about the model.
      ValueError: unknown architecture, or a field whose value this port does not implement.
    """
    architecture = (hf.get("architectures") or [hf.get("model_type", "missing")])[0]
    name = next((key for key, value in FAMILIES.items() if value.model_type == architecture), None)
    name = name or named_family(architecture)
    if architecture in WRAPPERS:
        tie = {key: hf[key] for key in ("tie_word_embeddings", "quantization_config") if key in hf}
        hf = tie | hf["text_config"]
    family, refused = FAMILIES[name], {}
    if hf.get("quantization_config"):
        refused["quantization_config"] = hf["quantization_config"]
    full = _normalised(hf, family)
    fields = {ours: getattr(full, theirs, None) for ours, theirs in family.names.items()}
    if fields["activation"] not in ACTIVATIONS:
        refused[family.names["activation"]] = fields["activation"]
    for field, allowed in family.only.items():
        if getattr(full, field) not in allowed:
            refused[field] = getattr(full, field)
    fields["num_kv_heads"] = fields.get("num_kv_heads") or fields["num_heads"]
    fields["head_dim"] = fields.get("head_dim") or fields["d_model"] // fields["num_heads"]
    fields["d_ff"] = fields["d_ff"] or 4 * fields["d_model"]
    fields |= _rope_fields(full, family, refused) | _window_fields(full, family, refused)
    if family.experts:
        fields |= _expert_fields(full, family)
    if refused:
        values = ", ".join(f"{field}={value!r}" for field, value in refused.items())
        raise ValueError(f"config fields not supported by this port: {values}")
    return LMConfig(family=name, **family.fixed, **fields)


def _normalised(hf: Mapping[str, Any], family: Family) -> Any:
    """The config as an object of transformers' class for this family, with that class's defaults."""
    # Imported here, because the import takes half a second and GGUF files do not need it.
    from transformers import AutoConfig

    for field in ("d_model", "num_layers"):
        hf[family.names[field]]
    ignored = ("architectures", "model_type", "auto_map", "quantization_config", "dtype", "torch_dtype")
    given = {key: value for key, value in hf.items() if key not in ignored} | _TOKEN_IDS
    try:
        # A copy, because the classes change the mapping that they are given.
        return AutoConfig.for_model(family.model_type, **copy.deepcopy(given))
    except Exception as error:  # the classes raise whatever their validators do
        raise ValueError(f"transformers does not accept this {family.model_type} config: {error}") from error


def _rope_fields(full: Any, family: Family, refused: dict[str, Any]) -> dict[str, Any]:
    if not family.rope:
        return {}
    rope, fields = full.rope_parameters, {}
    if "local_rope_theta" in family.rope:
        rope, local = rope["full_attention"], rope["sliding_attention"]
        fields["local_rope_theta"] = float(local["rope_theta"])
        if local["rope_type"] != "default":
            refused["rope_parameters.sliding_attention.rope_type"] = local["rope_type"]
    fields["rope_theta"] = float(rope["rope_theta"])
    fraction = rope.get("partial_rotary_factor") or 1.0
    if "rotary_fraction" in family.rope:
        fields["rotary_fraction"] = float(fraction)
    elif fraction != 1:
        refused["partial_rotary_factor"] = fraction
    kind = rope.get("rope_type", "default")
    if kind in _SCALINGS:
        values = {ours: rope[theirs] for ours, theirs in _SCALINGS[kind].items()}
        fields["rope_scaling"] = RopeScaling(kind, **values)
    elif kind != "default":
        refused["rope_type"] = kind
    return fields


def _window_fields(full: Any, family: Family, refused: dict[str, Any]) -> dict[str, Any]:
    window, blocks = getattr(full, "sliding_window", None), full.num_hidden_layers
    if family.windows == "none" or window is None:
        return {}
    kinds = ("sliding_attention",) * blocks if family.windows == "all" else tuple(full.layer_types)
    if set(kinds) - {"sliding_attention", "full_attention"}:
        refused["layer_types"] = kinds
    return {
        "sliding_window": window,
        "sliding_layers": tuple(kind == "sliding_attention" for kind in kinds),
    }


def _expert_fields(full: Any, family: Family) -> dict[str, Any]:
    experts = Experts(**{ours: getattr(full, theirs) for ours, theirs in family.experts.items()})
    step, dense = getattr(full, "decoder_sparse_step", 1), getattr(full, "mlp_only_layers", None) or ()
    layers = range(full.num_hidden_layers)
    return {
        "experts": experts,
        "expert_layers": tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers),
    }


def config_to_hf(config: LMConfig, dtype: str = "float32") -> dict[str, Any]:
    """The inverse of `config_from_hf`, in a form that older versions of transformers read too.

    Args:
      config: config of any family.
      dtype: dtype of the tensors that are stored beside it.
    """
    family = FAMILIES[config.family]
    hf = {"architectures": [family.architecture], "model_type": family.model_type, "dtype": dtype}
    hf |= {field: allowed[0] for field, allowed in family.only.items()} | _TOKEN_IDS
    hf |= {theirs: getattr(config, ours) for ours, theirs in (family.names | family.rope).items()}
    if "attention_scale_dim" in family.names:
        hf[family.names["attention_scale_dim"]] = config.attention_scale_dim or config.head_dim
    if (scaling := config.rope_scaling) is not None:
        values = {theirs: getattr(scaling, ours) for ours, theirs in _SCALINGS[scaling.kind].items()}
        hf["rope_scaling"] = {"rope_type": scaling.kind, **values}
    if family.windows != "none":
        hf["sliding_window"] = config.sliding_window
    if family.windows == "by layer":
        windows = [config.window(layer) for layer in range(config.num_layers)]
        hf["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in windows]
    if family.experts:
        hf |= {theirs: getattr(config.experts, ours) for ours, theirs in family.experts.items()}
    return hf | {field: value(config) for field, value in family.written.items()}


def config_from_gguf(
    header: Mapping[str, Any],
    tensor_names: frozenset[str],
    rope_factors: Float[np.ndarray, "F"] | None = None,
) -> LMConfig:
    """The config that a GGUF header describes.

    Args:
      header: key -> value, as in `GGUFFile.header`.
      tensor_names: names of the file's tensors, which show whether the LM head is tied.
      rope_factors: the tensor `rope_freqs.weight` if there is one; it divides the rotary frequencies.

    Raises:
      KeyError: a field without which nothing can be said about the model.
      ValueError: unknown architecture, or a setting this port does not implement.
    """
    arch = header["general.architecture"]
    if arch not in GGUF_FAMILIES:
        raise ValueError(f"unknown architecture {arch!r} in a GGUF file; known: {', '.join(GGUF_FAMILIES)}")

    def get(key: str, default: Any = None) -> Any:
        return header.get(f"{arch}.{key}", default)

    num_heads, d_model = header[f"{arch}.attention.head_count"], header[f"{arch}.embedding_length"]
    head_dim = get("attention.key_length", d_model // num_heads)
    refused = {
        "attention.value_length": get("attention.value_length", head_dim) != head_dim,
        "rope.dimension_count": get("rope.dimension_count", head_dim) != head_dim,
        "rope.scaling.type": get("rope.scaling.type", "none") not in ("none", "linear"),
        "rope.scale_linear": get("rope.scale_linear", 1.0) != 1.0,
        "expert_count": bool(get("expert_count", 0)),
        "attention.sliding_window": arch != "gemma3" and bool(get("attention.sliding_window")),
    }
    if bad := [f"{arch}.{key}={get(key)!r}" for key, is_bad in refused.items() if is_bad]:
        raise ValueError(f"{', '.join(bad)} is not supported in a GGUF file; use the Hugging Face directory")
    scaling = None
    if get("rope.scaling.type", "none") == "linear":
        scaling = RopeScaling("linear", get("rope.scaling.factor", 1.0))
    fields = {
        "num_layers": header[f"{arch}.block_count"],
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": scaling,
    }
    if arch == "gemma3":
        fields |= _gemma3_fields(header, fields["num_layers"], d_model // num_heads, head_dim)
    config = LMConfig(
        family=arch,
        vocab_size=len(header["tokenizer.ggml.tokens"]),
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        d_ff=header[f"{arch}.feed_forward_length"],
        norm_eps=header[f"{arch}.attention.layer_norm_rms_epsilon"],
        tie_embeddings="output.weight" not in tensor_names,
        max_positions=get("context_length", 2048),
        **FAMILIES[arch].fixed | fields,
    )
    if rope_factors is None:
        return config
    return dataclasses.replace(config, rope_scaling=_llama3_scaling(config, rope_factors))


def _gemma3_fields(
    header: Mapping[str, Any], num_layers: int, width_by_head: int, head_dim: int
) -> dict[str, Any]:
    """Config fields of Gemma 3: those that llama.cpp knows without the header, and those from the header's own keys."""
    pattern = header.get("gemma3.attention.sliding_window_pattern", 6)
    if isinstance(pattern, int):
        pattern = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    return {
        "activation": "gelu_pytorch_tanh",
        "rope_theta": header["gemma3.rope.freq_base"],
        "local_rope_theta": header.get("gemma3.rope.freq_base_swa", 10000.0),
        "sliding_window": header["gemma3.attention.sliding_window"],
        "sliding_layers": tuple(map(bool, pattern)),
        # The 27B model alone scales by another number than head_dim; it is the one with 62 blocks.
        "attention_scale_dim": width_by_head if num_layers == 62 else head_dim,
        "logit_softcap": header.get("gemma3.final_logit_softcapping"),
    }


def _llama3_scaling(config: LMConfig, factors_F: Float[np.ndarray, "F"]) -> RopeScaling:
    """The scaling that has a GGUF file's frequency factors; the header itself does not hold the scaling's settings."""
    scaling = RopeScaling("llama3", float(factors_F.max()))
    frequency_F = frequencies(config, 0)
    if factors_F.shape != frequency_F.shape or not np.allclose(
        frequency_F / scaled(frequency_F, scaling), factors_F, rtol=1e-3
    ):
        raise ValueError(
            f"the factors in rope_freqs.weight (up to {factors_F.max()}) are not those of {scaling}; "
            "use the Hugging Face directory of this model"
        )
    return scaling
