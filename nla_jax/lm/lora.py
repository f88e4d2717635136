"""Low-rank adapters (Hu et al. 2021): W + s A B, where W is frozen and A and B are trained.

Adapters lie beside the kernels that they adapt, as `lora_a` and `lora_b` in the same tree, and `Linear` applies them if
they are there. What is trained and what is frozen are two trees of one shape, which `Base` puts together: nothing is
copied, and two models can share a base. The scale is the rank-stabilized one (Kalajdzievski 2023), alpha / √rank.
Shape letters: I in, O out, R rank; stacked blocks lead with an axis of blocks.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from nla_jax.lm.config import LMConfig
from nla_jax.lm.families import table
from nla_jax.lm.safetensors_files import read_tensors
from nla_jax.lm.transformer import Params, parameter_shapes, unstack_blocks

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
Target = Literal["query", "key", "value", "out", "gate", "up", "down"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Whether adapters are trained in place of all parameters, and which."""

    rank: int = 0
    """0 trains all parameters."""
    alpha: float = 16.0
    targets: tuple[Target, ...] = ("query", "key", "value", "out", "gate", "up", "down")
    """The linear maps of every block that get one."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights. bfloat16 halves them; products round to `model.dtype` in any case."""

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank**0.5


@flax.struct.dataclass
class Base:
    """The frozen LM that adapters belong to.

    Attributes:
      lm: its parameters.
      scale: of the adapters.
    """

    lm: Params
    scale: float = flax.struct.field(pytree_node=False)

    def attach(self, trained: Params) -> Params:
        """A model's parameters for a forward, from what is trained of it: its adapters in `lm`, all else as it is."""
        adapters = flatten_dict(trained["lm"])
        scaled = {path: x * self.scale if path[-1] == "lora_b" else x for path, x in adapters.items()}
        return {**trained, "lm": unflatten_dict({**flatten_dict(self.lm), **scaled})}


def attach(base: Base | None, trained: Params) -> Params:
    """`base.attach(trained)`; without a base, what is trained is the whole model."""
    return trained if base is None else base.attach(trained)


def init_adapters(config: LoraConfig, params: Params, key: jax.Array) -> Params:
    """What is trained of a model under LoRA: `params` with adapters in place of its `lm`.

    A is uniform in ±√(1 / I), as in PEFT; B is zero, so that the model starts as its base.

    Args:
      config: with a rank.
      params: of an AV or AR; those of its LM may be stacked, and shapes will do.
      key: random key.

    Raises:
      ValueError: the model has none of the targets, or its experts are among them.
    """
    pattern = re.compile(rf"({'|'.join(config.targets)})/kernel$")
    shapes = {path: x.shape for path, x in flatten_dict(params["lm"], sep="/").items()}
    targets = {path: shape for path, shape in shapes.items() if pattern.search(path)}
    if routed := [path for path in shapes if re.search(rf"mlp/({'|'.join(config.targets)})$", path)]:
        raise ValueError(
            f"{routed[0]} is a stack of experts, which adapters are not made for; leave gate, up and down out of "
            f"lora.targets={config.targets}"
        )
    if not targets:
        raise ValueError(
            f"lora.targets={config.targets} names nothing in the model; it has {sorted(shapes)[:5]}..."
        )
    adapters = {}
    for index, (path, (*blocks, inputs, outputs)) in enumerate(sorted(targets.items())):
        module, limit = path.removesuffix("kernel"), inputs**-0.5
        shape = (*blocks, inputs, config.rank)
        adapters[f"{module}lora_a"] = jax.random.uniform(
            jax.random.fold_in(key, index), shape, minval=-limit, maxval=limit
        )
        adapters[f"{module}lora_b"] = jnp.zeros((*blocks, config.rank, outputs))
    return {**params, "lm": unflatten_dict(adapters, sep="/")}


def merge(params: Params) -> Params:
    """Fold attached adapters into the kernels, in float32; a model without any stays as it is."""
    flat = flatten_dict(params)
    merged = {path: x for path, x in flat.items() if path[-1] not in ("lora_a", "lora_b")}
    for path, a in flat.items():
        if path[-1] == "lora_a":
            b, kernel = flat[*path[:-1], "lora_b"], (*path[:-1], "kernel")
            product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            merged[kernel] = merged[kernel].astype(jnp.float32) + product
    return unflatten_dict(merged)


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
      adapters: the `lm` of what is trained, stacked or not.
      config: of the LM.
      lora: what they were made with.
      base: name or path of the LM that they adapt.
      directory: created if need be.
      dtype: of the tensors.

    Raises:
      ValueError: a family that fuses adapted maps in one tensor, which has no adapter of its own there.
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
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base},
        **{"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": True, "target_modules": sorted(modules)},
        **{"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True},
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def load_peft(directory: str | os.PathLike[str], config: LMConfig) -> tuple[Params, LoraConfig]:
    """Read what `export_peft` wrote, or PEFT did with a rank-stabilized scale.

    Raises:
      FileNotFoundError: no adapter there.
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
    names = {row.hf.removesuffix(".weight"): row.paths[0] for row in table(config)}
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
    """Name or path of the model that an adapter in PEFT's format was made for; errors as of `load_peft`."""
    return _peft_description(Path(directory))["base_model_name_or_path"]


def _peft_description(directory: Path) -> dict[str, Any]:
    if not (directory / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"no {ADAPTER_CONFIG} in {directory}; expected an adapter in PEFT's format")
    return json.loads((directory / ADAPTER_CONFIG).read_text())


def _modules(config: LMConfig, flat: Mapping[str, Any]) -> dict[str, str]:
    """Module names in Hugging Face's model, and ours, of all that has an adapter."""
    modules, wanted = {}, {path.rsplit("/", 1)[0] for path in flat}
    for row in table(config):
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
