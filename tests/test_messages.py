"""Commands, options, fields and modules that docstrings and messages of the code name exist."""

import ast
import dataclasses
import re
import typing

import pytest
from processes import ROOT

from nla_jax.__main__ import COMMANDS
from nla_jax.commands.completion import commands as described_commands
from nla_jax.commands.stage import STAGES
from nla_jax.config import ExperimentConfig

FOLDERS = ("nla_jax", "experiments", "configs")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
OTHERS = {
    "--version",  # of nla itself
    "--no-deps",  # of pip
    "--force-reinstall",
    "--check-hash-based-pycs",  # of python
    "--error-unmatch",  # of git
    "--tensorboard",  # of earlier versions
    "--no-tensorboard",
}
"""Options that do not belong to a command."""
OF_PYTHON = {"topics.py"}
"""Modules of Python's own library."""
FORMATS = {"model.safetensors", "model.embed_tokens", "model.layers", "model.norm", "evaluation.json"}
"""Names of files and tensors that look like fields of the config."""


def texts(path):
    """Every string of a file, docstrings included; what an f-string fills in is an X."""
    tree, parts = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= set(map(id, node.values))
            yield "".join(value.value if isinstance(value, ast.Constant) else "X" for value in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def fields(cls, before=""):
    """The dotted names of all fields of a config."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield before + field.name
        for kind in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(kind):
                yield from fields(kind, f"{before}{field.name}.")


def by_file(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def options():
    """The options of the commands, and those that the scripts declare for themselves."""
    said = {text for path in FILES if "experiments" in path.parts for text in texts(path)}
    of_scripts = {text for text in said if re.fullmatch("--[a-z-]+", text)}
    return of_scripts | OTHERS | {option for of in described_commands().values() for option in of.options}


@pytest.mark.parametrize("path", FILES, ids=by_file)
def test_options_exist(path, options):
    for text in texts(path):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*+(?:\.[a-z][\w-]*+)*+", text):
            assert option.endswith("-") or option.replace("_", "-") in options, f"there is no option {option}"


@pytest.mark.parametrize("path", FILES, ids=by_file)
def test_commands_and_stages_exist(path):
    for text in texts(path):
        for name, argument in re.findall(r"(?:`|^ +|^usage: )nla ([a-z_]+) ?([\w.]*)", text, re.M):
            assert name in COMMANDS, f"there is no command nla {name}"
            assert name != "stage" or argument in (*STAGES, "NAME", "X"), f"there is no stage {argument}"


@pytest.mark.parametrize("path", FILES, ids=by_file)
def test_fields_of_the_config_exist(path):
    modules = {".".join(module.with_suffix("").parts[-2:]) for module in (ROOT / "nla_jax").rglob("*.py")}
    known = {*fields(ExperimentConfig), *modules}
    heads = {name.partition(".")[0] for name in fields(ExperimentConfig) if "." in name}
    # Fields of the sidecar have names of their own below `extraction`.
    if path.name in ("sidecar.py", "meta.py"):
        heads.remove("extraction")
    for text in texts(path):
        for name in re.findall(rf"(?<![\w./])(?:{'|'.join(heads)})(?:\.[a-z_]+)++(?![\w(/-])", text):
            if not any(name.startswith(known_name) for known_name in FORMATS):
                assert name in known, f"the config has no field {name}"


@pytest.mark.parametrize("path", FILES, ids=by_file)
def test_modules_exist(path):
    for text in texts(path):
        for name in re.findall(r"(?<![\w/*{}.])(?:\w+/)*\w+\.py\b", text):
            places = (ROOT, *(ROOT / folder for folder in FOLDERS), path.parent)
            found = name in OF_PYTHON or any((place / name).exists() for place in places)
            assert found, f"there is no {name}"
