"""Hints to the partitioner inside compiled functions, for the mesh that `jax.set_mesh` has set.

Without such a mesh every function here returns its argument unchanged, or 1.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from nla_jax.sharding.mesh import BATCH


def constrain_batch(x: jax.Array, *, looked_up: bool = False) -> jax.Array:
    """Tell the partitioner to leave rows on the devices that `shard_batch` put them on, with their features whole.

    Weights then move to the rows. Without this hint the partitioner may split the residual stream over features, as
    the embedding is split, and sum activations of the whole batch over devices in every product. Returns `x`
    unchanged where no mesh is set (`jax.set_mesh`), or its data and fsdp axes do not divide the rows.

    Args:
      x: an array with rows first and features last.
      looked_up: whether `x` comes straight from an embedding, and so is split over features.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    if looked_up and mesh.shape["data"] > 1 and mesh.shape["fsdp"] > 1:
        # Resharded in one step, the whole array would first be gathered on every device.
        x = jax.lax.with_sharding_constraint(x, P("data", None, "fsdp"))
    return jax.lax.with_sharding_constraint(x, BATCH)


def constrain_vocabulary(x: jax.Array) -> jax.Array:
    """Tell the partitioner to leave logits split over rows, and over the tensor axis as the head's kernel is.

    Without this hint the partitioner may gather the whole kernel, or all logits, on every device. Returns `x`
    unchanged where `constrain_batch` does; where the tensor axis does not divide the second dimension, only rows are
    split.

    Args:
      x: an array with rows first, and tokens of the vocabulary or bins of them second.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    if x.shape[1] % mesh.shape["tensor"]:
        return constrain_batch(x)
    return jax.lax.with_sharding_constraint(x, P(BATCH[0], "tensor"))


def batch_shards(rows: int) -> int:
    """Number of devices that the current mesh (`jax.set_mesh`) splits rows over; 1 where it does not divide `rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    return 1 if rows % ways else ways


def gather_head(kernel_DV: jax.Array, dtype: Any) -> jax.Array:
    """The LM head for rows that are split: cast to `dtype`, gathered along fsdp, and still split over tensor.

    Returns the kernel unchanged, not even cast, where no mesh is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel_DV
    split = kernel_DV.shape[1] % mesh.shape["tensor"] == 0
    return jax.lax.with_sharding_constraint(kernel_DV.astype(dtype), P(None, "tensor" if split else None))


def tensor_shards() -> int:
    """Number of devices that the current mesh (`jax.set_mesh`) splits weights over within a layer."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.size == 1 else mesh.shape["tensor"]
