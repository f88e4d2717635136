"""Weights, read tensor by tensor from safetensors or GGUF, and written for `transformers`.

Tensors are named by the tables in `lm/files/families.py`, which serve both directions. Loading is strict: a missing,
unused or misshapen tensor is an error.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float
from tqdm import tqdm

from nla_jax.files import Place, as_path, local_folder
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.configs import config_from_gguf, config_from_hf, config_to_hf
from nla_jax.lm.files.families import FAMILIES, tensor_rows
from nla_jax.lm.files.gguf import GGUFFile, open_gguf, undo_rope_permutation
from nla_jax.lm.files.safetensors_files import (
    READABLE,
    SafetensorsFiles,
    open_safetensors,
    read_json,
    save_tensors,
)
from nla_jax.lm.files.sources import listing, resolve
from nla_jax.lm.files.tensor_rows import Index, Part, TensorRow
from nla_jax.lm.files.tokenizer import tokenizer_from_directory, tokenizer_from_gguf
from nla_jax.lm.language_model import LanguageModel
from nla_jax.lm.transformer import parameter_shapes
from nla_jax.sharding.mesh import parameter_spec

StorageDtype = Literal["float32", "bfloat16"]
"""Dtype that parameters are stored in; the config's dtypes are those of computation."""
QUIET_BELOW = 2**30
"""Smaller models, in bytes, load without a progress bar: nobody would have the time to read it."""
ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of a GGUF file that belongs to the config, not to the weights."""


def load_params(
    source: SafetensorsFiles | GGUFFile,
    config: LMConfig,
    *,
    mesh: Mesh | None = None,
    dtype: StorageDtype = "float32",
    whole: LMConfig | None = None,
) -> dict[str, Any]:
    """Read the parameters of `config` from open files, each part straight to the device that holds it.

    Beyond what the devices of this process hold, at most two tensors are in host memory. A process reads only the rows
    and columns that its devices hold, except of fused heads and of queries and keys in GGUF files.

    Args:
      source: files from `open_safetensors` or `open_gguf`.
      config: config of the parameters; with `has_lm_head=False`, the file's final norm and LM head stay unread.
      mesh: mesh to place parameters on, by the rules in `nla_jax/sharding/mesh.py`; None takes the default device.
      dtype: dtype of the parameters; stored numbers are cast to it on the way.
      whole: config of the whole model in the files, where `config` describes only its first blocks.

    Returns:
      Nested dict of arrays.

    Raises:
      ValueError: missing or unused tensors, wrong shapes or types, or an LM head that contradicts
        `tie_embeddings`.
    """
    # The check that the files hold one model and nothing else needs the config of the whole model.
    stored = _stored_names(source, whole or config)
    _check(source, whole or config, stored)
    shapes = parameter_shapes(config)
    # A thread does not see the `jax.default_device` of the one that started it.
    device = jax.config.jax_default_device

    def load(row: TensorRow) -> dict[str, jax.Array]:
        def read(name: str, index: Index) -> np.ndarray:
            if source.format == "hf":
                return source.read(stored[name], index).astype(dtype, copy=False)
            return _read_gguf(source, stored[name], index, row.paths[0], config).astype(dtype, copy=False)

        with jax.default_device(device):
            return {
                path: _placed(part, path, shapes[path], mesh) for path, part in row.parameters(read, config)
            }

    size = sum(math.prod(shape) for shape in shapes.values()) * jnp.dtype(dtype).itemsize
    quiet = size < QUIET_BELOW or jax.process_index() > 0
    flat = {}
    with (
        tqdm(total=size, desc=source.path.name, unit="B", unit_scale=True, disable=quiet) as progress,
        # One thread reads while the other transposes.
        ThreadPoolExecutor(max_workers=2) as pool,
    ):
        for loaded in pool.map(load, tensor_rows(config)):
            flat |= loaded
            progress.update(sum(value.nbytes for value in loaded.values()))
    return unflatten_dict(flat, sep="/")


def _placed(part: Part, path: str, shape: tuple[int, ...], mesh: Mesh | None) -> jax.Array:
    """One parameter on its devices; a part that several devices hold is read once."""
    if mesh is None:
        return jax.device_put(part(tuple(slice(0, size) for size in shape))).block_until_ready()
    sharding = NamedSharding(mesh, parameter_spec(path, shape, mesh))
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    pieces = []
    for bounds, devices in holders.items():
        value = part(tuple(slice(*bound) for bound in bounds))
        pieces += [jax.device_put(value, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces).block_until_ready()


def _stored_names(source: SafetensorsFiles | GGUFFile, config: LMConfig) -> dict[str, str]:
    """A tensor's name in the family's table -> its name in the file."""
    if source.format == "gguf":
        rows = {row.gguf: row.hf for row in tensor_rows(_whole(config))}
        return {rows.get(name, name): name for name in source.shapes}
    names = {}
    for name in source.shapes:
        table_name = name
        for pattern, replacement in FAMILIES[config.family].renames:
            table_name = re.sub(pattern, replacement, table_name)
        names[table_name] = name
    return names


def _whole(config: LMConfig) -> LMConfig:
    """The config with final norm and untied LM head, as a file may hold them."""
    return dataclasses.replace(config, has_lm_head=True, tie_embeddings=False)


def _read_gguf(
    source: GGUFFile, name: str, index: Index, path: str, config: LMConfig
) -> Float[np.ndarray, "..."]:
    """A part of a GGUF file's tensor, converted to the conventions of Hugging Face files."""
    part, leaf = path.split("/")[-2:]
    heads = {"query": config.num_heads, "key": config.num_kv_heads}.get(part)
    if heads and FAMILIES[config.family].permuted_in_gguf:
        return undo_rope_permutation(source.read(name), heads)[index]
    # Converters to GGUF add the offset to the norms' scales.
    value = source.read(name, index)
    return value - np.float32(config.norm_offset) if leaf == "scale" else value


def _check(source: SafetensorsFiles | GGUFFile, config: LMConfig, stored: dict[str, str]) -> None:
    """Raise one ValueError that names every tensor that does not fit the config."""
    expected = {name: shape for row in tensor_rows(config) for name, shape in row.file_shapes(config).items()}
    whole = _whole(config)
    known = {name for row in tensor_rows(whole) for name in row.names(whole)}
    skipped = re.compile(f"{FAMILIES[config.family].skipped}|^{re.escape(ROPE_FACTORS)}$")
    in_file, unreadable = source.shapes, source.unreadable
    shapes = {name: in_file[file_name] for name, file_name in stored.items()}
    wrong_type = [
        f"{stored[name]} {unreadable[stored[name]]}" for name in expected if stored.get(name) in unreadable
    ]
    if wrong_type:
        raise ValueError(
            f"{source.path} holds tensors that are not {', '.join(READABLE)}: {listing(wrong_type)}; "
            "take the model as it was before quantization"
        )
    problems = {
        "missing": [name for name in expected if name not in shapes],
        "unused": [stored[name] for name in shapes if name not in known and not skipped.search(name)],
        "wrong shape": [
            f"{stored[name]} {shapes[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    # Some checkpoints repeat a tied head; one that differs would otherwise be dropped silently.
    names = {row.paths[0]: row.hf for row in tensor_rows(whole)}
    embedding, head = names["embed/embedding"], names["lm_head/kernel"]
    if (
        config.tie_embeddings
        and config.has_lm_head
        and shapes.keys() >= {embedding, head}
        and not _same(source, stored[embedding], stored[head])
    ):
        problems["LM head differs from the embedding though tie_word_embeddings is true"] = [stored[head]]
    if lines := [f"{problem}: {listing(names)}" for problem, names in problems.items() if names]:
        raise ValueError(
            f"the tensors in {source.path} do not fit a {config.family} model of {config.num_layers} blocks, "
            f"d_model {config.d_model}: {'; '.join(lines)}. Do config and weights belong together?"
        )


def _same(source: SafetensorsFiles | GGUFFile, left: str, right: str) -> bool:
    """Whether two tensors are equal, compared part by part, without reading either whole."""
    shapes, step = source.shapes, 4096
    if shapes[left] != shapes[right]:
        return False
    parts = [(slice(start, start + step),) for start in range(0, shapes[left][0], step)]
    return all(np.array_equal(source.read(left, part), source.read(right, part)) for part in parts)


def load_language_model(
    spec: Place,
    *,
    mesh: Mesh | None = None,
    dtype: StorageDtype = "float32",
    last_layer: int | None = None,
    weights: bool = True,
) -> LanguageModel:
    """Load config, weights and tokenizer of a model; the host never holds the whole model.

    Args:
      spec: a directory, a file, a package or a hub id, as for `resolve`.
      mesh: as in `load_params`.
      dtype: as in `load_params`; bfloat16 for a model that would not fit in float32.
      last_layer: read blocks 0 to this one alone, without final norm and LM head; None reads everything.
      weights: False reads config and tokenizer alone, and leaves `params` empty.

    Raises:
      FileNotFoundError: as `resolve`; or the directory lacks config.json or weights.
      ValueError: unsupported architecture, unreadable file, or weights that do not fit the config.
    """
    path = resolve(spec)
    name = str(path.absolute()) if path == as_path(spec) else str(spec)
    if path.is_dir():
        if not (config_file := path / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {path}; expected a Hugging Face model directory")
        config = _with_known_fields(config_file, config_from_hf, read_json(config_file))
        source, tokenizer = open_safetensors(path), tokenizer_from_directory(path)
    else:
        source = open_gguf(path)
        names = frozenset(source.tensors)
        factors = source.read(ROPE_FACTORS) if ROPE_FACTORS in names else None
        config = _with_known_fields(path, config_from_gguf, source.header, names, factors)
        tokenizer = tokenizer_from_gguf(source.header)
    whole, config = config, config if last_layer is None else config.truncated(last_layer)
    params = load_params(source, config, mesh=mesh, dtype=dtype, whole=whole) if weights else {}
    return LanguageModel(config, params, tokenizer, name)


def export_hf(
    params: Mapping[str, Any],
    config: LMConfig,
    directory: Place,
    *,
    dtype: StorageDtype = "float32",
) -> None:
    """Write `model.safetensors` and `config.json` that `transformers` loads.

    A truncated backbone (`has_lm_head` False) gets a final norm that scales by one, which readers expect in the file.
    The tokenizer is not written; `tokenizer.save_pretrained` does that.

    Args:
      params: nested dict of arrays, as from `load_params`.
      config: the config that the parameters belong to.
      directory: created if need be.
      dtype: dtype of the written tensors; bfloat16 loses nothing of a model that was stored in bfloat16.

    Raises:
      ValueError: parameters that are missing, unused or misshapen for the config.
    """
    flat, shapes = flatten_dict(params, sep="/"), parameter_shapes(config)
    wrong = sorted(shapes.keys() ^ flat.keys()) + [
        f"{path} {flat[path].shape}"
        for path, shape in shapes.items()
        if path in flat and flat[path].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"the parameters do not fit the config (missing, unused or misshapen): {listing(wrong)}; "
            "export a model with the config it was built with"
        )
    rows = list(tensor_rows(config))
    if not config.has_lm_head:
        rows += [row for row in tensor_rows(_whole(config)) if row.paths[0].startswith("final_norm/")]
        flat |= {
            "final_norm/scale": np.full(config.d_model, 1 - config.norm_offset),
            "final_norm/bias": np.zeros(config.d_model),
        }
    tensors = {
        name: value.astype(jnp.dtype(dtype)) for row in rows for name, value in row.tensors(flat, config)
    }
    with local_folder(directory) as folder:
        save_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config_to_hf(config, dtype), indent=2) + "\n")


def _with_known_fields(path: Path, read: Callable[..., LMConfig], *args: Any) -> LMConfig:
    try:
        return read(*args)
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {error}, which the model's config needs") from error
