"""Which tensor of a checkpoint is which of our parameters, for reading along."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from nla_jax.interop.model_directories import HEAD_FILE
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.families import tensor_rows


class TensorName(NamedTuple):
    """A tensor in a file and what it is here."""

    file_name: str
    shape: tuple[int, ...]
    """In the file."""
    paths: tuple[str, ...]
    """Our parameters; several where the file fuses them."""
    transposed: bool
    """Whether the file holds (out, in)."""

    def __str__(self) -> str:
        turned = " transposed" if self.transposed else ""
        return f"{self.file_name} {list(self.shape)} -> {' + '.join(self.paths)}{turned}"


def tensor_names(config: LMConfig, role: Literal["av", "ar"]) -> Iterator[TensorName]:
    """Every tensor of an AV's or AR's checkpoint that is one of our parameters, in the order of our tree.

    Args:
      config: for an AR the truncated one.
      role: an AR has a value head as well.
    """
    for row in tensor_rows(config):
        for name, shape in row.file_shapes(config).items():
            yield TensorName(name, shape, tuple(f"lm/{path}" for path in row.paths), row.transpose)
    if role == "ar":
        yield TensorName(f"{HEAD_FILE}: weight", (config.d_model,) * 2, ("head/kernel",), True)
