"""Read GGUF files: the header as a mapping, tensors dequantized to float32 one at a time.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
from jaxtyping import Float, UInt8

READABLE_VERSIONS = (2, 3)
"""Version 1 counts in 32 bits; no file of it is left."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in the file."""

    shape: tuple[int, ...]
    """Slowest axis first: (out, in) for a matrix, as in a Hugging Face file."""
    tensor_type: gguf.GGMLQuantizationType
    data: UInt8[np.ndarray, "..."]
    """The tensor's bytes, a view of the file; the last axis holds the bytes of one row."""


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file; nothing but the header is in memory until `read`."""

    format: ClassVar[str] = "gguf"
    """The field of `TensorRow` that names these tensors."""
    path: Path
    header: Mapping[str, Any]
    """Key to value, arrays as lists: `general.architecture`, `tokenizer.ggml.tokens`, ..."""
    tensors: Mapping[str, StoredTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape, slowest axis first."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    unreadable: ClassVar[Mapping[str, str]] = {}
    """Tensors that the header shows to be unreadable: none, since quantizations are only tried in `read`."""

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Float[np.ndarray, "..."]:
        """Dequantize one tensor, or a part of it, to float32, in memory of its own.

        Args:
          name: name of the tensor.
          index: bounds of the first axes; the axes after them are read whole.

        Raises:
          ValueError: the quantization of the tensor is not one the `gguf` package can undo.
        """
        tensor = self.tensors[name]
        try:
            # Quantized blocks lie along the last axis, so only the bounds of the others save work.
            outer = index if len(index) < len(tensor.shape) else index[:-1]
            value = gguf.quants.dequantize(tensor.data[outer], tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {name} is stored as {tensor.tensor_type.name}, which cannot be "
                "dequantized; take a file in F32, F16, BF16, Q4_*, Q5_*, Q8_0 or a K-quant"
            ) from error
        # Unquantized tensors come back as a view of the file on disk, which may change under us.
        inner = index[len(outer) :]
        return np.array(value[(..., *inner)] if inner else value, np.float32, subok=False)


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file, parse its header and check that every tensor lies within the file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a GGUF file, a version this reader does not know, or a truncated one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    try:
        buffer = np.memmap(path, np.uint8, mode="r")
        header, tensors = _parse(buffer)
    except (ValueError, IndexError, OverflowError, struct.error) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a readable GGUF file: {error}; "
            "it may be truncated, so download it again"
        ) from error
    return GGUFFile(path, header, tensors)


class _Cursor:
    """A position in the file, from which the header's values are read with their bounds checked.

    The reader of the `gguf` package checks no bounds, and makes an array of every value, which takes ten seconds for a
    vocabulary of 262,144 tokens.
    """

    def __init__(self, buffer: UInt8[np.ndarray, "N"]):
        self.buffer, self.position = memoryview(buffer), 0

    def number(self, code: str) -> Any:
        """The next number, by its code in the module `struct`."""
        (value,) = struct.unpack_from(f"<{code}", self.buffer, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        """The next string."""
        start = self.position + 8
        self.position = start + self.number("Q")
        if self.position > len(self.buffer):
            raise ValueError(f"the string at byte {start} ends at byte {self.position}")
        return str(self.buffer[start : self.position], "utf-8")

    def value(self, kind: int) -> Any:
        """The next value of a GGUF type; arrays become lists."""
        if kind == gguf.GGUFValueType.STRING:
            return self.string()
        if kind != gguf.GGUFValueType.ARRAY:
            return self.number(_code(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind in (gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY):
            return [self.value(kind) for _ in range(count)]
        values = np.frombuffer(self.buffer, f"<{_code(kind)}", count, self.position)
        self.position += values.nbytes
        return values.tolist()


def _code(kind: int) -> str:
    """The code of a GGUF number type, the same in the module `struct` and in numpy."""
    codes = "BbHhIif?--Qqd"
    if not (0 <= kind < len(codes) and codes[kind] != "-"):
        raise ValueError(f"unknown value type {kind}")
    return codes[kind]


def _parse(buffer: UInt8[np.ndarray, "N"]) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    cursor = _Cursor(buffer)
    if cursor.number("I") != gguf.GGUF_MAGIC:
        raise ValueError("it does not start with the letters GGUF")
    if (version := cursor.number("I")) not in READABLE_VERSIONS:
        raise ValueError(f"version {version} is not one of {READABLE_VERSIONS} in little-endian order")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    header: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        header[key] = cursor.value(cursor.number("I"))
    places = []
    for _ in range(num_tensors):
        name = cursor.string()
        shape = [cursor.number("Q") for _ in range(cursor.number("I"))]
        places.append((name, tuple(shape[::-1]), cursor.number("I"), cursor.number("Q")))
    alignment = header.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in places:
        tensor_type = gguf.GGMLQuantizationType(kind)
        rows = gguf.quants.quant_shape_to_byte_shape(shape, tensor_type)
        start = data_start + offset
        end = start + int(np.prod(rows))
        if end > len(buffer):
            raise ValueError(f"tensor {name} ends at byte {end}")
        tensors[name] = StoredTensor(shape, tensor_type, buffer[start:end].reshape(rows))
    return header, tensors


def undo_rope_permutation(
    weight: Float[np.ndarray, "out *in"], num_heads: int
) -> Float[np.ndarray, "out *in"]:
    """Bring the rows of a Llama query or key matrix or bias from GGUF order back to Hugging Face order.

    GGUF rotates neighbors (2j, 2j+1) of a head, Hugging Face rotates halves (j, j + head_dim/2); converters
    to GGUF reorder the output rows of each head accordingly, and this is the inverse.

    Args:
      weight: (num_heads * head_dim, in), or a bias (num_heads * head_dim).
      num_heads: heads of this matrix; for keys, the number of key/value heads.
    """
    pairs = weight.reshape(num_heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
