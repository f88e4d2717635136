"""Safetensors read part by part, without mapping the files into memory.

The safetensors library checks the headers. The numbers are read here instead, because memory that the library maps
stays resident beside the copies. The format is described at https://github.com/huggingface/safetensors#format.
"""

import dataclasses
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from nla_jax.files import Place, write_atomically
from nla_jax.lm.files.sources import listing

READABLE = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Types of tensors that hold plain weights; all others are integers, or need scales to mean anything."""
LARGEST = 1e18
"""Numbers beyond this, whose squares have no float32, come from damaged files alone."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a file."""

    path: Path
    kind: str
    """The tensor's type: a key of READABLE, or another name of the format."""
    shape: tuple[int, ...]
    offset: int
    """Offset of the tensor's first byte in the file."""


@dataclasses.dataclass(frozen=True)
class SafetensorsFiles:
    """The safetensors files of a Hugging Face directory; only their headers are in memory."""

    format: ClassVar[str] = "hf"
    """The field of `TensorRow` that names these tensors."""
    path: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def unreadable(self) -> dict[str, str]:
        """Tensor name -> type, for every tensor whose type is not one of READABLE."""
        return {name: tensor.kind for name, tensor in self.tensors.items() if tensor.kind not in READABLE}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Float[np.ndarray, "..."]:
        """A tensor, or a part of it, in the type that it is stored in.

        Args:
          name: name of a tensor whose type is one of READABLE.
          index: bounds of the first axes, without steps; the axes after them are read whole.
        """
        tensor = self.tensors[name]
        dtype, shape = READABLE[tensor.kind], tensor.shape
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=False)]
        wanted = [stop - start for start, stop in bounds] + list(shape[len(bounds) :])
        if wanted[1:] != list(shape[1:]):
            # Only the pages that hold the columns are read; the mapping goes when the copy is made.
            return np.array(np.memmap(tensor.path, dtype, "r", tensor.offset, shape)[index], subok=False)
        skipped = bounds[0][0] * int(np.prod(shape[1:])) * dtype.itemsize if bounds else 0
        read = np.fromfile(tensor.path, dtype, int(np.prod(wanted)), offset=tensor.offset + skipped)
        return read.reshape(wanted)


def read_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Float[np.ndarray, "..."]]:
    """All tensors of a small file, as float32.

    Args:
      path: path of the file.
      shapes: name -> shape of exactly the tensors that must be in it; None accepts any.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is unreadable, holds other names or shapes, tensors of integers, or numbers that are NaN,
        infinite or beyond `LARGEST`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; download or export the model again")
    kinds = {name: tensor.kind for name, tensor in _header(path).items()}
    if wrong := [f"{name} {kind}" for name, kind in kinds.items() if kind not in (*READABLE, "F64")]:
        raise ValueError(
            f"{path} holds tensors that are not F64, {', '.join(READABLE)}: {listing(wrong)}; "
            "take the file as it was before quantization"
        )
    tensors = load_file(path)
    stored_shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes is not None and shapes.items() < stored_shapes.items():
        more = [f"{name} {shape}" for name, shape in stored_shapes.items() if name not in shapes]
        raise ValueError(
            f"{path} holds {listing(more)} beside {listing(sorted(shapes))}, which has no place in this model and "
            "would be lost; export a model without it"
        )
    if shapes is not None and stored_shapes != shapes:
        raise ValueError(f"{path} holds {stored_shapes}, expected {shapes}; does it belong to this model?")
    for name, tensor in tensors.items():
        # The comparison is false for NaN.
        count = tensor.size - int((np.abs(tensor.astype(np.float64)) <= LARGEST).sum())
        if count:
            raise ValueError(
                f"{path}: {name} holds {count} of {tensor.size} numbers that are NaN, infinite or beyond "
                f"{LARGEST:.0e}, so the file is damaged; download it again, or export the model from another step"
            )
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def save_tensors(
    tensors: Mapping[str, Float[np.ndarray, "..."]], path: Place, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in one step, with the mode that the umask gives to new files.

    Args:
      tensors: name -> tensor, in any memory order.
      path: path of the file; one that is there is replaced when the new one is whole.
      metadata: texts for the file's header.
    """
    with write_atomically(path) as part:
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)
        # The library would write a transposed array's numbers in the order of its memory.
        contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
        save_file(contiguous, part, None if metadata is None else dict(metadata))
        # The library gives its files to their owner alone.
        part.chmod(mode)


def open_safetensors(directory: str | os.PathLike[str]) -> SafetensorsFiles:
    """Open `model.safetensors`, or every shard that `model.safetensors.index.json` names.

    Raises:
      FileNotFoundError: neither file is there, or a shard is missing.
      ValueError: a file is truncated or not safetensors, or the index names no shards.
    """
    directory, files = Path(directory), ["model.safetensors"]
    if (index := directory / "model.safetensors.index.json").is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map, which tells tensors' files; download it again")
        files = sorted(set(weight_map.values()))
    if missing := [file for file in files if not (directory / file).is_file()]:
        origin = f"named by {index.name} " if index.is_file() else ""
        raise FileNotFoundError(
            f"{directory} lacks {listing(missing)} {origin}(weights are read from safetensors only); "
            "download the model again or convert it"
        )
    tensors = {}
    for file in files:
        tensors |= _header(directory / file)
    return SafetensorsFiles(directory, tensors)


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); download it again"
        ) from error
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else raises ValueError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} instead of an object; download it again")
    return value
