"""Commands in the documentation name commands, options and fields that exist, and links lead somewhere."""

import ast
import importlib
import re
import shlex
from pathlib import Path, PurePath

import pytest
import yaml
from processes import ROOT

from nla_jax.__main__ import COMMANDS
from nla_jax.commands.completion import commands as described_commands
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
OTHERS = {"--xla-cpu-enable-concurrency-optimized-scheduler"}
"""Options of other programs that the documentation names."""
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
        assert name != "stage" or not arguments or arguments[0] in (*STAGES, "NAME"), arguments


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of each command, as its help lists them, fields of a config included."""
    return {name: set(command.options) for name, command in described_commands().items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_commands_are_in_their_help(page, options):
    for name, *arguments in nla_commands(page.read_text()):
        for option in named_options(arguments):
            # A command that takes a config has every field of it as an option.
            assert option in options[name], f"nla {name} has no option {option}"
    for script, *arguments in commands(page.read_text()):
        for option in named_options(arguments) if not STARTED[script] else ():
            assert f'"{option}"' in SCRIPTS[script], f"{script} has no option {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_named_in_prose_belong_to_some_command(page, options):
    of_scripts = set(re.findall(r'"(--[a-z][a-z-]*)"', "".join(SCRIPTS.values())))
    known = {option for own in options.values() for option in own} | of_scripts | OTHERS
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for span in re.findall(r"`(--[^`]+)`", prose):
        for option in named_options(span.split()):
            assert option in known, f"{page.name} names {option}, which no command has"


def named_options(arguments: list[str]) -> list[str]:
    """The options among arguments, without values and with dashes where tyro takes underscores as well."""
    named = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    return [option.replace("_", "-") for option in named if option != "--FIELD"]


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```|`[^`]*`", "", page.read_text(), flags=re.M | re.S)
    for link in LINK.findall(prose):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, section = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}, which is not there"
        if section:
            assert section in sections(target), f"{page.name} links to {link}, which has no such heading"


def sections(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    linked = {link.partition("#")[0] for link in LINK.findall(index)}
    kinds = (".md", ".ipynb")
    pages = {path.name for path in (ROOT / "docs").iterdir() if path.suffix in kinds} - {"README.md"}
    assert pages <= linked, pages - linked


def test_every_room_of_the_code_is_described():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "nla_jax").glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}/`" not in page} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_in_python_examples_exist(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "nla_jax":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_checkout_that_are_named_exist(page):
    text = page.read_text()
    for path in re.findall(r"`((?:nla_jax|configs|experiments|tests|docs)/[\w./]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_exist(page, bucket, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, *arguments in nla_commands(re.sub(PLACE, "", page.read_text())):
        if name == "stage":
            arguments = arguments[1:]
        arguments = [argument for argument in arguments if argument != "--help"]
        if name in ("train", "stage", "evaluate") and arguments and is_config(arguments[0]):
            config, run_dir = parse(arguments, f"nla {name}")
            assert config.name and isinstance(run_dir, PurePath)


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
    ((command, *arguments),) = nla_commands(container["args"][0])
    assert command == "train" and spec["completionMode"] == "Indexed"
    place = arguments[arguments.index("--distributed") + 1]
    name = f"{job['metadata']['name']}-{worker['name']}-0-0.{job['metadata']['name']}"
    assert place == f"{name}:1234,{spec['completions']},$JOB_COMPLETION_INDEX"
