"""The device mesh and the partition rules of parameters.

Axes: "data" splits batches, "fsdp" splits batches and weights, "tensor" splits weights within a layer.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis; one axis at most may be -1, which takes all devices that are left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


PARTITION_RULES = (
    # The first pattern that matches a parameter's path decides. Norms, biases, routers and the AR head are replicated.
    # The embedding is not split over tensor: with both axes, the partitioner replicates activations on some meshes.
    (r"embed/embedding$", P(None, "fsdp")),
    (r"(query|key|value|gate|up|lm_head)/kernel$", P("fsdp", "tensor")),
    (r"(out|down)/kernel$", P("tensor", "fsdp")),
    # Adapters are split like the sides of the kernels that they add to; their rank stays whole.
    (r"(query|key|value|gate|up)/lora_a$", P("fsdp", None)),
    (r"(query|key|value|gate|up)/lora_b$", P(None, "tensor")),
    (r"(out|down)/lora_a$", P("tensor", None)),
    (r"(out|down)/lora_b$", P(None, "fsdp")),
    # Stacked experts are split within each expert, like the plain layers that they replace.
    (r"mlp/(gate|up)$", P(None, "fsdp", "tensor")),
    (r"mlp/down$", P(None, "tensor", "fsdp")),
    (r"", P()),
)


BATCH = P(("data", "fsdp"))


AnyMesh = Mesh | AbstractMesh
"""A mesh of real devices, or one that only knows their number."""


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices in a mesh; by default, the devices of all processes.

    Several TPU slices, which a slower network joins, are separated along the data axis only.

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
    # Axes may be shorter than the sides of a slice: tensor 4 takes half a side of a v6e:8x8.
    within, split = [sizes[0] // slices, *sizes[1:]], {"allow_split_physical_axes": True}
    if slices > 1:
        placed = mesh_utils.create_hybrid_device_mesh(within, [slices, 1, 1], devices, **split)
    else:
        placed = mesh_utils.create_device_mesh(sizes, devices, **split)
    return Mesh(placed, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * placed.ndim)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: AnyMesh, *, gathered: bool = False) -> P:
    """The partition of a parameter by its slash-separated path; axes that do not divide a dimension are dropped.

    Args:
      path: the parameter's path.
      shape: the parameter's shape.
      mesh: the mesh that the parameter is placed on.
      gathered: whether parameters are whole along fsdp. The embedding is split even then: a lookup in a split table
        moves rows, not the table.
    """
    if "blocks" in path.split("/"):
        # Stacked blocks are split as each alone would be.
        of_one_block = parameter_spec(path.replace("blocks/", "block/"), shape[1:], mesh, gathered=gathered)
        return P(None, *of_one_block)
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
