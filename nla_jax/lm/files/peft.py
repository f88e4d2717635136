"""Adapters in PEFT's file format: read onto our parameters and written from them."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.families import tensor_rows
from nla_jax.lm.files.safetensors_files import read_tensors
from nla_jax.lm.lora import LoraConfig
from nla_jax.lm.transformer import Params, parameter_shapes, unstack_blocks

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def export_peft(
    adapters: Params,
    config: LMConfig,
    lora: LoraConfig,
    base: str,
    directory: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write the adapters of an LM in PEFT's format: adapter_model.safetensors and adapter_config.json.

    Args:
      adapters: the `lm` of the trained parameters, stacked or not.
      config: config of the LM.
      lora: config of the adapters.
      base: name or path of the LM that they adapt.
      directory: created if need be.
      dtype: dtype of the written tensors.

    Raises:
      ValueError: the family fuses adapted maps in one tensor, for which PEFT has no such adapter.
    """
    flat = flatten_dict(unstack_blocks(adapters), sep="/")
    tensors, modules = {}, set()
    for name, path in _modules(config, flat).items():
        for side, leaf in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
            value = np.asarray(flat[f"{path}/{leaf}"]).astype(dtype)
            tensors[f"base_model.model.{name}.{side}.weight"] = np.ascontiguousarray(value.T)
        modules.add(name.rsplit(".", 1)[-1])
    (directory := Path(directory)).mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": True,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def load_peft(directory: str | os.PathLike[str], config: LMConfig) -> tuple[Params, LoraConfig]:
    """Read adapters that `export_peft` wrote, or PEFT with a rank-stabilized scale: their parameters and config.

    Raises:
      FileNotFoundError: the directory holds no adapter.
      ValueError: an adapter of another kind, or of another model; or a file that cannot be read.
    """
    directory = Path(directory)
    description = _peft_description(directory)
    if description.get("peft_type") != "LORA" or not description.get("use_rslora"):
        raise ValueError(
            f"{directory} holds an adapter of type {description.get('peft_type')} with "
            f"use_rslora={description.get('use_rslora')}; only LORA with use_rslora=true is read"
        )
    tensors, adapters, targets = read_tensors(directory / ADAPTER_FILE), {}, set()
    rank, shapes = description["r"], parameter_shapes(config)
    names = {row.hf.removesuffix(".weight"): row.paths[0] for row in tensor_rows(config)}
    base = description["base_model_name_or_path"]
    for key, value in tensors.items():
        name, side = re.fullmatch(r"base_model\.model\.(.*)\.(lora_[AB])\.weight", key).groups()
        if name not in names:
            raise ValueError(
                f"{directory} adapts {name}, which the model does not have; load its own model, {base}"
            )
        path = names[name].removesuffix("/kernel")
        inputs, outputs = shapes[names[name]]
        expected = (rank, inputs) if side == "lora_A" else (outputs, rank)
        if value.shape != expected:
            raise ValueError(
                f"{directory}: {key} is {value.shape}, expected {expected} for this model; load its own model, {base}"
            )
        adapters[f"{path}/{side.lower()}"] = jnp.asarray(value.T)
        targets.add(path.rsplit("/", 1)[-1])
    lora = LoraConfig(rank, float(description["lora_alpha"]), tuple(sorted(targets)))
    return unflatten_dict(adapters, sep="/"), lora


def peft_base(directory: str | os.PathLike[str]) -> str:
    """Name or path of the model that an adapter in PEFT's format was made for.

    Raises:
      FileNotFoundError: the directory holds no adapter.
    """
    return _peft_description(Path(directory))["base_model_name_or_path"]


def _peft_description(directory: Path) -> dict[str, Any]:
    if not (directory / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"no {ADAPTER_CONFIG} in {directory}; expected an adapter in PEFT's format")
    return json.loads((directory / ADAPTER_CONFIG).read_text())


def _modules(config: LMConfig, flat: Mapping[str, Any]) -> dict[str, str]:
    """Module name in Hugging Face's model -> its path among our parameters, for every map that has an adapter."""
    modules, wanted = {}, {path.rsplit("/", 1)[0] for path in flat}
    for row in tensor_rows(config):
        ours = [path.removesuffix("/kernel") for path in row.paths]
        adapted = wanted.intersection(ours) if row.hf.endswith(".weight") else set()
        if adapted and (len(ours) > 1 or not row.transpose):
            raise ValueError(
                f"{row.hf} holds {', '.join(ours)} in one tensor of another shape, for which PEFT has no such adapter; "
                "merge the adapters and export the whole model"
            )
        if adapted:
            modules[row.hf.removesuffix(".weight")] = ours[0]
    return modules
