"""Read GGUF files: the header as a mapping, tensors dequantized to float32 one at a time.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file; nothing but the header is in memory until `read`."""

    format: ClassVar[str] = "gguf"
    """Which column of a weight table names these tensors."""
    path: Path
    header: Mapping[str, Any]
    """Key to value, arrays as lists: `general.architecture`, `tokenizer.ggml.tokens`, ..."""
    tensors: Mapping[str, gguf.gguf_reader.ReaderTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape, slowest axis first: (out, in) for a matrix, as in a Hugging Face file."""
        return {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """Dequantize one tensor to float32, in memory of its own.

        Raises:
          ValueError: the quantization of the tensor is not one the `gguf` package can undo.
        """
        tensor = self.tensors[name]
        try:
            value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {name} is stored as {tensor.tensor_type.name}, which cannot be "
                "dequantized; take a file in F32, F16, BF16, Q4_*, Q5_*, Q8_0 or a K-quant"
            ) from error
        # Unquantized tensors come back as a view of the file on disk, which may change under us.
        return np.array(value, np.float32, subok=False)


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file and parse its header.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a GGUF file, a version this reader does not know, or a truncated one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    try:
        reader = gguf.GGUFReader(path)
        header = {key: field.contents() for key, field in reader.fields.items()}
    # The reader checks no bounds: what a cut-off file raises depends on where it was cut.
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a readable GGUF file: {error}; "
            "it may be truncated, so download it again"
        ) from error
    return GGUFFile(path, header, {tensor.name: tensor for tensor in reader.tensors})


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
