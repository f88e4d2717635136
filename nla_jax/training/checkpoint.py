"""Checkpoints of a run: written atomically, restored exactly, onto any mesh, whole or in part.

Layout: one Orbax checkpoint per step in `<directory>/<step>`, with one item per named tree, and the file
`pinned` with the number of the step to keep. Orbax writes under another name and renames at the end; deleting
renames first. So a folder named by a bare number is a whole checkpoint, and a kill leaves `<step>.<anything>`. In a
bucket a checkpoint is written and deleted in its place: it is whole if it holds the object `COMMITTED`, which is
written last and deleted first.

Arrays are stored uncompressed: float32 training states shrink by 7% only, and compressing one takes longer
than writing it and needs a second copy of it in memory.
"""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from nla_jax.files import AnyPath, absolute, in_bucket, remove_folder, write_text
from nla_jax.lm.transformer import stack_blocks, unstack_blocks
from nla_jax.sharding.mesh import tree_shardings
from nla_jax.training.checkpoint_files import (
    COMMITTED,
    CheckpointError,
    Tree,
    context,
    find,
    fingerprints,
    info_of,
    joined,
    load,
    names_of,
    saved_shapes,
    steps_of,
)

MISMATCHES_SHOWN = 5


class Checkpoints:
    """The checkpoints of one run. In a run of several processes, all of them call every method.

    Args:
      directory: folder of the checkpoints, created by the first save.
      digest: identifies the part of the config that decides whether training may continue from a checkpoint; it is
        stored in each checkpoint and compared whenever one is opened.
      keep: number of newest steps that are kept, beside the pinned one.
      background: whether `save` returns once the arrays are copied, and writes while training goes on.

    Raises:
      ValueError: keep < 1, or a bucket of another store than Google's, which Orbax cannot write to.
    """

    def __init__(self, directory: AnyPath, *, digest: str, keep: int = 2, background: bool = False):
        if keep < 1:
            raise ValueError(f"keep={keep}; expected at least 1, or no checkpoint would survive its own save")
        if in_bucket(directory) and not str(directory).startswith("gs://"):
            raise ValueError(
                f"checkpoints cannot be written to {directory}, only to gs:// or a folder; give such a run directory"
            )
        self.directory = absolute(directory)
        self.digest = digest
        self.keep = keep
        self.background = background
        self._unfinished: Callable[[], None] | None = None

    def latest(self) -> int | None:
        """The newest complete step, or None; leftovers of a killed or failed save do not count.

        Raises:
          ValueError: that step was saved under another digest.
        """
        steps = steps_of(self.directory)
        if not steps:
            return None
        self._check_digest(self.directory / str(steps[-1]))
        return steps[-1]

    def pinned(self) -> int | None:
        """The newest step that was saved with `pin` or chosen by `pin`, or None."""
        marker = self.directory / "pinned"
        chosen = {int(marker.read_text())} if marker.exists() else set()
        # A process that dies after a save in the background has not written the marker, so steps tell it themselves.
        notes = {step: info_of(self.directory / str(step)) for step in steps_of(self.directory)}
        chosen |= {step for step, info in notes.items() if info and info["custom_metadata"].get("pin")}
        return max(chosen, default=None)

    def best(self) -> int | None:
        """The step that counts: the pinned one, or the newest where none is pinned; None if there is none.

        Raises:
          ValueError: none is pinned, and the newest step was saved under another digest.
        """
        pinned = self.pinned()
        return self.latest() if pinned is None else pinned

    def pin(self, step: int) -> None:
        """Keep `step` (the best so far, say) until another is pinned; the next save after that may delete it.

        Raises:
          FileNotFoundError: there is no such step.
        """
        find(self.directory, step)
        if jax.process_index() == 0:
            write_text(self.directory / "pinned", str(step))

    def save(
        self, step: int, trees: Mapping[str, Tree], extra: Mapping[str, Any], *, pin: bool = False
    ) -> None:
        """Write a checkpoint, then delete the steps that are no longer kept.

        A process killed at any moment leaves the previous checkpoints unchanged. After a write in the background, older
        steps are deleted by the next call of `save` or `wait`.

        Args:
          step: number of the step, greater than every saved one.
          trees: pytrees of jax arrays by name; each can be restored alone. They may be donated afterwards.
          extra: values that JSON can hold: iterator states, seeds, counters.
          pin: whether to keep this step from now on; see `pin`.

        Raises:
          ValueError: the step is not newer than the latest, the directory has another digest, or JSON cannot hold
            `extra`.
          CheckpointError: this write or the last one in the background failed, for instance because the disk is full;
            its leftovers are removed.
        """
        self.wait()
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(
                f"cannot save step {step}: {self.directory} already holds step {latest}; "
                f"use another directory, or delete the newer steps there"
            )
        try:
            json.dumps(dict(extra))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"extra must hold only what JSON can, but: {error}; turn arrays into lists, numbers or text"
            ) from error
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        metadata = {
            "digest": self.digest,
            "extra": dict(extra),
            "pin": pin,
            "fingerprints": {name: fingerprints(tree) for name, tree in trees.items()},
        }
        # Every complete checkpoint is older, so a folder of this number can only be a damaged one.
        path, options = self.directory / str(step), {"overwrite": True, "custom_metadata": metadata}

        def finish() -> None:
            with self._cleaned_up(step, latest):
                response.result()
            if pin:
                self.pin(step)
            self._prune()

        with self._cleaned_up(step, latest), context():
            response = ocp.save_checkpointables_async(path, dict(trees), **options)
        self._unfinished = finish
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written in the background, if any, is complete.

        Raises:
          CheckpointError: the write failed, as in `save`.
        """
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            unfinished()

    @contextlib.contextmanager
    def _cleaned_up(self, step: int, latest: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            disk = self.directory if isinstance(self.directory, Path) else None
            free = f" ({shutil.disk_usage(disk).free:,} bytes were free)" if disk else ""
            # Orbax's other writers go on for a moment after the first has failed.
            for _ in range(10):
                self._remove_leftovers()
                time.sleep(0.1)
            survivor = "there is no earlier checkpoint" if latest is None else f"step {latest} is intact"
            raise CheckpointError(
                f"could not write step {step} to {self.directory}{free}; {survivor}. "
                f"If the disk is full, free some space and resume, or lower keep={self.keep}. Cause: {error}"
            ) from error

    def restore(
        self, like: Mapping[str, Tree], step: int | None = None
    ) -> tuple[dict[str, Tree], dict[str, Any]]:
        """Read trees bit for bit into the given shardings, whatever mesh they were saved from.

        Blocks that were saved stacked can be restored unstacked, and the other way round.

        Args:
          like: name -> form of each tree to restore; leaves are jax.ShapeDtypeStruct with a sharding, or arrays
            (whose memory is then held twice).
          step: step to restore; None means the latest.

        Returns:
          The trees, and the `extra` of the save.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: the checkpoint has another digest or lacks a tree; leaves differ in path, shape or dtype; or a
            leaf has no sharding.
          CheckpointError: the files are damaged.
        """
        path = find(self.directory, step)
        self._check_digest(path)
        info = info_of(path)
        unknown = sorted(like.keys() - info["item_handlers"].keys())
        if unknown:
            raise ValueError(f"{path} holds no tree named {', '.join(unknown)}; it holds {names_of(info)}")
        wanted = {name: _abstract(tree, name) for name, tree in like.items()}
        saved = {name: saved_shapes(path, name) for name in like}
        change = _change_of_form(saved, wanted)
        abstract = _other_form(wanted, change) if change else wanted
        _check_fit(path, saved, abstract)
        # Orbax takes an empty request for a request of everything.
        trees = load(path, info, abstract) if abstract else {}
        if change:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
            trees = jax.jit(change, out_shardings=shardings, donate_argnums=0)(trees)
        return trees, info["custom_metadata"]["extra"]

    def _check_digest(self, path: AnyPath) -> None:
        digest = info_of(path)["custom_metadata"]["digest"]
        if digest != self.digest:
            raise ValueError(
                f"{path} was saved by a run whose config has digest {digest}, this run's has {self.digest}; "
                "use another run directory, or the original config"
            )

    def _prune(self) -> None:
        steps = steps_of(self.directory)
        kept = {*steps[-self.keep :], self.pinned()}
        for step in steps:
            if step not in kept and jax.process_index() == 0:
                path = self.directory / str(step)
                if isinstance(path, Path):
                    path.rename(f"{path}.deleted")
                else:
                    (path / COMMITTED).unlink()
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        # Only a save may do this: to a reader, the unfinished save of a live run looks the same.
        if jax.process_index() > 0:
            return
        for path in self.directory.glob("*"):
            uncommitted = in_bucket(path) and path.name.isdecimal() and not (path / COMMITTED).exists()
            if uncommitted or re.match(r"\d+\.", path.name):
                remove_folder(path)


def restore_params(directory: AnyPath, name: str, step: int | None = None, mesh: Mesh | None = None) -> Tree:
    """The parameters alone of a saved TrainState, for analysis; the optimizer's bytes are not read.

    Args:
      directory: folder of a stage's checkpoints, whatever its digest.
      name: name of the TrainState among the saved trees.
      step: step to read; None means the latest.
      mesh: mesh to place the parameters on by the partition rules; None takes the first local device.

    Returns:
      The parameters as nested dicts.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: there is no tree of that name, or it has no `params`.
      CheckpointError: the files are damaged.
    """
    path = find(absolute(directory), step)
    info = info_of(path)
    saved = saved_shapes(path, name) if name in info["item_handlers"] else {}
    if "params" not in saved:
        raise ValueError(f"{path} holds no training state named {name!r}; it holds {names_of(info)}")
    params = saved["params"]
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), params)
    else:
        shardings = tree_shardings(params, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        shardings,
    )
    return load(path, info, {name: {"params": abstract}})[name]["params"]


def _abstract(tree: Tree, name: str) -> Tree:
    def leaf(path, value):
        if value.sharding is None:
            raise ValueError(
                f"{name}/{joined(path)} has no sharding to be restored into; "
                "make it with jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
            )
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _change_of_form(saved: Tree, wanted: Tree) -> Callable[[Tree], Tree] | None:
    """The function that turns blocks from the saved form, stacked or not, into the wanted one; None if they agree."""

    def stacked(tree: Tree) -> bool:
        return any("/blocks/" in f"/{joined(path)}/" for path, _ in jax.tree_util.tree_leaves_with_path(tree))

    if stacked(saved) == stacked(wanted):
        return None
    return stack_blocks if stacked(wanted) else unstack_blocks


def _other_form(wanted: Tree, change: Callable[[Tree], Tree]) -> Tree:
    """Shapes and shardings of the tree that `change` turns into `wanted`."""
    shapes = jax.eval_shape(unstack_blocks if change is stack_blocks else stack_blocks, wanted)
    sharding = jax.tree.leaves(wanted)[0].sharding
    if isinstance(sharding, NamedSharding):
        shardings = tree_shardings(shapes, sharding.mesh)
    else:
        shardings = jax.tree.map(lambda _: sharding, shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _leaves(tree: Tree, name: str) -> Iterator[tuple[str, str]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield f"{name}/{joined(path)}", f"{tuple(leaf.shape)} {leaf.dtype}"


def _check_fit(path: AnyPath, saved: dict[str, Tree], wanted: dict[str, Tree]) -> None:
    mismatches = []
    for name, tree in wanted.items():
        asked, stored = dict(_leaves(tree, name)), dict(_leaves(saved[name], name))
        mismatches += [
            f"{leaf}: saved {stored.get(leaf, 'nothing')}, wanted {asked.get(leaf, 'nothing')}"
            for leaf in sorted(asked.keys() | stored.keys(), key=lambda leaf: ("/opt_state/" in leaf, leaf))
            if asked.get(leaf) != stored.get(leaf)
        ]
    if mismatches:
        more = len(mismatches) - MISMATCHES_SHOWN
        raise ValueError(
            f"{path} is of another model or optimizer. "
            + "; ".join(mismatches[:MISMATCHES_SHOWN])
            + (f"; and {more} more" if more > 0 else "")
            + ". Restore it with the config it was trained with"
        )
