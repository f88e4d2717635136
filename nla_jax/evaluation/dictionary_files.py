"""Files of sparse dictionaries: this library's own, those of SAELens, and those of Gemma Scope.

- A safetensors file with W_enc (D, F), W_dec (F, D), and optionally b_enc (F,) and b_dec (D,). What it computes is in
  its metadata, as `save_dictionary` writes them; without them it is a ReLU after the subtraction of b_dec.
- A SAELens folder: `cfg.json` beside `sae_weights.safetensors`, of the architectures standard, gated, jumprelu and topk
  (https://github.com/jbloomAus/SAELens).
- A `params.npz` of Gemma Scope, which is JumpReLU (Lieberum et al. 2024, https://arxiv.org/abs/2408.05147).
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import safe_open

from nla_jax.evaluation.dictionaries import SparseDictionary
from nla_jax.files import AnyPath, Place, as_path, local_copy
from nla_jax.lm.files.safetensors_files import read_json, read_tensors, save_tensors

CONFIG_NAME, WEIGHTS_NAME, PARAMS_NAME = "cfg.json", "sae_weights.safetensors", "params.npz"
METADATA_KEY = "nla_jax_dictionary"
_OTHER_SITES = re.compile(r"gemma-scope-[^/]*-(att|mlp|transcoders)\b")

Arrays = dict[str, np.ndarray]


def read_dictionary(place: Place, *, layer: int, d_model: int) -> SparseDictionary:
    """Read a sparse dictionary in any of the formats of this module.

    Args:
      place: a file, or a folder of SAELens or Gemma Scope.
      layer: the block after which its activations must be read; not checked where the files do not tell.
      d_model: their width.

    Raises:
      FileNotFoundError: no such file or folder.
      ValueError: arrays that are missing, misshapen or not finite, a dictionary of another layer or site, or an option
        that this library does not compute.
    """
    path = as_path(place)
    if path.is_dir():
        inside = [name for name in (CONFIG_NAME, PARAMS_NAME) if (path / name).is_file()]
        if not inside:
            raise FileNotFoundError(
                f"the folder {path} holds neither {CONFIG_NAME} (SAELens) nor {PARAMS_NAME} (Gemma Scope); name the "
                "folder of one dictionary, or a safetensors file"
            )
        path = path / inside[0]
    elif not path.is_file():
        raise FileNotFoundError(
            f"the dictionary {path} does not exist; give a safetensors file, a folder of SAELens, a {PARAMS_NAME} of "
            "Gemma Scope, or none (evaluation.dictionary)"
        )
    if path.name in (CONFIG_NAME, WEIGHTS_NAME) and (path.parent / CONFIG_NAME).is_file():
        return _saelens(path.parent, layer, d_model)
    return (_gemma_scope if path.suffix == ".npz" else _plain)(path, layer, d_model)


def save_dictionary(
    dictionary: SparseDictionary, place: Place, *, layer: int, recipe: Mapping[str, Any]
) -> None:
    """Write a dictionary that is neither gated nor JumpReLU as safetensors, in one step.

    Args:
      dictionary: what is written.
      place: path of the file.
      layer: the block after which its activations were read.
      recipe: how it was trained; kept in the file's metadata.
    """
    about = {
        "k": dictionary.k,
        "is_centered": dictionary.is_centered,
        "normalization": dictionary.normalization,
        "layer": layer,
        "source": dictionary.source,
        "recipe": dict(recipe),
    }
    arrays = {
        "W_enc": dictionary.encode_DF,
        "b_enc": dictionary.encode_bias_F,
        "W_dec": dictionary.decode_FD,
        "b_dec": dictionary.decode_bias_D,
    }
    save_tensors(arrays, place, metadata={METADATA_KEY: json.dumps(about)})


def _plain(path: AnyPath, layer: int, d_model: int) -> SparseDictionary:
    """A safetensors file, with metadata or without."""
    with local_copy(path) as file:
        arrays = read_tensors(file)
        with safe_open(file, "numpy") as opened:
            about = json.loads((opened.metadata() or {}).get(METADATA_KEY, "{}"))
    dictionary = _linear(arrays, path, d_model)
    if about:
        _check_layer(about["layer"], layer, path)
        names = ("k", "is_centered", "normalization", "source")
        dictionary = dataclasses.replace(dictionary, **{name: about[name] for name in names})
    return dictionary


def _linear(arrays: Arrays, path: AnyPath, d_model: int) -> SparseDictionary:
    """The part that all formats share: both maps and their biases, where there are some."""
    _need(arrays, path, "W_enc", "W_dec")
    _check_shapes(arrays, path, d_model)
    encode_DF, decode_FD = arrays["W_enc"], arrays["W_dec"]
    return SparseDictionary(
        encode_DF=encode_DF,
        encode_bias_F=arrays.get("b_enc", np.zeros(encode_DF.shape[-1], np.float32)),
        decode_FD=decode_FD,
        decode_bias_D=arrays.get("b_dec", np.zeros(decode_FD.shape[-1], np.float32)),
        source=path.name,
    )


def _gemma_scope(path: AnyPath, layer: int, d_model: int) -> SparseDictionary:
    """JumpReLU without a subtraction of b_dec; the folder's name tells the layer."""
    if site := _OTHER_SITES.search(str(path)):
        raise ValueError(
            f"{path} is of another site than the residual stream ({site[1]}); take it from a release whose name ends "
            "in -res"
        )
    if named := re.findall(r"layer_(\d+)", str(path)):
        _check_layer(int(named[-1]), layer, path)
    with local_copy(path) as file, np.load(file, allow_pickle=False) as opened:
        arrays = {name: opened[name].astype(np.float32) for name in opened.files}
    _need(arrays, path, "W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise ValueError(f"{path}: {', '.join(broken)} holds NaN or infinity; download the file again")
    linear = _linear(arrays, path, d_model)
    source = "/".join(path.parts[-4:-1]) or path.name
    return dataclasses.replace(
        linear, threshold_F=arrays["threshold"], is_centered=False, source=f"Gemma Scope, {source}"
    )


def _saelens(folder: AnyPath, layer: int, d_model: int) -> SparseDictionary:
    """A dictionary of SAELens, of its versions 3 to 6, which put the hook into other places of the config."""
    with local_copy(folder / CONFIG_NAME) as file:
        config = read_json(file)
    about = {**config, **(config.get("meta") or {}), **(config.get("metadata") or {})}
    _check_hook(about, layer, folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} lacks {WEIGHTS_NAME} beside its {CONFIG_NAME}; download both")
    with local_copy(weights) as file:
        arrays = read_tensors(file)
    architecture = config.get("architecture", "standard")
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{folder} has the architecture {architecture!r}; those that can be read are {', '.join(_ARCHITECTURES)}"
        )
    if activation not in ("relu", "topk"):
        raise ValueError(f"{folder} has the activation function {activation!r}; expected relu or topk")
    _need(arrays, folder, *_ARCHITECTURES[architecture])
    linear = _linear(arrays, folder, d_model)
    if config.get("finetuning_scaling_factor"):
        _need(arrays, folder, "finetuning_scaling_factor")
        scaled_FD = linear.decode_FD * arrays["finetuning_scaling_factor"][:, None]
        linear = dataclasses.replace(linear, decode_FD=scaled_FD)
    if config.get("rescale_acts_by_decoder_norm"):
        linear = _with_unit_directions(linear)
    return dataclasses.replace(
        linear,
        source=f"SAELens, {folder.name}",
        is_centered=bool(config.get("apply_b_dec_to_input", True)),
        normalization=_normalization(config, folder),
        **_activation(architecture, arrays, config, folder),
    )


_ARCHITECTURES = {
    "standard": ("b_enc", "b_dec"),
    "gated": ("b_gate", "b_mag", "r_mag", "b_dec"),
    "jumprelu": ("b_enc", "b_dec", "threshold"),
    "topk": ("b_enc", "b_dec"),
}
"""The architectures of SAELens that are read, each with the arrays that it has beside both maps."""


def _activation(
    architecture: str, arrays: Arrays, config: Mapping[str, Any], folder: AnyPath
) -> dict[str, Any]:
    """The fields of `SparseDictionary` that make a feature active."""
    if architecture == "gated":
        return {
            "encode_bias_F": arrays["b_gate"],
            "gain_F": np.exp(arrays["r_mag"]),
            "gain_bias_F": arrays["b_mag"],
        }
    if architecture == "jumprelu":
        return {"threshold_F": arrays["threshold"]}
    if architecture == "topk":
        k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
        if not (isinstance(k, int) and k > 0):
            raise ValueError(
                f"{folder / CONFIG_NAME} gives k as {k!r}; expected a positive number of features"
            )
        if k > (features := len(arrays["W_dec"])):
            raise ValueError(
                f"{folder} keeps k={k} of {features} features; expected at most as many as there are"
            )
        return {"k": k}
    return {}


def _with_unit_directions(linear: SparseDictionary) -> SparseDictionary:
    """The same dictionary with the norms of its directions in the strengths."""
    norm_F = np.linalg.norm(linear.decode_FD, axis=1)
    return dataclasses.replace(
        linear,
        encode_DF=linear.encode_DF * norm_F,
        encode_bias_F=linear.encode_bias_F * norm_F,
        decode_FD=linear.decode_FD / norm_F[:, None],
    )


def _normalization(config: Mapping[str, Any], folder: AnyPath) -> str:
    name = config.get("normalize_activations") or "none"
    if name not in ("none", "constant_norm_rescale", "layer_norm"):
        raise ValueError(
            f"{folder} normalizes activations by {name!r}, whose factor is not in its files; fold it into the weights "
            "(fold_activation_norm_scaling_factor in SAELens) and save the dictionary again. Read as they are: none, "
            "constant_norm_rescale, layer_norm"
        )
    return name


def _check_hook(about: Mapping[str, Any], layer: int, folder: AnyPath) -> None:
    hook = about.get("hook_name") or about.get("hook_point")
    if not hook:
        raise ValueError(
            f"{folder / CONFIG_NAME} names no hook (hook_name); add what the dictionary was trained on"
        )
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", hook)
    if not found:
        raise ValueError(
            f"{folder} was trained on {hook}; expected the residual stream, which is blocks.{layer}.hook_resid_post "
            "here"
        )
    # What enters a block is what left the one before it.
    _check_layer(int(found[1]) - (found[2] == "pre"), layer, folder)


def _check_layer(named: int, layer: int, path: AnyPath) -> None:
    if named != layer:
        raise ValueError(
            f"{path} is of the residual stream after block {named}, and the activations are of that after block "
            f"{layer}; take the dictionary of that layer"
        )


def _need(arrays: Arrays, path: AnyPath, *names: str) -> None:
    if missing := sorted(set(names) - set(arrays)):
        raise ValueError(f"{path} lacks {', '.join(missing)} (it holds {', '.join(sorted(arrays))})")


def _check_shapes(arrays: Arrays, path: AnyPath, D: int) -> None:
    """Refuse arrays that do not fit each other or the activations' width."""
    encode, decode = (arrays[name].shape for name in ("W_enc", "W_dec"))
    if encode != decode[::-1] or encode[0] != D:
        raise ValueError(
            f"{path}: W_enc has shape {encode} and W_dec {decode}; expected ({D}, F) and (F, {D})"
        )
    expected = dict.fromkeys(_OF_FEATURES, (encode[1],)) | {"b_dec": (D,)}
    for name, shape in expected.items():
        if name in arrays and arrays[name].shape != shape:
            raise ValueError(f"{path}: {name} has shape {arrays[name].shape}; expected {shape}")


_OF_FEATURES = ("b_enc", "threshold", "b_gate", "b_mag", "r_mag", "finetuning_scaling_factor")
"""Arrays with a number for each feature."""
