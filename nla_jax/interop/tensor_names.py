"""The tensors of a model directory and the parameters that each becomes, for people to read."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from nla_jax.interop.model_directories import HEAD_FILE
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.families import tensor_rows


class TensorName(NamedTuple):
    """A tensor in a file, and the parameters that it becomes."""

    file_name: str
    shape: tuple[int, ...]
    """The tensor's shape in the file."""
    paths: tuple[str, ...]
    """Paths of our parameters; several where the file fuses them."""
    transposed: bool
    """Whether the file holds (out, in)."""

    def __str__(self) -> str:
        turned = " transposed" if self.transposed else ""
        return f"{self.file_name} {list(self.shape)} -> {' + '.join(self.paths)}{turned}"


def tensor_names(config: LMConfig, role: Literal["av", "ar"]) -> Iterator[TensorName]:
    """Every tensor of an AV's or AR's checkpoint that is one of our parameters, in the order of our tree.

    Args:
      config: config of the LM; an AR's is truncated.
      role: "ar" adds the value head.
    """
    for row in tensor_rows(config):
        for name, shape in row.file_shapes(config).items():
            yield TensorName(name, shape, tuple(f"lm/{path}" for path in row.paths), row.transpose)
    if role == "ar":
        yield TensorName(f"{HEAD_FILE}: weight", (config.d_model,) * 2, ("head/kernel",), True)
