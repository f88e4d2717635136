import importlib
import sys

import pytest

from nla_jax.lm.packages import assembled_gguf

ASSEMBLE = """
from pathlib import Path
def assemble(output_path=None):
    target = Path(__file__).parent / "cache" / "model.gguf"
    target.parent.mkdir(exist_ok=True)
    parts = sorted(Path(__file__).parent.glob("*.part*"))
    if len(parts) != 2:
        raise FileNotFoundError("Missing chunk files")
    target.write_bytes(b"".join(part.read_bytes() for part in parts))
    return target
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write a package of this source and make it importable."""

    def write(name, source):
        (folder := tmp_path / name).mkdir()
        (folder / "__init__.py").write_text(source)
        importlib.invalidate_caches()
        return folder

    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_parts_are_joined(install):
    folder = install("joins_parts", ASSEMBLE)
    (folder / "m.gguf.part00").write_bytes(b"GG")
    (folder / "m.gguf.part01").write_bytes(b"UF")
    path = assembled_gguf("joins_parts")
    assert path.read_bytes() == b"GGUF"


def test_missing_part(install):
    install("lacks_a_part", ASSEMBLE)
    message = (
        r"package:lacks_a_part could not put .* together \(Missing chunk files\); install lacks-a-part and"
    )
    with pytest.raises(ValueError, match=message):
        assembled_gguf("lacks_a_part")


def test_missing_part_package(install):
    install("lacks_a_package", "\ndef assemble():\n    import no_such_part_package\n")
    with pytest.raises(ValueError, match="No module named 'no_such_part_package'"):
        assembled_gguf("lacks_a_package")


def test_path_that_is_not_there(install):
    install("gives_nothing", "\ndef assemble():\n    return '/no/such.gguf'\n")
    with pytest.raises(ValueError, match=r"its GGUF file is /no/such.gguf, which is not there; install"):
        assembled_gguf("gives_nothing")


def test_other_packages_are_not_imported(install):
    install("must_not_run", "raise RuntimeError\n")
    assert assembled_gguf("must_not_run") is None
    assert assembled_gguf("no_such_package_anywhere") is None
