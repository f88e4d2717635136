"""Configs of target LMs, read without their weights."""

import json
from pathlib import Path

from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.configs import config_from_gguf, config_from_hf
from nla_jax.lm.files.gguf import open_gguf
from nla_jax.lm.files.sources import resolve
from nla_jax.lm.files.weights import ROPE_FACTORS

_FOLDER = Path(__file__).parent / "models"


def read_architecture(path: str) -> LMConfig:
    """The config of a model.

    Args:
      path: a Hugging Face directory or a config.json alone, a .gguf file, package:NAME, or a hub id whose last part
        names a file in planning/models, which holds configs of models that are too large to download for a plan.

    Raises:
      FileNotFoundError: the path is none of these.
    """
    shipped = _FOLDER / f"{path.rsplit('/', 1)[-1]}.json"
    files = [file for file in (Path(path), Path(path) / "config.json", shipped) if file.suffix == ".json"]
    if (config_file := next((file for file in files if file.is_file()), None)) is not None:
        return config_from_hf(json.loads(config_file.read_text(encoding="utf-8")))
    if path.startswith("package:") or path.endswith(".gguf"):
        source = open_gguf(resolve(path))
        names = frozenset(source.tensors)
        factors = source.read(ROPE_FACTORS) if ROPE_FACTORS in names else None
        return config_from_gguf(source.header, names, factors)
    known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.json")))
    raise FileNotFoundError(
        f"no config.json for model.path={path!r}; give a directory or a config.json, or one of {known}"
    )
