"""Configs of target LMs, read without their weights."""

from pathlib import Path

from nla_jax.files import as_path, local_copy
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.configs import config_from_gguf, config_from_hf
from nla_jax.lm.files.gguf import open_gguf
from nla_jax.lm.files.safetensors_files import read_json
from nla_jax.lm.files.sources import hub_name, resolve
from nla_jax.lm.files.weights import ROPE_FACTORS

_FOLDER = Path(__file__).parent / "models"


def read_architecture(path: str) -> LMConfig:
    """The config of a model.

    Args:
      path: whatever `resolve` takes, or a config.json alone. Of a hub id whose repository names a file in
        planning/models that file is taken, and nothing is downloaded; of others config.json is, without weights.

    Raises:
      FileNotFoundError: the path is none of these.
    """
    on_hub = hub_name(path)
    shipped = _FOLDER / f"{(on_hub.repo if on_hub else path).rsplit('/', 1)[-1]}.json"
    place = as_path(path)
    if place.suffix == ".json" and place.is_file():
        with local_copy(place) as file:
            return config_from_hf(read_json(file))
    if shipped.is_file() and not place.exists():
        return config_from_hf(read_json(shipped))
    try:
        found = resolve(path, weights=False)
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.json")))
        raise FileNotFoundError(
            f"no config.json for model.path={path!r}: {error}. A plan also takes a config.json alone, or one of {known}"
        ) from error
    if found.is_dir():
        if not (file := found / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {path}; expected a Hugging Face model directory")
        return config_from_hf(read_json(file))
    source = open_gguf(found)
    names = frozenset(source.tensors)
    factors = source.read(ROPE_FACTORS) if ROPE_FACTORS in names else None
    return config_from_gguf(source.header, names, factors)
