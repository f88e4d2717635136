"""Hints to the partitioner inside compiled functions, for the mesh that `jax.set_mesh` has set.

Without such a mesh every function here returns its argument unchanged, or 1.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from nla_jax.sharding.mesh import BATCH


def constrain_batch(x: jax.Array, *, looked_up: bool = False) -> jax.Array:
    """Tell the partitioner to leave rows on the devices that `shard_batch` put them on, features whole.

    Weights come to the rows then. Left to itself it may split the residual stream over features, as the embedding
    is, and sum activations of the whole batch over devices in every product. Does nothing where no mesh is set
    (`jax.set_mesh`), or its data and fsdp axes do not divide the rows.

    Args:
      x: rows first, features last.
      looked_up: whether it comes straight from an embedding, and so split over features.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    if looked_up and mesh.shape["data"] > 1 and mesh.shape["fsdp"] > 1:
        # In one go the partitioner would give every device everything first.
        x = jax.lax.with_sharding_constraint(x, P("data", None, "fsdp"))
    return jax.lax.with_sharding_constraint(x, BATCH)


def constrain_vocabulary(x: jax.Array) -> jax.Array:
    """Tell the partitioner to leave logits split over tensor, as the head's kernel is, and over rows.

    Left to itself it may bring the whole kernel to every device, or all logits. Does nothing where `constrain_batch`
    does nothing, or the tensor axis does not divide what is split.

    Args:
      x: rows first, tokens of the vocabulary or bins of them second.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    if x.shape[1] % mesh.shape["tensor"]:
        return constrain_batch(x)
    return jax.lax.with_sharding_constraint(x, P(BATCH[0], "tensor"))


def batch_shards(rows: int) -> int:
    """Devices that the mesh which is set (`jax.set_mesh`) splits rows over; 1 where they do not divide them."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    return 1 if rows % ways else ways


def gather_head(kernel_DV: jax.Array, dtype: Any) -> jax.Array:
    """The LM head as rows that are split want it: cast to `dtype` and then made whole along fsdp, split over tensor.

    Returns the kernel as it came where no mesh is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel_DV
    split = kernel_DV.shape[1] % mesh.shape["tensor"] == 0
    return jax.lax.with_sharding_constraint(kernel_DV.astype(dtype), P(None, "tensor" if split else None))


def tensor_shards() -> int:
    """Devices that the mesh which is set (`jax.set_mesh`) splits weights over within a layer."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.size == 1 else mesh.shape["tensor"]
