"""Files that are there whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import jax


def write_json(path: Path, value: Any) -> None:
    """Write a file, atomically; of several processes the first does."""
    if jax.process_index() > 0:
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(temporary, path)
