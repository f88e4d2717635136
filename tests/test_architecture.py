"""The order of the house: a module imports from its own floor and from floors below, never from one above.

Floors that stand side by side know nothing of each other.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

import nla_jax

FLOORS = (
    (
        "files",
        "html",
        "process",
        "randomness",
        "shipped",
        "text_analysis",
    ),  # modules that know nothing of the rest
    ("sharding",),  # where arrays live
    ("lm",),  # the language model as arrays
    ("lm.files",),  # the language model as files
    ("autoencoder", "chat"),  # an NLA; chat models that are asked
    ("data", "analysis"),  # what is trained on; pages about what was explained
    ("training",),
    ("evaluation", "interop"),  # what is measured; models of the reference implementation
    ("config",),
    ("pipeline", "planning"),  # a run; a run on devices that are not there
    ("commands",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted((ROOT / "nla_jax").rglob("*.py"))
FACE = ROOT / "nla_jax" / "__init__.py"


def room(module: str) -> str:
    """The room of a module, as in "nla_jax.lm.files.weights"."""
    _, *parts = module.split(".")
    return "lm.files" if parts[:2] == ["lm", "files"] else parts[0]


def imports(path: Path) -> set[str]:
    """The modules of the library that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relative to itself"
            # A name that is imported may be a module.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("nla_jax.")}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", [path for path in MODULES if path != FACE], ids=name_of)
def test_no_module_imports_upwards(path):
    own = room(name_of(path))
    rooms = {room(name) for name in imports(path)} - {own}
    assert {name for name in rooms if FLOOR[name] >= FLOOR[own]} == set()


def test_every_room_has_a_floor():
    assert {room(name_of(path)) for path in MODULES if path != FACE} == set(FLOOR)


def alone(code: str) -> str:
    """What a program prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_the_face_imports_nothing_behind_it():
    heavy = {"jax", "numpy", "flax", "transformers", "torch", "optax", "tyro"}
    loaded = alone("import sys, nla_jax; dir(nla_jax); print(*{name.split('.')[0] for name in sys.modules})")
    assert "nla_jax" in loaded.split() and not heavy & {*loaded.split()}
    inside = alone(
        "import sys, nla_jax; print(*(name for name in sys.modules if name.startswith('nla_jax.')))"
    )
    assert inside == ""


def test_public_names_start_no_backend():
    code = (
        "import nla_jax\n"
        "for name in nla_jax.__all__: getattr(nla_jax, name)\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())"
    )
    assert alone(code) == "False"


def test_every_public_name_is_what_it_is_called():
    assert sorted(dir(nla_jax)) == sorted(nla_jax.__all__) and len(set(nla_jax.__all__)) == len(
        nla_jax.__all__
    )
    for name in nla_jax.__all__:
        value = getattr(nla_jax, name)
        assert getattr(value, "__name__", name).split(".")[-1] in (name, "load_language_model"), name
    assert nla_jax.load_lm is nla_jax.load_language_model


def test_a_name_that_there_is_not():
    with pytest.raises(
        AttributeError, match=r"module 'nla_jax' has no attribute 'explain'; it has .*load_lm"
    ):
        nla_jax.explain  # noqa: B018
