"""What the library's messages tell their reader to run exists for every reader, in a checkout or not."""

import re
from pathlib import Path

import pytest
from processes import ROOT

from nla_jax.__main__ import COMMANDS

SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "nla_jax").rglob("*.py"))}
INSTALLED_BY_NAME = {"datasets", "jax[tpu]", "py3langid", "rensa", "tensorboardX", "trackio", "wandb"}
"""Packages on the public registry that messages name; nla_jax itself is not there."""


@pytest.mark.parametrize("path", SOURCES)
def test_nothing_is_installed_but_what_is_known(path):
    for name in re.findall(r"pip install (?:--[\w-]+ )*[`']?([^\s`'\",;)]+)", SOURCES[path]):
        known = name.split("==")[0].rstrip(".") in INSTALLED_BY_NAME
        # A placeholder is the package that the reader's own config named.
        assert known or name.startswith("{"), f"{path} says pip install {name}"


@pytest.mark.parametrize("path", SOURCES)
def test_no_script_of_the_checkout_is_named(path):
    assert not re.findall(r"experiments/\w+\.py", SOURCES[path])
    scripts = {script.name for script in (ROOT / "experiments").glob("*.py")} - {Path(path).name}
    strings = re.findall(r"\"[^\"\n]*\"", SOURCES[path])
    named = {name for string in strings for name in re.findall(r"\b\w+\.py\b", string)} & scripts
    assert named <= ({"verbalize.py"} if path == "nla_jax/commands/stage.py" else set())


@pytest.mark.parametrize("path", SOURCES)
def test_options_of_one_command_are_not_in_messages_of_others(path):
    assert "--suite" not in SOURCES[path] or path == "nla_jax/commands/evaluate.py"


def test_commands_in_messages_exist():
    named = {name for text in SOURCES.values() for name in re.findall(r"[`\n ]nla ([a-z]+)\b(?! is)", text)}
    assert named and named <= set(COMMANDS)
