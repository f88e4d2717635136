"""Commands in the documentation name scripts that exist and fields that configs have."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from processes import ROOT

from nla_jax.pipeline.command_line import parse

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {path.name: path.read_text() for path in (ROOT / "experiments").glob("*.py")}
STAGE_SCRIPTS = [name for name, text in SCRIPTS.items() if "nla_jax.cli import main" in text]
PLACE = r"--distributed( [\w.\-]+:\d+,\d+,[\w$]+)?"


def commands(text: str) -> list[list[str]]:
    """Script and arguments of every call of a script in experiments/."""
    text = text.replace("\\\n", " ")
    return [
        shlex.split(f"{script} {rest}")
        for script, rest in re.findall(r"experiments/(\w+\.py)([^\n`\"&|)#]*)", text)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_exist(page):
    for script, *_ in commands(page.read_text()):
        assert script in SCRIPTS, script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for script, *arguments in commands(re.sub(PLACE, "", page.read_text())):
        if script in STAGE_SCRIPTS and arguments and arguments[0].startswith("configs/"):
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            config, run_dir = parse("", arguments)
            assert config.name and isinstance(run_dir, Path)


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
