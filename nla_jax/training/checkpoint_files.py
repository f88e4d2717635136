"""Checkpoints on disk: which of them are whole, what they hold, and reading them with their fingerprints checked.

A folder named by a bare number is a whole checkpoint; a killed save leaves one named `<step>.<anything>`. In a bucket,
where nothing can be renamed, a checkpoint has its number from the start, and is whole once it holds `COMMITTED`.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from nla_jax.files import AnyPath, absolute, in_bucket
from nla_jax.sharding.placement import block_on_simulated_devices

Tree = Any

COMMITTED = "commit_success.txt"
"""The object that Orbax writes last into a checkpoint in a bucket."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which others are intact."""


def context() -> ocp.Context:
    """The Orbax settings of all checkpoints: no compression, and only the requested leaves are read."""
    settings = ocp.Context()
    settings.array.saving.use_compression = False
    # `Checkpoints.restore` makes sure that it requests every leaf.
    settings.pytree.loading.partial_load = True
    return settings


def load(path: AnyPath, info: dict[str, Any], abstract: dict[str, Tree]) -> dict[str, Tree]:
    """Read the leaves that `abstract` asks for, tree by tree, and compare their fingerprints with the saved ones.

    Raises:
      CheckpointError: the files are damaged.
    """
    with context(), readable(path):
        trees = ocp.load_checkpointables(path, abstract)
    saved = info["custom_metadata"].get("fingerprints", {})
    with readable(path):
        for name in trees.keys() & saved.keys():
            for leaf, number in fingerprints(trees[name]).items():
                if number != saved[name][leaf]:
                    raise ValueError(f"the numbers of {name}/{leaf} are not those that were saved")
    return trees


def fingerprints(tree: Tree) -> dict[str, int]:
    """For each leaf, a number that changes with any of its bits and is the same on every mesh."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    numbers = jax.device_get([block_on_simulated_devices(_fingerprint(leaf)) for leaf in leaves])
    return {joined(path): int(number) for path, number in zip(paths, numbers, strict=True)}


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    """Sum over all numbers of a hash of their bits and place, modulo 2^32."""
    mixed = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    for axis, prime in zip(range(x.ndim), (2654435761, 2246822519, 3266489917, 668265263), strict=False):
        mixed += jnp.uint32(prime) * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # The finalizer of MurmurHash3, without which flipped signs would cancel.
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def saved_shapes(path: AnyPath, name: str) -> Tree:
    """Shapes and dtypes of one saved tree."""
    with readable(path):
        if (shapes := ocp.metadata(path, name).metadata) is None:
            raise ValueError(f"the shapes of {name} are not readable")  # Orbax has told why on stderr.
        return shapes


@contextlib.contextmanager
def readable(path: AnyPath) -> Iterator[None]:
    """Turn any error while reading `path` into a `CheckpointError` that names the other steps."""
    try:
        yield
    except Exception as error:
        others = [str(step) for step in steps_of(path.parent) if str(step) != path.name]
        raise CheckpointError(
            f"could not read {path}; if its files are damaged, delete it to resume from another step "
            f"(there are: {', '.join(others) or 'none'}). Cause: {error.__cause__ or error}"
        ) from error


def info_of(path: AnyPath) -> dict[str, Any] | None:
    """The notes of Orbax and of `Checkpoints.save` on a checkpoint; None if `path` is not a whole checkpoint."""
    # Orbax's own function first reads the shapes of all trees, which takes a second.
    if in_bucket(path) and not (path / COMMITTED).exists():
        return None
    try:
        info = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    except (OSError, ValueError):
        return None
    return info if "digest" in (info.get("custom_metadata") or {}) else None


def names_of(info: dict[str, Any]) -> str:
    """The names of the trees in a checkpoint."""
    return ", ".join(sorted(info["item_handlers"]))


def steps_of(directory: AnyPath) -> list[int]:
    """Numbers of the whole checkpoints of a directory, ascending."""
    names = [path.name for path in directory.glob("*") if path.name.isdecimal()]
    return sorted(int(name) for name in names if info_of(directory / name))


def find(directory: AnyPath, step: int | None) -> AnyPath:
    """Path of a step's checkpoint; None means the latest step.

    Raises:
      FileNotFoundError: there is no such step.
    """
    steps = steps_of(directory)
    if not steps or step not in (None, *steps):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(
            f"no complete {wanted} in {directory}; steps there: {', '.join(map(str, steps)) or 'none'}"
        )
    return directory / str(steps[-1] if step is None else step)


def joined(path: tuple[Any, ...]) -> str:
    """A key path of a tree as text, with slashes between keys."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclasses.dataclass(frozen=True)
class Description:
    """The contents of a checkpoint, without its numbers."""

    path: AnyPath
    step: int
    pinned: bool
    digest: str
    extra: dict[str, Any]
    trees: dict[str, dict[str, jax.ShapeDtypeStruct]]
    """Name of a tree -> path of a leaf -> the leaf's shape and dtype."""

    def bytes_of(self, tree: str, part: str = "") -> int:
        """Bytes of a tree, or of its leaves whose path begins with `part`."""
        leaves = self.trees[tree].items()
        return sum(x.size * x.dtype.itemsize for path, x in leaves if path.startswith(part))


def describe(directory: AnyPath) -> list[Description]:
    """The checkpoints below a directory of a run or a stage, oldest first in each stage; or the one at `directory`.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    directory = absolute(directory)
    # Of a stage, of all stages and of a run.
    depths = ("*", "*/*", "*/*/*")
    paths = (
        [directory]
        if info_of(directory)
        else [path.parent for depth in depths for path in directory.glob(f"{depth}/_CHECKPOINT_METADATA")]
    )
    paths = [path for path in paths if path.name.isdecimal() and info_of(path)]
    if not paths:
        raise FileNotFoundError(
            f"no complete checkpoint in {directory}; give a run directory or one inside it"
        )
    descriptions = []
    for path in sorted(paths, key=lambda path: (path.parent, int(path.name))):
        info, marker = info_of(path), path.parent / "pinned"
        trees = {
            name: {
                joined(leaf): jax.ShapeDtypeStruct(x.shape, x.dtype)
                for leaf, x in jax.tree_util.tree_leaves_with_path(saved_shapes(path, name))
            }
            for name in sorted(info["item_handlers"])
        }
        pinned = marker.exists() and marker.read_text() == path.name
        custom = info["custom_metadata"]
        descriptions.append(
            Description(path, int(path.name), pinned, custom["digest"], custom["extra"], trees)
        )
    return descriptions


def verify(description: Description) -> None:
    """Read a whole checkpoint and compare its fingerprints with the saved ones.

    Raises:
      CheckpointError: the checkpoint is damaged.
    """
    device = SingleDeviceSharding(jax.local_devices()[0])
    for name in description.trees:
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            saved_shapes(description.path, name),
        )
        load(description.path, info_of(description.path), {name: like})
