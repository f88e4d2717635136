"""AVs and ARs as Hugging Face directories with a `nla_meta.yaml`: read, checked and written.

An AV is a whole causal LM. An AR is its blocks 0..K, with a final norm in the file that is not applied, and
`value_head.safetensors` with one `weight`, out x in. In place of the LM's own files there may be an adapter in PEFT's
format; config, tokenizer and frozen weights are then those of the LM that it was trained on.
"""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
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
from nla_jax.data.sidecar import PromptIds, SidecarTemplates
from nla_jax.files import Place, local_folder
from nla_jax.interop.meta import FILE_NAME, NLAMeta, OwnSettings
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.configs import config_from_hf
from nla_jax.lm.files.peft import ADAPTER_CONFIG, base_in_words, export_peft, load_peft, peft_base
from nla_jax.lm.files.safetensors_files import open_safetensors, read_json, read_tensors, save_tensors
from nla_jax.lm.files.sources import resolve
from nla_jax.lm.files.tokenizer import tokenizer_from_directory
from nla_jax.lm.files.weights import StorageDtype, export_hf, load_language_model, load_params
from nla_jax.lm.language_model import LanguageModel
from nla_jax.lm.lora import FrozenBase, LoraConfig
from nla_jax.lm.transformer import EMBEDDING_LAYER, Params, parameter_shapes, stack_blocks
from nla_jax.sharding.mesh import tree_shardings

HEAD_FILE = "value_head.safetensors"
AFFINE_FILE = "injection_affine.safetensors"
"""A file that only this library writes: a learned injection map minus the identity, as `weight` (out x in), `bias`."""
CLOSING_TAG = "</explanation>"


class VerbalizerCheckpoint(NamedTuple):
    """An AV, ready to use: `verbalizer.sample(params, ...)`."""

    verbalizer: Verbalizer
    params: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    meta: NLAMeta


class AdapterOrigin(NamedTuple):
    """How a set of LoRA adapters was made: its config and its base model."""

    lora: LoraConfig
    base: str
    """Name or path of the LM that they adapt."""


class TrainingLimits(NamedTuple):
    """The lengths and positions that an AV and its AR were trained with; None where they are not known."""

    explanation_tokens: int | None = None
    reconstructor_tokens: int | None = None
    min_position: int | None = None


class ReconstructorCheckpoint(NamedTuple):
    """An AR, ready to use: `reconstructor(params, ...)`."""

    reconstructor: Reconstructor
    params: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    meta: NLAMeta


def load_verbalizer(
    spec: Place,
    *,
    base: LanguageModel | None = None,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    attention_dtype: str = "float32",
    params_dtype: StorageDtype = "float32",
) -> VerbalizerCheckpoint:
    """Load an AV of the reference, or one that `export_verbalizer` wrote, whole or as adapters.

    Args:
      spec: a directory or hub id.
      base: LM that adapters belong to, its blocks stacked or not; the AV then shares its weights. None loads the LM
        that the adapters name.
      mesh: mesh to place the parameters on, by the partition rules; the default device if None.
      dtype: see `LMConfig.dtype`.
      attention_dtype: see `LMConfig.attention_dtype`.
      params_dtype: dtype of the LM's stored parameters; an affine map and the AR's head stay float32.

    Raises:
      FileNotFoundError: there is no such model, or it has no `nla_meta.yaml` or config.json.
      ValueError: the model is an AR, its meta data are incomplete, its token ids are not the tokenizer's, or its
        weights do not fit.
    """
    path = resolve(spec)
    meta = NLAMeta.load(path, role="av")
    tokenizer, config, read = _language_model(path, meta, base, mesh, params_dtype)
    prompt = build_verbalizer_prompt(tokenizer, meta.templates)
    critic = meta.prompt_templates.critic
    suffix = None if critic is None else build_reconstructor_prompt(tokenizer, meta.templates).suffix
    meta.check_tokens(live_tokens(prompt, suffix), path)
    config = dataclasses.replace(config, dtype=dtype, attention_dtype=attention_dtype)
    params = {"lm": read(config)}
    injection = meta.injection
    if injection.affine:
        d = config.d_model
        tensors = read_tensors(path / AFFINE_FILE, {"weight": (d, d), "bias": (d,)})
        params |= _placed({"affine": {"kernel": tensors["weight"].T, "bias": tensors["bias"]}}, mesh)
    return VerbalizerCheckpoint(
        Verbalizer(config, prompt, injection, injection.scale), params, tokenizer, meta
    )


def load_reconstructor(
    spec: Place,
    *,
    base: LanguageModel | None = None,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    attention_dtype: str = "float32",
    params_dtype: StorageDtype = "float32",
) -> ReconstructorCheckpoint:
    """Load an AR of the reference, or one that `export_reconstructor` wrote; arguments as for `load_verbalizer`.

    Raises:
      FileNotFoundError: there is no such model, or it has no `nla_meta.yaml`, config.json or value head.
      ValueError: the model is an AV, its meta data are incomplete, it has another number of blocks than K+1, its token
        ids are not the tokenizer's, or its weights do not fit.
    """
    path = resolve(spec)
    meta = NLAMeta.load(path, role="ar")
    tokenizer, config, read = _language_model(path, meta, base, mesh, params_dtype)
    prompt = build_reconstructor_prompt(tokenizer, meta.templates)
    marker = tokenizer.encode(meta.tokens.injection_char, add_special_tokens=False)
    # The neighbours are the AV's to check: an AR has no use for a chat template.
    live = dataclasses.replace(meta.tokens, injection_token_id=marker[0], critic_suffix_ids=prompt.suffix)
    meta.check_tokens(live, path)
    config = dataclasses.replace(config, dtype=dtype, attention_dtype=attention_dtype).truncated(meta.layer)
    d = config.d_model
    head = read_tensors(path / HEAD_FILE, {"weight": (d, d)})["weight"].T
    params = {"lm": read(config), **_placed({"head": {"kernel": head}}, mesh)}
    return ReconstructorCheckpoint(Reconstructor(config, prompt), params, tokenizer, meta)


def _language_model(
    path: Path, meta: NLAMeta, base: LanguageModel | None, mesh: Mesh | None, params_dtype: StorageDtype
) -> tuple[PreTrainedTokenizerBase, LMConfig, Callable[[LMConfig], Params]]:
    """Tokenizer and config of the LM in a directory, and a function that reads its parameters, adapters attached.

    Raises:
      FileNotFoundError: neither config.json nor adapter_config.json there.
      ValueError: another width or number of blocks than the meta data say.
    """
    adapted = (path / ADAPTER_CONFIG).is_file()
    if adapted:
        base = base or load_language_model(peft_base(path), mesh=mesh, dtype=params_dtype)
        config, source, tokenizer = base.config, base.name, base.tokenizer
    elif (file := path / "config.json").is_file():
        config, source = config_from_hf(read_json(file)), "config.json"
        tokenizer = tokenizer_from_directory(path)
    else:
        raise FileNotFoundError(
            f"neither config.json nor {ADAPTER_CONFIG} in {path}; expected a Hugging Face model or a PEFT adapter"
        )
    if config.d_model != meta.d_model:
        remedy = (
            f"give the model that it adapts, {base_in_words(path)}"
            if adapted
            else "do the two files belong together?"
        )
        raise ValueError(
            f"{path}: {source} says d_model {config.d_model}, {FILE_NAME} says {meta.d_model}; {remedy}"
        )
    if meta.role == "ar" and not adapted and config.num_layers != meta.layer + 1:
        raise ValueError(
            f"{path}: config.json says {config.num_layers} blocks, {FILE_NAME} says layer {meta.layer}, which "
            f"needs {meta.layer + 1}; give the AR's own directory, not that of the model it was cut from"
        )

    def read(config: LMConfig) -> Params:
        if not adapted:
            return load_params(open_safetensors(path), config, mesh=mesh, dtype=params_dtype)
        adapters, lora = load_peft(path, config)
        kept = {parameter.split("/")[0] for parameter in parameter_shapes(config)}
        frozen = {name: part for name, part in base.params.items() if name in kept}
        if "blocks" in base.params:
            frozen["blocks"] = jax.tree.map(lambda x: x[: config.num_layers], base.params["blocks"])
            adapters = jax.jit(stack_blocks)(adapters)
        return FrozenBase(frozen, lora.scale).with_adapters({"lm": _placed(adapters, mesh)})["lm"]

    return tokenizer, config, read


def _placed(tree: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    return jax.device_put(tree, None if mesh is None else tree_shardings(tree, mesh))


def live_tokens(prompt: VerbalizerPrompt, suffix: tuple[int, ...] | None) -> PromptIds:
    """The token ids that a tokenizer gives the prompts, in the form in which data sets and models record them."""
    return PromptIds(prompt.marker_text, prompt.marker, prompt.prefix[-1], prompt.tail[0], suffix)


def export_verbalizer(
    verbalizer: Verbalizer,
    params: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    templates: PromptTemplates,
    directory: Place,
    *,
    layer: int,
    limits: TrainingLimits | None = None,
    adapted: AdapterOrigin | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> list[str]:
    """Write an AV that `load_verbalizer` gives back, and that the reference's client reads as far as it can.

    Where that client would inject wrongly, the shared injection scale is left empty, so that it refuses the model.

    Args:
      verbalizer: the AV, whose injection scale must be a number.
      params: the AV's parameters: all, or with `adapted` the trained ones.
      tokenizer: the tokenizer that made its prompt.
      templates: the templates that made its prompt.
      directory: created if need be.
      layer: block after which the explained residual stream is read.
      limits: lengths and positions that the models were trained with.
      adapted: how the adapters in `params` were made; they are written in PEFT's format, without config and tokenizer.
        None writes a whole model.
      dtype: dtype of the written tensors; the affine map stays float32.

    Returns:
      Reasons why the reference's client cannot use the model as it is; empty if it can.

    Raises:
      ValueError: PEFT cannot adapt a model of this family in this way.
    """
    injection, limits = verbalizer.injection, limits or TrainingLimits()
    wrong, doubtful = reference_obstacles(verbalizer, tokenizer, templates)
    if adapted is not None:
        doubtful.append(f"it holds adapters alone: export the whole, or merge them into {adapted.base}")
    scale, d_model = float(verbalizer.scale), verbalizer.config.d_model
    meta = NLAMeta(
        role="av",
        d_model=d_model,
        tokens=live_tokens(verbalizer.prompt, build_reconstructor_prompt(tokenizer, templates).suffix),
        prompt_templates=SidecarTemplates(actor=templates.verbalizer, critic=templates.reconstructor),
        injection_scale=None if wrong else scale,
        mse_scale=d_model**0.5,
        layer=layer,
        own=OwnSettings(
            forced_start=templates.forced_start,
            closing=templates.closing,
            chat=templates.chat,
            layer=injection.layer,
            mode=injection.mode,
            affine=injection.affine,
            scale=scale,
            max_explanation_tokens=limits.explanation_tokens,
            max_reconstructor_tokens=limits.reconstructor_tokens,
            min_position=limits.min_position,
            dtype=verbalizer.config.dtype,
        ),
    )
    with local_folder(directory) as folder:
        _export(params, verbalizer.config, tokenizer, folder, adapted, dtype)
        if adapted is None:
            # For `generate`: the exported config names no token that ends a text.
            ends = {"eos_token_id": verbalizer.prompt.end_token, "pad_token_id": tokenizer.pad_token_id}
            (folder / "generation_config.json").write_text(json.dumps(ends) + "\n")
        meta.save(folder)
    return wrong + doubtful


def reference_obstacles(
    verbalizer: Verbalizer, tokenizer: PreTrainedTokenizerBase, templates: PromptTemplates
) -> tuple[list[str], list[str]]:
    """Reasons why the reference's client would inject an activation wrongly, and reasons why it would only do worse."""
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
    directory: Place,
    *,
    tokens: PromptIds,
    adapted: AdapterOrigin | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write an AR that `load_reconstructor` gives back and, if it is whole, that the reference's AR class reads.

    Args:
      reconstructor: the AR.
      params: the AR's parameters, as in `export_verbalizer`.
      tokenizer: the tokenizer that made its prompt.
      templates: the templates that made its prompt.
      directory: created if need be.
      tokens: token ids of the AV that it belongs to, see `live_tokens`.
      adapted: as in `export_verbalizer`.
      dtype: dtype of the written tensors; the head stays float32.

    Raises:
      ValueError: as `export_verbalizer`.
    """
    config = reconstructor.config
    meta = NLAMeta(
        role="ar",
        d_model=config.d_model,
        tokens=dataclasses.replace(tokens, critic_suffix_ids=reconstructor.prompt.suffix),
        prompt_templates=SidecarTemplates(actor=templates.verbalizer, critic=templates.reconstructor),
        mse_scale=config.d_model**0.5,
        layer=config.num_layers - 1,
    )
    with local_folder(directory) as folder:
        _export(params, config, _without_unused_bos(tokenizer), folder, adapted, dtype)
        meta.save(folder)


def _export(
    params: dict[str, Any],
    config: LMConfig,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    adapted: AdapterOrigin | None,
    dtype: Literal["float32", "bfloat16"],
) -> None:
    """Write the LM of an AV or AR, or its adapters; and in float32 an AV's affine map or an AR's head."""
    if adapted is None:
        export_hf(params["lm"], config, directory, dtype=dtype)
        tokenizer.save_pretrained(directory)
    else:
        export_peft(params["lm"], config, adapted.lora, adapted.base, directory, dtype=dtype)
    for part, file in (("affine", AFFINE_FILE), ("head", HEAD_FILE)):
        if part in params:
            named = {"weight": np.asarray(params[part]["kernel"], np.float32).T}
            if "bias" in params[part]:
                named["bias"] = np.asarray(params[part]["bias"], np.float32)
            save_tensors(named, directory / file)


def _without_unused_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that names a BOS only if it writes one: the reference's AR class refuses others."""
    if tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    return tokenizer
