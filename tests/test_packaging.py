"""The library as a wheel in an environment that knows nothing of the checkout: what an ordinary installation gives."""

import importlib.metadata
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from processes import ROOT

from nla_jax.__main__ import COMMANDS

CONFIGS = {path.stem: path for path in (ROOT / "configs").glob("*.py")}
ADAPTERS = ROOT / "experiments" / "adapters" / "smollm2_135m"
BUILT_FROM = (
    "nla_jax",
    "configs",
    "experiments/adapters",
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources, so that no earlier build is in its way."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, sources / name, **({"symlinks": True} if (ROOT / name).is_dir() else {}))
    pip("wheel", "--no-deps", *isolation(), "--wheel-dir", str(out), str(sources))
    (built,) = out.glob("*.whl")
    return built


def isolation() -> list[str]:
    """Build with the setuptools that is here, unless it is too old."""
    try:
        here = int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        here = False
    return ["--no-build-isolation", "--no-index"] if here else []


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel in it, which sees this one's other packages but not its .pth files."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    places = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", places))
    others = {*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "others.pth").write_text("\n".join(sorted(others)) + "\n")
    pip("--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    return folder


@pytest.fixture
def run(environment, tmp_path):
    """Runs a program of the environment elsewhere and returns what it printed."""

    def run(*command: str, status: int = 0) -> str:
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        program = [str(environment / "bin" / command[0]), *command[1:]]
        done = subprocess.run(program, cwd=tmp_path, env=kept, capture_output=True, text=True)
        assert done.returncode == status, done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


def test_the_wheel_holds_every_module_and_what_comes_along(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        for path in CONFIGS.values():
            assert archive.read(f"nla_jax/configs/{path.name}") == path.read_bytes()
        for path in filter(Path.is_file, ADAPTERS.rglob("*")):
            assert archive.read(f"nla_jax/demo/{path.relative_to(ADAPTERS)}") == path.read_bytes()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "nla_jax").rglob("*.py")}
    assert modules <= names
    assert "nla_jax/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"nla_jax"}


def test_the_library_is_the_installed_one(run, environment):
    printed = run("python", "-c", "import nla_jax, nla_jax.shipped as s; print(nla_jax.__file__, s.__file__)")
    assert all(path.startswith(str(environment)) for path in printed.split())


def test_the_command_is_there(run):
    printed = run("nla", "--help")
    assert all(f"\n  {name} " in printed for name in COMMANDS)
    assert run("python", "-m", "nla_jax", "--help") == printed
    assert printed in run("python", "-m", "nla_jax", status=2)
    version = importlib.metadata.version("nla_jax")
    assert run("nla", "--version") == f"nla_jax {version}\n"
    assert "did you mean explain?" in run("nla", "explian", status=2)


def test_a_config_that_comes_along_is_found_by_its_name(run):
    assert "--rl.loop.steps" in run("nla", "train", "tiny", "--help")
    missing = run("nla", "train", "tyni", status=1)
    assert missing.startswith("error: config file tyni does not exist") and "Traceback" not in missing
    assert all(name in missing for name in CONFIGS)


def test_every_config_and_the_adapters_are_found(run, environment):
    program = (
        "from nla_jax.config import load_config\n"
        "from nla_jax.shipped import demo_directory, shipped_configs\n"
        "for name, path in shipped_configs().items(): print(path, load_config(path).name == name)\n"
        "print(demo_directory(), (demo_directory() / 'ar' / 'value_head.safetensors').is_file())\n"
    )
    lines = run("python", "-c", program).splitlines()
    assert len(lines) == len(CONFIGS) + 1
    assert all(line.startswith(str(environment)) and line.endswith(" True") for line in lines)


def test_a_stage_runs_where_there_is_no_checkout(run, shallow_model_dir, tmp_path):
    printed = run("nla", "stage", "extract", "tiny", "--model.path", str(shallow_model_dir))
    assert f"everything is in {tmp_path / 'runs' / 'tiny'}" in printed
    assert list((tmp_path / "runs" / "tiny" / "data" / "base").glob("*.parquet"))
