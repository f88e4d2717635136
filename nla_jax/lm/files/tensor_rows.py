"""One row of a family's name table: it turns a file's tensor into our parameters, and parameters into tensors."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from nla_jax.lm.config import LMConfig
from nla_jax.lm.transformer import parameter_shapes

Index = tuple[slice, ...]
"""Bounds of a part, axis by axis, without steps; () means the whole."""
Read = Callable[[str, Index], np.ndarray]
"""Reads a part of a tensor, by its Hugging Face name and the bounds along the file's axes."""
Part = Callable[[Index], np.ndarray]
"""Reads a part of one parameter, by the bounds along the parameter's axes."""


class TensorRow(NamedTuple):
    """A tensor of a checkpoint, or one for each expert, and the parameters in it; `{i}` stands for the block."""

    hf: str
    """The tensor's name in Hugging Face files; tensors with `{e}` for the expert are stacked to one parameter."""
    paths: tuple[str, ...]
    """Paths of our parameters in the tensor; several where the file fuses them along the output axis."""
    gguf: str = ""
    """The tensor's name in GGUF files; empty if none of this family are read."""
    transpose: bool = False
    """Whether the file holds (out, in); our kernels are (in, out)."""
    by_head: bool = False
    """Whether fused parameters alternate head by head; otherwise each lies in one piece."""

    def at(self, block: int) -> "TensorRow":
        """This row for one block."""
        names = (self.hf, self.gguf, *self.paths)
        hf, gguf, *paths = (name.replace("{i}", str(block)) for name in names)
        return self._replace(hf=hf, gguf=gguf, paths=tuple(paths))

    def file_shapes(self, config: LMConfig) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape in a Hugging Face file; a GGUF file has the same shapes under its own names."""
        shapes = parameter_shapes(config)
        *leading, _ = shapes[self.paths[0]]
        shape = (*leading, sum(shapes[path][-1] for path in self.paths))
        names = self.names(config)
        if "{e}" in self.hf:
            shape = shape[1:]
        return dict.fromkeys(names, shape[::-1] if self.transpose else shape)

    def names(self, config: LMConfig) -> list[str]:
        """Names of the row's tensors in a Hugging Face file, one for each expert if there are experts."""
        experts = range(config.experts.count) if "{e}" in self.hf else (0,)
        return [self.hf.replace("{e}", str(expert)) for expert in experts]

    def parameters(self, read: Read, config: LMConfig) -> Iterator[tuple[str, Part]]:
        """Each parameter's path, with a function that reads the parameter, or only a part of it, from the file.

        Args:
          read: reads a part of a tensor by its Hugging Face name and the bounds along the file's axes.
          config: config of the model.
        """
        sizes = [parameter_shapes(config)[path][-1] for path in self.paths]
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        if self.by_head:
            # A parameter's heads are scattered over the tensor, so the whole is read at once.
            value = read(self.hf, ())
            value = _swap_heads(value.T if self.transpose else value, config.num_heads, len(self.paths))
            for path, piece in zip(self.paths, np.split(value, starts[1:], axis=-1), strict=True):
                yield path, piece.__getitem__
            return
        for path, start in zip(self.paths, starts, strict=True):
            yield path, functools.partial(self._part, read, start, config)

    def _part(self, read: Read, start: int, config: LMConfig, index: Index) -> Float[np.ndarray, "..."]:
        """A part of the parameter that begins at `start` along the output axis, in the memory order of the file."""
        *leading, last = index
        index = (*leading, slice(start + last.start, start + last.stop))
        if "{e}" not in self.hf:
            return read(self.hf, index[::-1]).T if self.transpose else read(self.hf, index)
        experts, *inner = index
        # Filled expert by expert: stacking a list of all experts would take twice the memory.
        value = None
        for position, name in enumerate(self.names(config)[experts]):
            expert = read(name, tuple(inner[::-1] if self.transpose else inner))
            if value is None:
                value = np.empty((experts.stop - experts.start, *expert.shape), expert.dtype)
            value[position] = expert
        return value.swapaxes(1, 2) if self.transpose else value

    def tensors(
        self, flat: Mapping[str, Any], config: LMConfig
    ) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
        """The inverse of `parameters`: tensor names and float32 values, from parameters by path."""
        pieces = [np.asarray(flat[path], np.float32) for path in self.paths]
        value = np.concatenate(pieces, axis=-1) if len(pieces) > 1 else pieces[0]
        if self.by_head:
            value = _swap_heads(value, len(self.paths), config.num_heads)
        values = value if "{e}" in self.hf else [value]
        for name, array in zip(self.names(config), values, strict=True):
            yield name, np.ascontiguousarray(array.T if self.transpose else array)


def _swap_heads(value: Float[np.ndarray, "..."], outer: int, inner: int) -> Float[np.ndarray, "..."]:
    """Exchange the two outer of the three axes (outer, inner, head_dim) that make up the last one."""
    split = value.reshape(*value.shape[:-1], outer, inner, -1)
    return split.swapaxes(-3, -2).reshape(value.shape)
