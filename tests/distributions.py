"""Installed distributions of a test's own files."""

from importlib.metadata import Distribution, PathDistribution
from pathlib import Path


def installed(folder: Path, name: str, files: dict[str, str | bytes], description: str = "") -> Distribution:
    """Write the files of a package below a folder, with their list and their metadata, as an installer does."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    info = folder / f"{name}-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "RECORD").write_text("\n".join(f"{path},," for path in files))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n\n{description}")
    return PathDistribution(info)
