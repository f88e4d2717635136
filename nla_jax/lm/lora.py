"""Training a part of a model: adapters beside frozen weights, or its upper blocks alone.

Low-rank adapters (Hu et al. 2021) are W + s A B, where W is frozen and A and B are trained. They lie beside the kernels
that they adapt, as `lora_a` and `lora_b` in the same tree, and `Linear` applies them if they are there. Trained and
frozen parameters are two trees, which `FrozenBase` puts together: nothing is copied, and two models can share a base.
The scale is the rank-stabilized one (Kalajdzievski 2023), alpha / √rank.
Shape letters: I in, O out, R rank; stacked blocks lead with an axis of blocks.
"""

import dataclasses
import re
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from nla_jax.lm.transformer import Params

Target = Literal["query", "key", "value", "out", "gate", "up", "down"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Whether adapters are trained in place of all parameters, and of which maps."""

    rank: int = 0
    """Rank of the adapters; 0 trains all parameters instead."""
    alpha: float = 16.0
    targets: tuple[Target, ...] = ("query", "key", "value", "out", "gate", "up", "down")
    """The linear maps of every block that get an adapter."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen weights. bfloat16 halves their memory; products round to `model.dtype` in any case."""

    @property
    def scale(self) -> float:
        """The factor of the product A B."""
        return self.alpha / self.rank**0.5


@flax.struct.dataclass
class FrozenBase:
    """The frozen parameters of an LM: all, which adapters belong to, or those below the blocks that are trained.

    Attributes:
      lm: the LM's parameters that are frozen.
      scale: factor of every adapter's product A B.
    """

    lm: Params
    scale: float = flax.struct.field(pytree_node=False)

    def with_adapters(self, trained: Params) -> Params:
        """A model's parameters for a forward: `trained`, with what is in its `lm` beside the frozen parameters."""
        adapters = flatten_dict(trained["lm"])
        scaled = {path: x * self.scale if path[-1] == "lora_b" else x for path, x in adapters.items()}
        return {**trained, "lm": unflatten_dict({**flatten_dict(self.lm), **scaled})}


def with_adapters(base: FrozenBase | None, trained: Params) -> Params:
    """`base.with_adapters(trained)`, or `trained` itself if there is no base: then the whole model is trained."""
    return trained if base is None else base.with_adapters(trained)


def split_frozen(lm: Params, blocks: int) -> tuple[Params, Params]:
    """An LM's parameters in two: its embeddings and first blocks, which are frozen, and all others, which are trained.

    Args:
      lm: parameters, or their shapes, whose blocks are not stacked.
      blocks: how many blocks are frozen.

    Raises:
      ValueError: the blocks are stacked.
    """
    if "blocks" in lm:
        raise ValueError(
            "stacked blocks are frozen all or none; set model.scan_blocks to False, or model.frozen_blocks to 0"
        )
    names = {"embed", "position_embed", *(f"blocks_{i}" for i in range(blocks))}
    frozen = {name: values for name, values in lm.items() if name in names}
    return frozen, {name: values for name, values in lm.items() if name not in names}


def init_adapters(config: LoraConfig, params: Params, key: jax.Array) -> Params:
    """The trained parameters of a model under LoRA: `params` with adapters in place of its `lm`.

    A is uniform in ±√(1 / I), as in PEFT; B is zero, so that the model starts as its base.

    Args:
      config: the adapters' config, with a positive rank.
      params: parameters of an AV or AR, or their shapes; the LM's blocks may be stacked.
      key: random key.

    Raises:
      ValueError: the model has none of the targets, or its experts are among them.
    """
    pattern = re.compile(rf"({'|'.join(config.targets)})/kernel$")
    shapes = {path: x.shape for path, x in flatten_dict(params["lm"], sep="/").items()}
    targets = {path: shape for path, shape in shapes.items() if pattern.search(path)}
    if routed := [path for path in shapes if re.search(rf"mlp/({'|'.join(config.targets)})$", path)]:
        raise ValueError(
            f"{routed[0]} is a stack of experts, which adapters are not made for; leave gate, up and down out of "
            f"lora.targets={config.targets}"
        )
    if not targets:
        raise ValueError(
            f"lora.targets={config.targets} names nothing in the model; it has {sorted(shapes)[:5]}..."
        )
    adapters = {}
    for index, (path, (*blocks, inputs, outputs)) in enumerate(sorted(targets.items())):
        module, limit = path.removesuffix("kernel"), inputs**-0.5
        shape = (*blocks, inputs, config.rank)
        adapters[f"{module}lora_a"] = jax.random.uniform(
            jax.random.fold_in(key, index), shape, minval=-limit, maxval=limit
        )
        adapters[f"{module}lora_b"] = jnp.zeros((*blocks, config.rank, outputs))
    return {**params, "lm": unflatten_dict(adapters, sep="/")}


def merge(params: Params) -> Params:
    """Fold attached adapters into the kernels, in float32; a model without adapters is returned unchanged."""
    flat = flatten_dict(params)
    merged = {path: x for path, x in flat.items() if path[-1] not in ("lora_a", "lora_b")}
    for path, a in flat.items():
        if path[-1] == "lora_a":
            b, kernel = flat[*path[:-1], "lora_b"], (*path[:-1], "kernel")
            product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            merged[kernel] = merged[kernel].astype(jnp.float32) + product
    return unflatten_dict(merged)
