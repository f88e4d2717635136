"""Processes are started anew only where they are the library's own, and say nothing that is not so."""

import builtins
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from processes import ROOT

from nla_jax.commands.startup import is_own_process

SCRIPT = str(ROOT / "experiments" / "train_nla.py")
NLA = str(Path(sysconfig.get_path("scripts")) / "nla")


@pytest.mark.parametrize(
    "arguments",
    [
        ("python", NLA, "train", "tiny"),
        ("python", "-m", "nla_jax", "train", "tiny"),
        ("python", "-mnla_jax", "train", "tiny"),
        ("python", "-um", "nla_jax", "train"),
        ("python", "-X", "importtime", "-Wignore", "-W", "error", SCRIPT, "tiny"),
        ("python", "--check-hash-based-pycs", "never", SCRIPT),
        ("python", os.path.relpath(SCRIPT), "-m", "pdb"),
    ],
)
def test_the_librarys_own_programs(arguments):
    assert is_own_process(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("python",),
        ("python", "-i"),
        ("python", "-c", "import nla_jax", SCRIPT),
        ("python", "-m", "pdb", SCRIPT, "tiny"),
        ("python", "-m", "cProfile", "-m", "nla_jax", "train"),
        ("python", "-mipykernel_launcher", "-f", "kernel.json"),
        ("python", "outer.py", SCRIPT),
        ("python", "-X", SCRIPT, "outer.py"),
        ("python", "-W", "-m", "outer.py"),
        ("python", str(Path(NLA).with_name("pytest")), "-m", "nla_jax"),
        ("python", "/somewhere/else/nla", "train"),
        ("python", "/somewhere/experiments/train_nla.py"),
        ("python", str(ROOT / "experiments")),
    ],
)
def test_programs_of_others(arguments):
    assert not is_own_process(arguments)


def test_what_is_watched_is_not_started_anew(monkeypatch):
    arguments = ("python", SCRIPT)
    for watch in (sys.settrace, sys.setprofile):
        watch(lambda *event: None)
        try:
            assert not is_own_process(arguments)
        finally:
            watch(None)
    monkeypatch.setattr(builtins, "get_ipython", lambda: None, raising=False)
    assert not is_own_process(arguments)


@pytest.fixture
def starts(tmp_path):
    """Runs a program and returns the allocator's setting at each start of an interpreter in it."""
    hook = 'import os, sys\nprint("started", os.environ.get("GLIBC_TUNABLES", "plain"), file=sys.stderr)\n'
    (tmp_path / "sitecustomize.py").write_text(hook)
    (tmp_path / "outer.py").write_text(
        "import runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    place = os.pathsep.join([str(tmp_path), str(ROOT)])

    def starts(*arguments: str, **variables: str) -> list[str]:
        kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        command = [sys.executable, *arguments]
        environment = {**kept, "PYTHONPATH": place, **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("usage: nla "), done.stderr
        return [line.split()[1] for line in done.stderr.splitlines() if line.startswith("started ")]

    return starts


@pytest.mark.skipif(sys.platform != "linux", reason="other systems grant no huge pages")
def test_a_training_process_is_started_anew_once(starts):
    setting = "glibc.malloc.hugetlb=1"
    assert starts(SCRIPT, "--help") == ["plain", setting]
    assert starts("-m", "nla_jax", "evaluate", "--help") == ["plain", setting]
    assert starts(SCRIPT, "--help", GLIBC_TUNABLES="glibc.malloc.perturb=0") == [
        "glibc.malloc.perturb=0",
        f"glibc.malloc.perturb=0:{setting}",
    ]
    assert starts(SCRIPT, "--help", GLIBC_TUNABLES="glibc.malloc.hugetlb=0") == ["glibc.malloc.hugetlb=0"]


def test_commands_that_do_not_train_stay_in_their_process(starts):
    for name in ("explain", "compare", "convert", "inspect"):
        assert starts("-m", "nla_jax", name, "--help") == ["plain"]


def test_a_program_that_runs_a_script_inside_itself_is_not_started_anew(starts):
    assert starts("outer.py", SCRIPT, "--help") == ["plain"]
    assert starts("-m", "cProfile", "-o", os.devnull, SCRIPT, "--help") == ["plain"]


def test_nothing_is_said_about_frameworks_and_devices_that_are_not_there(tmp_path):
    program = (
        "import importlib.util, sys\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'torch' else found(name, *more)\n"
        "if sys.argv[1:]:\n"
        "    from nla_jax.commands.startup import silence_libtpu\n"
        "    silence_libtpu()\n"
        "import jax, transformers\n"
        "jax.devices()\n"
        "transformers.logging.get_logger('transformers').warning_advice('something else')\n"
    )
    kept = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}

    def said(*arguments: str) -> str:
        command = [sys.executable, "-c", program, *arguments]
        environment = {**kept, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "PyTorch was not found" in said()
    assert said("quiet") == "[transformers] something else\n"
