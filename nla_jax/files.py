"""Files that are there whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


@contextlib.contextmanager
def write_atomically(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` when the block ends.

    A block that raises leaves `path` as it was and nothing beside it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically; only the first of several processes writes."""
    if jax.process_index() > 0:
        return
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
