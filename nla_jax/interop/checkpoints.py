"""AVs and ARs as Hugging Face directories with a `nla_meta.yaml`: read, checked and written.

An AV is a whole causal LM. An AR is its blocks 0..K, with a final norm in the file that is not applied, and
`value_head.safetensors` with one `weight`, out x in.
"""

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from nla_jax.autoencoder.prompts import (
    INJECTION_SLOT,
    PromptTemplates,
    VerbalizerPrompt,
    build_reconstructor_prompt,
    build_verbalizer_prompt,
)
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import Verbalizer
from nla_jax.data.sidecar import SidecarTemplates, Tokens
from nla_jax.interop.meta import FILE_NAME, NLAMeta, OwnSettings
from nla_jax.lm.config import LMConfig
from nla_jax.lm.config_files import config_from_hf
from nla_jax.lm.safetensors_files import open_safetensors
from nla_jax.lm.sources import resolve
from nla_jax.lm.tokenizer import tokenizer_from_directory
from nla_jax.lm.transformer import EMBEDDING_LAYER
from nla_jax.lm.weights import export_hf, load_params
from nla_jax.mesh import parameter_spec

HEAD_FILE = "value_head.safetensors"
AFFINE_FILE = "injection_affine.safetensors"
"""Our own: what a learned injection map adds to the identity, as `weight` (out x in) and `bias`."""
CLOSING_TAG = "</explanation>"


class VerbalizerCheckpoint(NamedTuple):
    """An AV, ready to use: `verbalizer.sample(params, ...)`."""

    verbalizer: Verbalizer
    params: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    meta: NLAMeta


class ReconstructorCheckpoint(NamedTuple):
    """An AR, ready to use: `reconstructor(params, ...)`."""

    reconstructor: Reconstructor
    params: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    meta: NLAMeta


def load_verbalizer(
    spec: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    attention_dtype: str = "float32",
) -> VerbalizerCheckpoint:
    """Load an AV of the reference, or one that `export_verbalizer` wrote.

    Args:
      spec: a directory or hub id.
      mesh: where the parameters go, by the partition rules; the default device if None.
      dtype: see `LMConfig.dtype`.
      attention_dtype: see `LMConfig.attention_dtype`.

    Raises:
      FileNotFoundError: no such model, or no `nla_meta.yaml` or config.json in it.
      ValueError: an AR, incomplete meta data, token ids that are not the tokenizer's, or weights that do not fit.
    """
    path = resolve(spec)
    meta = NLAMeta.load(path, role="av")
    tokenizer = tokenizer_from_directory(path)
    prompt = build_verbalizer_prompt(tokenizer, meta.templates)
    critic = meta.prompt_templates.critic
    suffix = None if critic is None else build_reconstructor_prompt(tokenizer, meta.templates).suffix
    meta.check_tokens(live_tokens(prompt, suffix), path)
    config = _config(path, meta, dtype, attention_dtype)
    params = {"lm": load_params(open_safetensors(path), config, mesh=mesh)}
    injection = meta.injection
    if injection.affine:
        d = config.d_model
        tensors = _read_tensors(path / AFFINE_FILE, {"weight": (d, d), "bias": (d,)})
        pieces = {"kernel": tensors["weight"].T, "bias": tensors["bias"]}
        params["affine"] = {name: _place(f"affine/{name}", value, mesh) for name, value in pieces.items()}
    return VerbalizerCheckpoint(
        Verbalizer(config, prompt, injection, injection.scale), params, tokenizer, meta
    )


def load_reconstructor(
    spec: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    attention_dtype: str = "float32",
) -> ReconstructorCheckpoint:
    """Load an AR of the reference, or one that `export_reconstructor` wrote; arguments as for `load_verbalizer`.

    Raises:
      FileNotFoundError: no such model, or no `nla_meta.yaml`, config.json or value head in it.
      ValueError: an AV, incomplete meta data, another number of blocks than K+1, token ids that are not the
        tokenizer's, or weights that do not fit.
    """
    path = resolve(spec)
    meta = NLAMeta.load(path, role="ar")
    tokenizer = tokenizer_from_directory(path)
    prompt = build_reconstructor_prompt(tokenizer, meta.templates)
    marker = tokenizer.encode(meta.tokens.injection_char, add_special_tokens=False)
    # The neighbours are the AV's to check: an AR has no use for a chat template.
    live = dataclasses.replace(meta.tokens, injection_token_id=marker[0], critic_suffix_ids=prompt.suffix)
    meta.check_tokens(live, path)
    config = _config(path, meta, dtype, attention_dtype)
    if config.num_layers != meta.layer + 1:
        raise ValueError(
            f"{path}: config.json says {config.num_layers} blocks, {FILE_NAME} says layer {meta.layer}, which "
            f"needs {meta.layer + 1}; give the AR's own directory, not that of the model it was cut from"
        )
    config = config.truncated(meta.layer)
    d = config.d_model
    head = _read_tensors(path / HEAD_FILE, {"weight": (d, d)})["weight"].T
    params = {
        "lm": load_params(open_safetensors(path), config, mesh=mesh),
        "head": {"kernel": _place("head/kernel", head, mesh)},
    }
    return ReconstructorCheckpoint(Reconstructor(config, prompt), params, tokenizer, meta)


def _place(path: str, value: np.ndarray, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jnp.asarray(value)
    return jax.device_put(value, NamedSharding(mesh, parameter_spec(path, value.shape, mesh)))


def _config(path: Path, meta: NLAMeta, dtype: str, attention_dtype: str) -> LMConfig:
    if not (file := path / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {path}; expected a Hugging Face model directory")
    config = config_from_hf(json.loads(file.read_text()))
    if config.d_model != meta.d_model:
        raise ValueError(
            f"{path}: config.json says d_model {config.d_model}, {FILE_NAME} says {meta.d_model}; "
            "do the two files belong together?"
        )
    return dataclasses.replace(config, dtype=dtype, attention_dtype=attention_dtype)


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """All tensors of a file as float32.

    Raises:
      FileNotFoundError: no such file.
      ValueError: unreadable, or other names or shapes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; download or export the model again")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); download it again"
        ) from error
    if (found := {name: tensor.shape for name, tensor in tensors.items()}) != shapes:
        raise ValueError(f"{path} holds {found}, expected {shapes}; does it belong to this model?")
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def live_tokens(prompt: VerbalizerPrompt, suffix: tuple[int, ...] | None) -> Tokens:
    """What a tokenizer makes of the prompts, as data sets and models record it."""
    return Tokens(prompt.marker_text, prompt.marker, prompt.prefix[-1], prompt.tail[0], suffix)


def export_verbalizer(
    verbalizer: Verbalizer,
    params: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    templates: PromptTemplates,
    directory: str | os.PathLike[str],
    *,
    layer: int,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> list[str]:
    """Write an AV that `load_verbalizer` gives back, and that the reference's client reads as far as it can.

    Where that client would inject wrongly, the shared injection scale is left empty, so that it refuses the model.

    Args:
      verbalizer: with a number for a scale.
      params: of the AV.
      tokenizer: the one that made its prompt.
      templates: the ones that made its prompt.
      directory: created if need be.
      layer: the residual stream that is explained.
      dtype: of the tensors; the affine map stays float32.

    Returns:
      Why the reference's client cannot use the model as it is; empty if it can.
    """
    directory, injection = Path(directory), verbalizer.injection
    wrong, doubtful = reference_obstacles(verbalizer, tokenizer, templates)
    export_hf(params["lm"], verbalizer.config, directory, dtype=dtype)
    tokenizer.save_pretrained(directory)
    # For `generate`: the exported config names no token that ends a text.
    ends = {"eos_token_id": verbalizer.prompt.end_token, "pad_token_id": tokenizer.pad_token_id}
    (directory / "generation_config.json").write_text(json.dumps(ends) + "\n")
    export_extras(params, directory)
    scale, d_model = float(verbalizer.scale), verbalizer.config.d_model
    NLAMeta(
        "av",
        d_model,
        live_tokens(verbalizer.prompt, build_reconstructor_prompt(tokenizer, templates).suffix),
        SidecarTemplates(templates.verbalizer, templates.reconstructor),
        injection_scale=None if wrong else scale,
        mse_scale=d_model**0.5,
        layer=layer,
        own=OwnSettings(
            templates.forced_start,
            templates.closing,
            templates.chat,
            injection.layer,
            injection.mode,
            injection.affine,
            scale,
        ),
    ).save(directory)
    return wrong + doubtful


def reference_obstacles(
    verbalizer: Verbalizer, tokenizer: PreTrainedTokenizerBase, templates: PromptTemplates
) -> tuple[list[str], list[str]]:
    """Where the reference's client would read an activation wrongly, and where it would only do worse than we do."""
    injection, wrong, doubtful = verbalizer.injection, [], []
    if injection.layer != EMBEDDING_LAYER:
        wrong.append(f"the activation enters after block {injection.layer}, not at the embedding")
    if injection.mode != "replace":
        wrong.append(f"the activation is injected by mode {injection.mode!r}, not 'replace'")
    if injection.affine:
        wrong.append("the activation passes a learned affine map")
    if not templates.chat:
        wrong.append("the prompt is plain text, not a user turn in a chat template")
    elif not _is_reference_prompt(verbalizer.prompt, tokenizer, templates):
        doubtful.append("the chat template, rendered without options, gives another prompt")
    if templates.forced_start:
        doubtful.append(
            f"{templates.forced_start!r} was part of the prompt and never the AV's to write: append it there"
        )
    if CLOSING_TAG not in templates.closing:
        doubtful.append(f"answers close with {templates.closing!r}, not with {CLOSING_TAG!r}")
    return wrong, doubtful


def _is_reference_prompt(
    prompt: VerbalizerPrompt, tokenizer: PreTrainedTokenizerBase, templates: PromptTemplates
) -> bool:
    message = templates.verbalizer.replace(INJECTION_SLOT, prompt.marker_text)
    chat = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(text + templates.forced_start, add_special_tokens=False)
    return tuple(ids) == (*prompt.prefix, prompt.marker, *prompt.tail)


def export_reconstructor(
    reconstructor: Reconstructor,
    params: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    templates: PromptTemplates,
    directory: str | os.PathLike[str],
    *,
    tokens: Tokens,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write an AR that `load_reconstructor` gives back and that the reference's AR class reads.

    Args:
      reconstructor: what reads the prompts.
      params: of the AR.
      tokenizer: the one that made its prompt.
      templates: the ones that made its prompt.
      directory: created if need be.
      tokens: of the AV that it belongs to, see `live_tokens`.
      dtype: of the tensors; the head stays float32.
    """
    directory = Path(directory)
    config = reconstructor.config
    export_hf(params["lm"], config, directory, dtype=dtype)
    export_extras(params, directory)
    _without_unused_bos(tokenizer).save_pretrained(directory)
    NLAMeta(
        "ar",
        config.d_model,
        dataclasses.replace(tokens, critic_suffix_ids=reconstructor.prompt.suffix),
        SidecarTemplates(templates.verbalizer, templates.reconstructor),
        mse_scale=config.d_model**0.5,
        layer=config.num_layers - 1,
    ).save(directory)


def export_extras(params: dict[str, Any], directory: Path) -> None:
    """Write what an AV or AR has beside its LM, in float32: the affine map of one, the head of the other."""
    for part, file in (("affine", AFFINE_FILE), ("head", HEAD_FILE)):
        if part in params:
            named = {"weight": np.asarray(params[part]["kernel"], np.float32).T}
            if "bias" in params[part]:
                named["bias"] = np.asarray(params[part]["bias"], np.float32)
            save_file({name: np.ascontiguousarray(value) for name, value in named.items()}, directory / file)


def _without_unused_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that names a BOS only if it writes one: the reference's AR class refuses others."""
    if tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    return tokenizer
