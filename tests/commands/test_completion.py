import subprocess

import pytest
from processes import ROOT

from nla_jax.commands import completion


@pytest.fixture(scope="module")
def known():
    return completion.commands()


def test_options_are_those_of_the_commands(known):
    assert {"--help", "--av", "--position", "--samples", "--json"} <= set(known["explain"].options)
    assert {"--topology", "--explore", "--rl.loop.steps"} <= set(known["plan"].options)
    train = set(known["train"].options)
    assert {"--run-dir", "--distributed", "--templates.chat", "--templates.no-chat", "--seed"} <= train
    assert not [name for name in train if name.endswith((".", "-"))]
    assert known["stage"].names[:2] == ["extract", "explain"] and "tiny" in known["train"].names
    assert known["compare"].names == [] and "--rl.loop.steps" not in known["compare"].options


def test_fields_are_options_that_the_command_line_takes(known, tmp_path):
    from nla_jax.commands.experiment import parse

    for option, value in (
        ("--rl.loop.steps", ["3"]),
        ("--templates.no-chat", []),
        ("--lora.base-dtype", ["bfloat16"]),
    ):
        assert option in known["train"].options
        parse([str(ROOT / "configs" / "tiny.py"), option, *value], "nla train")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("nla com", {"compare", "completion"}),
        ("nla --v", {"--version"}),
        ("nla train smollm2_135m_c", {"smollm2_135m_cpu"}),
        ("nla train tiny --rl.loop.st", {"--rl.loop.steps"}),
        ("nla stage rl smollm2_135m_g", {"smollm2_135m_gpu"}),
        ("nla stage av", {"av_sft"}),
        ("nla explain runs --sam", {"--samples"}),
        ("nla explain --rl", set()),
        ("nla nothing --r", set()),
    ],
)
def test_bash_offers_what_fits(typed, offered, capsys, tmp_path):
    completion.main(["bash"])
    words = typed.split(" ")
    ask = f"\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _nla; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", capsys.readouterr().out + ask], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert set(done.stdout.split()) == offered


def test_zsh_takes_the_functions_of_bash(known, capsys):
    completion.main(["zsh"])
    printed = capsys.readouterr().out
    completion.main(["bash"])
    assert printed == "autoload -Uz compinit bashcompinit\ncompinit\nbashcompinit\n" + capsys.readouterr().out


def test_fish_has_a_line_for_each_option(known, capsys):
    completion.main(["fish"])
    lines = capsys.readouterr().out.splitlines()
    assert "complete -c nla -n '__fish_seen_subcommand_from train' -l rl.loop.steps" in lines
    assert len([line for line in lines if " -n __fish_use_subcommand " in line]) == len(known)
    assert r"-f -a convert -d 'export a run\'s models, merged or as adapters'" in "\n".join(lines)
    assert all(line.replace(r"\'", "").count("'") % 2 == 0 for line in lines)
