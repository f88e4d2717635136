"""Device mesh, partition rules and placement; every floor of the library may use it.

Axes: "data" splits batches, "fsdp" splits batches and weights, "tensor" splits weights within a layer.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1, in one place at most, takes all that are left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


PARTITION_RULES = (
    # The first pattern that matches a parameter's path decides. Norms, biases, routers and the AR head are replicated.
    # The embedding stays off the tensor axis: split over both, the partitioner replicates activations on some meshes.
    (r"embed/embedding$", P(None, "fsdp")),
    (r"(query|key|value|gate|up|lm_head)/kernel$", P("fsdp", "tensor")),
    (r"(out|down)/kernel$", P("tensor", "fsdp")),
    # Adapters as the sides of the kernels that they add to; their rank stays whole.
    (r"(query|key|value|gate|up)/lora_a$", P("fsdp", None)),
    (r"(query|key|value|gate|up)/lora_b$", P(None, "tensor")),
    (r"(out|down)/lora_a$", P("tensor", None)),
    (r"(out|down)/lora_b$", P(None, "fsdp")),
    # Stacked experts are split within each expert, as the layers they stand for.
    (r"mlp/(gate|up)$", P(None, "fsdp", "tensor")),
    (r"mlp/down$", P(None, "tensor", "fsdp")),
    (r"", P()),
)
BATCH = P(("data", "fsdp"))
AnyMesh = Mesh | AbstractMesh
"""Of devices, or of their number alone."""


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices, those of all processes unless others are given.

    Several TPU slices, which a slower network joins, are apart along data alone.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or data is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [config.data, config.fsdp, config.tensor], len(devices)
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = max(count // -int(np.prod(sizes)), 1)
    if int(np.prod(sizes)) != count or min(sizes) < 1:
        raise ValueError(
            f"mesh data={config.data}, fsdp={config.fsdp}, tensor={config.tensor} does not multiply to the "
            f"{count} devices present; set one axis to -1 to let it take what is left, and the others so that their "
            f"product divides {count}"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    if sizes[0] % slices:
        raise ValueError(
            f"mesh data={sizes[0]} is no multiple of the {slices} TPU slices, which are apart along that axis; set "
            f"--mesh.data {slices} and let fsdp and tensor divide the {count // slices} devices of each"
        )
    # Slices whose sides are not the axes' sizes are split: tensor 4 has half a side of a v6e:8x8.
    within, split = [sizes[0] // slices, *sizes[1:]], {"allow_split_physical_axes": True}
    if slices > 1:
        placed = mesh_utils.create_hybrid_device_mesh(within, [slices, 1, 1], devices, **split)
    else:
        placed = mesh_utils.create_device_mesh(sizes, devices, **split)
    return Mesh(placed, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * placed.ndim)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: AnyMesh, *, gathered: bool = False) -> P:
    """The partition of a parameter by its slash-separated path; axes that do not divide a dimension are dropped.

    Args:
      path: of the parameter.
      shape: likewise.
      mesh: what it is placed on.
      gathered: whether it is whole along fsdp, unless it is the embedding: looking up in a split table moves rows.
    """
    if "blocks" in path.split("/"):
        # Stacked blocks are split as each alone would be.
        rest = parameter_spec(path.replace("blocks/", "block/"), shape[1:], mesh, gathered=gathered)
        return P(None, *rest)
    gathered = gathered and not path.endswith("embed/embedding")
    spec = next(spec for pattern, spec in PARTITION_RULES if re.search(pattern, path))
    if len(spec) > len(shape):
        return P()

    def fits(axes: Any, size: int) -> bool:
        names = axes if isinstance(axes, tuple) else (axes,)
        if gathered and "fsdp" in names:
            return False
        return axes is not None and size % int(np.prod([mesh.shape[name] for name in names])) == 0

    return P(*(axes if fits(axes, size) else None for axes, size in zip(spec, shape, strict=False)))


def tree_shardings(tree: Any, mesh: AnyMesh, *, gathered: bool = False) -> Any:
    """The sharding of every leaf of a parameter or training-state tree (optimizer moments follow their weights)."""

    def sharding(path, leaf):
        name = "/".join(str(getattr(part, "key", getattr(part, "name", part))) for part in path)
        return NamedSharding(mesh, parameter_spec(name, leaf.shape, mesh, gathered=gathered))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def own_rows(count: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch lie on this process's devices, in order.

    Args:
      count: rows of the batch.
      mesh: its data and fsdp axes split them.

    Raises:
      ValueError: rows that the two axes do not divide.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if count % ways:
        raise ValueError(
            f"a batch of {count} rows does not divide over data * fsdp = {ways} devices; use a multiple of {ways}"
        )
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((count,)).values()
    spans = sorted({rows.indices(count)[:2] for (rows,) in indices})
    return np.concatenate([np.arange(*span) for span in spans])


def shard_own_rows(batch: Any, count: int, mesh: Mesh) -> Any:
    """Place host arrays of the rows `own_rows(count, mesh)` of a batch, which differ from process to process."""
    sharding = NamedSharding(mesh, BATCH)

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array, (count, *array.shape[1:]))

    return jax.tree.map(place, batch)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Place host arrays of all rows, which every process holds: each places its own."""

    def place(array: np.ndarray) -> jax.Array:
        return shard_own_rows(array[own_rows(len(array), mesh)], len(array), mesh)

    return jax.tree.map(place, batch)


def own_part(batch: Any) -> Any:
    """The rows of a placed batch that lie on this process's devices, on the host."""

    def part(array: jax.Array) -> np.ndarray:
        shards = {shard.index[0].indices(len(array))[0]: shard for shard in array.addressable_shards}
        return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])

    return jax.tree.map(part, batch)


def to_host(batch: Any) -> Any:
    """All rows of placed arrays, on the host of every process, which all have to ask for them."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(batch, tiled=True)
    return jax.tree.map(np.asarray, batch)


def place(tree: Any, mesh: Mesh) -> Any:
    """Move parameters or training states to where the partition rules want them; what is there already is donated."""
    return jax.jit(lambda x: x, out_shardings=tree_shardings(tree, mesh), donate_argnums=0)(tree)


@flax.struct.dataclass
class _Given:
    """Stands for a leaf of the arguments among a function's results."""

    index: int = flax.struct.field(pytree_node=False)


def mark_given(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, to be traced, with a mark in place of every result that is an argument as it came."""

    def marked(*args: Any) -> Any:
        given = {id(x): _Given(index) for index, x in enumerate(jax.tree.leaves(args))}
        return jax.tree.map(lambda x: given.get(id(x), x), function(*args))

    return marked


def jit_sharing(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` for functions that change a part of their arguments: what they return as it came is the same array.

    The results of `jax.jit` are copies, even those of the identity.
    """
    compiled = jax.jit(mark_given(function))

    def call(*args: Any) -> Any:
        given = jax.tree.leaves(args)

        def result(x: Any) -> Any:
            return given[x.index] if isinstance(x, _Given) else x

        return jax.tree.map(result, compiled(*args), is_leaf=lambda x: isinstance(x, _Given))

    return call


def settle(tree: Any) -> Any:
    """Wait for arrays on simulated devices, and on no others; returns them.

    Simulated devices share one pool of threads, in which programs whose devices wait for each other must not overlap:
    each may hold threads that the other needs.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.block_until_ready(tree)
    return tree


def wait_for_all(name: str) -> None:
    """Return when every process of the run has come here, for instance because one has written what all will read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def keep_rows_apart(x: jax.Array, *, looked_up: bool = False) -> jax.Array:
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


def split_vocabulary(x: jax.Array) -> jax.Array:
    """Tell the partitioner to leave logits split over tensor, as the head's kernel is, and over rows.

    Left to itself it may bring the whole kernel to every device, or all logits. Does nothing where `keep_rows_apart`
    does nothing, or the tensor axis does not divide what is split.

    Args:
      x: rows first, tokens of the vocabulary or bins of them second.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    if x.shape[1] % mesh.shape["tensor"]:
        return keep_rows_apart(x)
    return jax.lax.with_sharding_constraint(x, P(BATCH[0], "tensor"))


def row_ways(rows: int) -> int:
    """Devices that the mesh which is set (`jax.set_mesh`) splits rows over; 1 where they do not divide them."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    return 1 if rows % ways else ways


def split_head(kernel_DV: jax.Array, dtype: Any) -> jax.Array:
    """The LM head as rows that are split want it: cast to `dtype` and then made whole along fsdp, split over tensor.

    Returns the kernel as it came where no mesh is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel_DV
    split = kernel_DV.shape[1] % mesh.shape["tensor"] == 0
    return jax.lax.with_sharding_constraint(kernel_DV.astype(dtype), P(None, "tensor" if split else None))


def tensor_ways() -> int:
    """Devices that the mesh which is set (`jax.set_mesh`) splits weights over within a layer."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.size == 1 else mesh.shape["tensor"]
