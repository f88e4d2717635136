"""Adapters in PEFT's file format: read onto our parameters and written from them.

What is read computes what PEFT computes from the same files. A field of the config or a tensor that would change the
computation in a way that is not implemented here is an error that names it, also if it is of a later PEFT.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from nla_jax.files import Place, local_folder
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.families import FAMILIES, tensor_rows
from nla_jax.lm.files.safetensors_files import read_json, read_tensors, save_tensors
from nla_jax.lm.files.sources import hub_name, listing
from nla_jax.lm.lora import LoraConfig, Target
from nla_jax.lm.transformer import Params, parameter_shapes, unstack_blocks

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_INTERPRETED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform"),
    *("target_modules", "exclude_modules", "base_model_name_or_path", "revision"),
}
_WITHOUT_EFFECT = {
    # These say how the file came about, or are options of other fields, which are refused themselves.
    *("peft_version", "auto_mapping", "task_type", "inference_mode", "runtime_config", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying"),
    # These concern training alone, or the orientation of kernels, which PEFT takes from the model in any case.
    *("lora_dropout", "eva_config", "corda_config", "lora_ga_config", "merge_weights", "fan_in_fan_out"),
}
_NEUTRAL = {
    "bias": ("none",),
    # The other ways to start, such as pissa, change the weights of the base.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "layers_pattern": ("layers", ["layers"], "h", ["h"]),
}
"""Fields with their values, beside None, False and empty ones, that leave the computation as it is."""
_MERGE = "merge the adapter into its base with PEFT's merge_and_unload and load the whole model"


def export_peft(
    adapters: Params,
    config: LMConfig,
    lora: LoraConfig,
    base: str,
    directory: Place,
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
            tensors[f"base_model.model.{name}.{side}.weight"] = value.T
        modules.add(name.rsplit(".", 1)[-1])
    on_hub = None if Path(base).exists() else hub_name(base)
    revision = on_hub.revision if on_hub else None
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.removesuffix(f"@{revision}") if revision else base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": True,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with local_folder(directory) as folder:
        save_tensors(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def load_peft(directory: str | os.PathLike[str], config: LMConfig) -> tuple[Params, LoraConfig]:
    """Read LoRA adapters that PEFT or `export_peft` wrote: their parameters, and the config that gives their scale.

    Ranks and scales that differ between maps are folded into the parameters: factors of a lower rank are filled up with
    zeros, and B carries the quotient of a map's own scale and the common one. Where some blocks have no adapter of a
    map that others adapt, theirs is zero, so that the blocks can be stacked.

    Args:
      directory: directory with adapter_config.json and adapter_model.safetensors.
      config: config of the LM that is adapted.

    Raises:
      FileNotFoundError: the directory holds no adapter, or one in pickled files alone.
      ValueError: an adapter of another kind, with a part that is not implemented here, or of another model; numbers
        that are not finite; or a file that cannot be read.
    """
    directory = Path(directory)
    settings = _settings(directory)
    factors = _factors(directory, config, settings)
    rank = max(factor.rank for factor in factors.values())
    inner = {name.rsplit("/", 1)[-1] for name in factors}
    adapters, shapes = {}, parameter_shapes(config)
    for path in (path.removesuffix("/kernel") for path in shapes if path.endswith("/kernel")):
        if path.rsplit("/", 1)[-1] not in inner or len(shapes[f"{path}/kernel"]) != 2:
            continue
        inputs, outputs = shapes[f"{path}/kernel"]
        a_IR, b_RO = np.zeros((inputs, rank), np.float32), np.zeros((rank, outputs), np.float32)
        if path in factors:
            factor = factors[path]
            a_IR[:, : factor.rank] = factor.a_RI.T
            b_RO[: factor.rank] = factor.b_OR.T * np.float32(factor.scale / settings.scale)
        adapters |= {f"{path}/lora_a": jnp.asarray(a_IR), f"{path}/lora_b": jnp.asarray(b_RO)}
    lora = LoraConfig(rank, settings.alpha_for(rank), tuple(sorted(inner)))
    return unflatten_dict(adapters, sep="/"), lora


def peft_base(directory: str | os.PathLike[str]) -> str:
    """Name or path of the model that an adapter in PEFT's format was made for, as `resolve` takes it.

    Raises:
      FileNotFoundError: the directory holds no adapter, or its base is a path that is not on this machine.
      ValueError: the adapter's config is not one, or names no base.
    """
    directory = Path(directory)
    description = _description(directory)
    base, revision = description.get("base_model_name_or_path"), description.get("revision")
    remedy = (
        "give the model that it adapts as target=... (nla_jax.load), --target, or base=... (load_verbalizer)"
    )
    if not base:
        raise ValueError(f"{directory / ADAPTER_CONFIG} names no base_model_name_or_path; {remedy}")
    if Path(base).exists():
        return base
    if Path(base).is_absolute():
        raise FileNotFoundError(
            f"{directory / ADAPTER_CONFIG} names the base {base!r}, which is not on this machine; {remedy}"
        )
    on_hub = hub_name(base)
    return f"{base}@{revision}" if on_hub and revision and not on_hub.revision else base


def base_in_words(directory: str | os.PathLike[str]) -> str:
    """The name of an adapter's base for a message, or words that say that there is none."""
    base = _description(Path(directory)).get("base_model_name_or_path")
    return base or f"which {ADAPTER_CONFIG} does not name"


def _description(directory: Path) -> dict[str, Any]:
    if not (directory / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"no {ADAPTER_CONFIG} in {directory}; expected an adapter in PEFT's format")
    return read_json(directory / ADAPTER_CONFIG)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Ranks, scales and blocks of adapters, as their config gives them."""

    rank: int
    alpha: float
    stabilized: bool
    """Whether scales are alpha / √rank; otherwise they are alpha / rank."""
    ranks: Mapping[str, int]
    """Pattern of module names -> their own rank; the first that matches counts."""
    alphas: Mapping[str, float]
    layers: tuple[int, ...] | None
    """The blocks that are adapted, or None if the config does not say."""
    expected: tuple[str, ...]
    """Ends of the names of modules that have adapters in every one of these blocks."""

    @property
    def scale(self) -> float:
        """The factor of the products whose map has no rank or alpha of its own."""
        return self._scale(self.alpha, self.rank)

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scale of the adapter of one module."""
        rank, alpha = _matching(self.ranks, module, self.rank), _matching(self.alphas, module, self.alpha)
        return rank, self._scale(alpha, rank)

    def alpha_for(self, rank: int) -> float:
        """The alpha with which a rank-stabilized scale of this rank is `scale`."""
        # In this order of operations, a rank-stabilized alpha of the config's own rank comes back without rounding.
        own = self.alpha if self.stabilized else self.alpha / self.rank**0.5
        return own * (rank / self.rank) ** 0.5

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (rank**0.5 if self.stabilized else rank)


@dataclasses.dataclass(frozen=True)
class _Factor:
    """The adapter of one map as it is stored."""

    rank: int
    scale: float
    a_RI: Float[np.ndarray, "R I"]
    b_OR: Float[np.ndarray, "O R"]


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as PEFT matches them."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, default)


def _settings(directory: Path) -> _Settings:
    """Read an adapter's config and refuse what is not implemented."""
    path, fields = directory / ADAPTER_CONFIG, _description(directory)
    if fields.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} describes an adapter of type {fields.get('peft_type')!r}; only LORA is read"
        )
    refused = [
        f"{name}={value!r}"
        for name, value in fields.items()
        if name not in _INTERPRETED | _WITHOUT_EFFECT
        and value not in (None, False, "", [], {})
        and value not in _NEUTRAL.get(name, ())
    ]
    if refused:
        raise ValueError(f"{path} has fields that are not read here: {listing(refused)}; {_MERGE}")
    layers, targets = fields.get("layers_to_transform"), fields.get("target_modules")
    return _Settings(
        rank=_positive(path, "r", fields.get("r"), int),
        alpha=_positive(path, "lora_alpha", fields.get("lora_alpha"), float),
        stabilized=bool(fields.get("use_rslora")),
        ranks=_patterns(path, "rank_pattern", fields.get("rank_pattern"), int),
        alphas=_patterns(path, "alpha_pattern", fields.get("alpha_pattern"), float),
        layers=None if layers in (None, []) else tuple([layers] if isinstance(layers, int) else layers),
        # Where target_modules is a pattern, or exclude_modules narrows it, the tensors alone say what is adapted.
        expected=tuple(targets) if isinstance(targets, list) and not fields.get("exclude_modules") else (),
    )


def _positive(path: Path, name: str, value: Any, kind: type) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value <= 0 or value != kind(value):
        expected = "a whole number" if kind is int else "a number"
        raise ValueError(f"{path}: {name}={value!r}, expected {expected} above 0; download the adapter again")
    return kind(value)


def _patterns(path: Path, name: str, value: Any, kind: type) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise ValueError(f"{path}: {name}={value!r}, expected an object; download the adapter again")
    for pattern in value or {}:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{path}: {name}[{pattern!r}] is no regular expression ({error}); correct it"
            ) from error
    return {key: _positive(path, f"{name}[{key!r}]", number, kind) for key, number in (value or {}).items()}


def _factors(directory: Path, config: LMConfig, settings: _Settings) -> dict[str, _Factor]:
    """Path of a map among our parameters -> its adapter, for every map that has one; each is checked."""
    file, base = directory / ADAPTER_FILE, base_in_words(directory)
    stored, shapes, paths, factors = _stored(directory), parameter_shapes(config), _adaptable(config), {}
    for spelling, sides in stored.items():
        name = _in_table(spelling, config)
        if re.search(FAMILIES[config.family].skipped, name):
            continue
        if name not in paths:
            whole = {row.hf.removesuffix(".weight") for row in tensor_rows(config)}
            problem = (
                f"{name}, which is not one linear map in a block; {_MERGE}"
                if name in whole
                else f"{name}, which the model does not have; load its own model, {base}"
            )
            raise ValueError(f"{directory} adapts {problem}")
        if paths[name] in factors:
            raise ValueError(f"{file} holds two adapters of {name}; download it again")
        if sides.keys() != {"lora_A", "lora_B"}:
            raise ValueError(f"{file} lacks lora_A or lora_B of {name}; download it again")
        rank, scale = settings.of(spelling)
        inputs, outputs = shapes[f"{paths[name]}/kernel"]
        for side, expected, axis in (("lora_A", (rank, inputs), 0), ("lora_B", (outputs, rank), 1)):
            key, shape = f"{spelling}.{side}.weight", sides[side].shape
            if len(shape) == 2 and shape[1 - axis] == expected[1 - axis] and shape != expected:
                raise ValueError(
                    f"{directory}: {key} has rank {shape[axis]}, but the config says {rank} (in r or rank_pattern); "
                    "do the two files belong together?"
                )
            if shape != expected:
                raise ValueError(
                    f"{directory}: {key} is {shape}, expected {expected} for this model; load its own model, {base}"
                )
        factors[paths[name]] = _Factor(rank, scale, sides["lora_A"], sides["lora_B"])
    _check_coverage(directory, settings, paths, factors)
    return factors


def _stored(directory: Path) -> dict[str, dict[str, Float[np.ndarray, "..."]]]:
    """Module name, as it is spelled in the file -> "lora_A" or "lora_B" -> tensor."""
    file = directory / ADAPTER_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"no {ADAPTER_FILE} in {directory}; pickled files such as adapter_model.bin are not read, since they can "
            "run code: load the adapter with PEFT and write it with save_pretrained"
        )
    modules, foreign = {}, []
    for key, value in read_tensors(file).items():
        # PEFT leaves the adapter's name out of the key; other programs keep it.
        found = re.fullmatch(r"base_model\.model\.(.*)\.(lora_[AB])(?:\.default)?\.weight", key)
        if found is None:
            foreign.append(key)
            continue
        sides = modules.setdefault(found[1], {})
        if found[2] in sides:
            raise ValueError(f"{file} holds two adapters of {found[1]}; download it again")
        sides[found[2]] = value
    if foreign:
        raise ValueError(
            f"{file} holds {listing(foreign)}; expected base_model.model.*.lora_A.weight and .lora_B.weight alone, "
            f"since DoRA's magnitudes, adapters of embeddings, biases and whole modules are not read; {_MERGE}"
        )
    if not modules:
        raise ValueError(f"{file} holds no adapters; download it again")
    return modules


def _in_table(spelling: str, config: LMConfig) -> str:
    """The name of a module in the family's table, from a spelling of it in an adapter of any class of the model."""
    for pattern, replacement in FAMILIES[config.family].renames:
        spelling = re.sub(pattern, replacement, spelling)
    # Classes with more around the language model, and those without an LM head, have their blocks elsewhere.
    return re.sub(r"^(model\.)*(language_model\.)?(model\.)*(?=layers\.)", "model.", spelling)


def _adaptable(config: LMConfig) -> dict[str, str]:
    """Module name in the family's table -> path among our parameters, for every map that can have an adapter."""
    return {
        row.hf.removesuffix(".weight"): row.paths[0].removesuffix("/kernel")
        for row in tensor_rows(config)
        if len(row.paths) == 1 and re.search(rf"/({'|'.join(get_args(Target))})/kernel$", row.paths[0])
    }


def _check_coverage(
    directory: Path, settings: _Settings, paths: Mapping[str, str], adapted: Iterable[str]
) -> None:
    """Refuse adapters of other blocks or of fewer maps than the config says, as in a file that lost some of them."""
    layers = sorted({int(re.search(r"\d+", path)[0]) for path in adapted})
    if settings.layers is not None and layers != sorted(settings.layers):
        raise ValueError(
            f"{directory / ADAPTER_CONFIG}: layers_to_transform={list(settings.layers)}, but {ADAPTER_FILE} adapts "
            f"blocks {layers}; do the two files belong together?"
        )
    ends = tuple(f".{end}" for end in settings.expected)
    missing = [
        name
        for name, path in paths.items()
        if f".{name}".endswith(ends) and path not in adapted
        if settings.layers is None or int(re.search(r"\d+", path)[0]) in layers
    ]
    if missing:
        raise ValueError(
            f"{directory / ADAPTER_FILE} lacks adapters of {listing(missing)}, which target_modules names in "
            f"{ADAPTER_CONFIG}; download the adapter again"
        )


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
