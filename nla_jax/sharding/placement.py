"""Moving batches and parameters between the host and the devices of a mesh, in one process or in several."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from nla_jax.sharding.mesh import BATCH, tree_shardings


def process_row_indices(count: int, mesh: Mesh) -> np.ndarray:
    """Indices of the rows of a batch that lie on this process's devices, in order.

    Args:
      count: number of rows of the batch.
      mesh: the mesh whose data and fsdp axes split the rows.

    Raises:
      ValueError: the two axes do not divide the rows.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if count % ways:
        raise ValueError(
            f"a batch of {count} rows does not divide over data * fsdp = {ways} devices; use a multiple of {ways}"
        )
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((count,)).values()
    spans = sorted({rows.indices(count)[:2] for (rows,) in indices})
    return np.concatenate([np.arange(*span) for span in spans])


def place_process_rows(batch: Any, count: int, mesh: Mesh) -> Any:
    """Place host arrays that hold this process's rows, `process_row_indices(count, mesh)`, of a batch of `count`."""
    sharding = NamedSharding(mesh, BATCH)

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array, (count, *array.shape[1:]))

    return jax.tree.map(place, batch)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Place host arrays that hold all rows in every process; each process places the rows of its own devices."""

    def place(array: np.ndarray) -> jax.Array:
        return place_process_rows(array[process_row_indices(len(array), mesh)], len(array), mesh)

    return jax.tree.map(place, batch)


def process_rows(batch: Any) -> Any:
    """The rows of a placed batch that lie on this process's devices, on the host."""

    def part(array: jax.Array) -> np.ndarray:
        shards = {shard.index[0].indices(len(array))[0]: shard for shard in array.addressable_shards}
        return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])

    return jax.tree.map(part, batch)


def to_host(batch: Any) -> Any:
    """All rows of placed arrays, on the host of every process; every process has to call this."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(batch, tiled=True)
    return jax.tree.map(np.asarray, batch)


def place(tree: Any, mesh: Mesh) -> Any:
    """Move parameters or training states to where the partition rules want them; the arrays given are donated."""
    return jax.jit(lambda x: x, out_shardings=tree_shardings(tree, mesh), donate_argnums=0)(tree)


def block_on_simulated_devices(tree: Any) -> Any:
    """Wait for arrays if they are on simulated devices, and return them.

    Simulated devices share one pool of threads. Programs whose devices wait for each other must not overlap there:
    each may hold threads that the other needs.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.block_until_ready(tree)
    return tree


def wait_for_all(name: str) -> None:
    """Wait until every process of the run has called this, for instance because one writes what all will read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
