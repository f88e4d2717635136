"""Commands in the documentation name scripts and commands that exist, and fields that configs have."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from processes import ROOT

from nla_jax.__main__ import COMMANDS
from nla_jax.commands.experiment import parse
from nla_jax.commands.stage import STAGES
from nla_jax.shipped import find_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {path.name: path.read_text() for path in (ROOT / "experiments").glob("*.py")}
STARTED = {
    name: re.findall(r'"(\w+)"', "".join(re.findall(r"main\(\[(.*), \*sys", text)))
    for name, text in SCRIPTS.items()
}
"""What a script starts: the words that stand before its own arguments, as in ["stage", "rl"]."""
PLACE = r"--distributed( [\w.\-]+:\d+,\d+,[\w$]+)?"


def commands(text: str) -> list[list[str]]:
    """Script and arguments of every call of a script in experiments/."""
    text = text.replace("\\\n", " ")
    return [
        shlex.split(f"{script} {rest}")
        for script, rest in re.findall(r"experiments/(\w+\.py)([^\n`\"&|)#]*)", text)
    ]


def nla_commands(text: str) -> list[list[str]]:
    """Arguments of every call of `nla`, and those of the scripts as if `nla` had been called."""
    called = re.findall(r"(?:^ *|`|/|&& |; )nla ([a-z]+\b[^\n`\"&|)#]*)", text.replace("\\\n", " "), re.M)
    scripts = (STARTED[script] + arguments for script, *arguments in commands(text) if STARTED[script])
    return [*map(shlex.split, called), *scripts]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_commands_exist(page):
    for script, *_ in commands(page.read_text()):
        assert script in SCRIPTS, script
    for name, *arguments in nla_commands(page.read_text()):
        assert name in COMMANDS, name
        assert name != "stage" or arguments[0] in (*STAGES, "NAME"), arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, *arguments in nla_commands(re.sub(PLACE, "", page.read_text())):
        if name == "stage":
            arguments = arguments[1:]
        if name in ("train", "stage", "evaluate") and arguments and is_config(arguments[0]):
            config, run_dir = parse(arguments, f"nla {name}")
            assert config.name and isinstance(run_dir, Path)


def is_config(argument: str) -> bool:
    try:
        return find_config(argument).is_file()
    except FileNotFoundError:
        assert not argument.startswith("configs/"), argument
        return False


def test_the_jobset_is_one_and_gives_every_process_its_place():
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.S)
    job = yaml.safe_load(block)
    assert job["kind"] == "JobSet"
    (worker,) = job["spec"]["replicatedJobs"]
    spec = worker["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    ((script, *arguments),) = commands(container["args"][0])
    assert script == "train_nla.py" and spec["completionMode"] == "Indexed"
    place = arguments[arguments.index("--distributed") + 1]
    name = f"{job['metadata']['name']}-{worker['name']}-0-0.{job['metadata']['name']}"
    assert place == f"{name}:1234,{spec['completions']},$JOB_COMPLETION_INDEX"
