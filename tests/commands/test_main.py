import importlib
import os
import subprocess
import sys

import pytest
from processes import ROOT

from nla_jax.__main__ import COMMANDS, main
from nla_jax.commands import evaluate, plain_errors, stage
from nla_jax.commands.experiment import parse
from nla_jax.pipeline.stages import STAGE_NAMES

# The others measure the library, or write what was measured.
SCRIPTS = [
    path
    for path in sorted((ROOT / "experiments").glob("*.py"))
    if "benchmark" not in path.name and path.name != "write_figures.py"
]
TINY = str(ROOT / "configs" / "tiny.py")


def test_the_help_names_every_command_and_imports_nothing_that_takes_long():
    program = (
        "import sys\n"
        "from nla_jax.__main__ import main\n"
        "main(['--help'])\n"
        "heavy = {'jax', 'numpy', 'flax', 'transformers', 'tyro', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name, line in COMMANDS.items():
        assert f"  {name:11} {line}\n" in done.stdout


@pytest.mark.parametrize("name", ["train", "stage", "evaluate"])
def test_help_without_docstrings_says_nothing_of_none(name):
    """Python -OO takes docstrings away, and with them the descriptions of the commands."""
    command = [sys.executable, "-OO", "-m", "nla_jax", name, "--help"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"usage: nla {name}") and "None" not in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    command = importlib.import_module(f"nla_jax.commands.{name}")
    try:
        command.main(["--help"])
    except SystemExit as stop:
        assert stop.code in (0, None)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(f"usage: nla {name} ")
    assert command.__doc__.splitlines()[0] in printed


def test_an_unknown_command_is_named_with_one_like_it(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["trian", "tiny"])
    assert stop.value.code == 2
    assert "there is no command 'trian'; did you mean train?" in capsys.readouterr().err


def test_the_stages_are_those_of_a_run():
    assert tuple(stage.STAGES) == STAGE_NAMES


def test_an_unknown_stage_is_named_with_those_that_are(capsys):
    with pytest.raises(SystemExit) as stop:
        stage.main(["sft", "tiny"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "there is no stage 'sft'" in message and all(f"\n  {name} " in message for name in STAGE_NAMES)


def test_a_text_given_to_the_writers_stage_is_led_to_the_command_that_explains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="there is no config 'some text'.*`nla explain DIRECTORY TEXT`"):
        stage.main(["explain", "some text"])
    with pytest.raises(SystemExit, match=r"config file mine\.py does not exist"):
        stage.main(["explain", "mine.py"])


@pytest.mark.parametrize(
    ("given", "suites"),
    [
        (["--suite", "all"], ("all",)),
        (["--suite=all"], ("all",)),
        (["--suite", "prediction", "cost", "--seed", "3"], ("prediction", "cost")),
        (["--suite=prediction", "cost"], ("prediction", "cost")),
        (["--evaluation.suites", "cost"], ("cost",)),
    ],
)
def test_suites_are_chosen_with_or_without_an_equals_sign(given, suites, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        evaluate.experiment, "run", lambda arguments, **named: seen.update(named, arguments=arguments)
    )
    evaluate.main([TINY, *given])
    config, _ = parse(seen["arguments"], seen["program"])
    assert config.evaluation.suites == suites
    assert seen["stages"] == ("evaluate", "report")


@pytest.mark.parametrize("option", [("--av", "nowhere"), ("--av=nowhere",)])
def test_models_without_a_run_need_their_own_options(option, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(list(option))
    assert stop.value.code == 2
    assert "the following arguments are required: --ar, --target, --data, --out" in capsys.readouterr().err


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_every_script_is_a_cover_of_a_command(script):
    assert len((ROOT / "experiments" / script).read_text().splitlines()) < 15
    command = [sys.executable, str(ROOT / "experiments" / script), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("usage: nla "), done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "foo://a/run"),
        ("train", TINY, "--run-dir", "foo://a/run"),
        ("train", TINY, "--model.path", "foo://a/run"),
        ("stage", "explain", "foo://a/run"),
        ("evaluate", "foo://a/run"),
        ("evaluate", "--av", "a", "--ar", "b", "--target", "c", "--data", "foo://a/run", "--out", "d"),
        ("explain", "foo://a/run", "text"),
        ("explain", "demo", "--file", "foo://a/run"),
        ("compare", "foo://a/run", "foo://a/run"),
        ("convert", "foo://a/run", "exported"),
        ("inspect", "foo://a/run"),
        ("plan", "foo://a/run", "--devices", "1"),
        ("plan", TINY, "--devices", "1", "--held", "--model.path", "foo://a/run"),
    ],
)
def test_an_address_of_an_unknown_kind_is_refused_before_anything_is_made(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    said = f"{stop.value.code} {capsys.readouterr().err}"
    assert "foo://a/run has the scheme foo://, and only file://, gs://, s3:// can be read" in said
    assert not list(tmp_path.glob("*foo*"))


def test_the_error_of_an_object_store_is_one_line():
    class HttpError(Exception):
        """As gcsfs raises it; its package need not be here."""

    HttpError.__module__ = "gcsfs.retry"
    with pytest.raises(SystemExit, match="error: the object store refused: Anonymous caller"), plain_errors():
        raise HttpError("Anonymous caller does not have storage.objects.get access")
    HttpError.__module__ = "elsewhere"
    with pytest.raises(HttpError), plain_errors():
        raise HttpError
