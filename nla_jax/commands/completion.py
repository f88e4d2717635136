"""Print a script that completes commands, their options, stages, and configs that come with the library.

bash    nla completion bash > ~/.local/share/bash-completion/completions/nla
zsh     nla completion zsh > ~/.nla-completion.zsh, and in ~/.zshrc: source ~/.nla-completion.zsh
fish    nla completion fish > ~/.config/fish/completions/nla.fish
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import re
from collections.abc import Iterator
from typing import Any

from nla_jax.commands import COMMANDS
from nla_jax.commands.data import ACTIONS
from nla_jax.commands.stage import STAGES
from nla_jax.shipped import shipped_configs

_ON_CONFIGS = ("train", "stage", "evaluate", "plan", "data")
"""The commands whose options include every field of a config."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What may follow a command."""

    help: str
    """One line."""
    names: list[str]
    """Words, besides paths."""
    options: list[str]
    """With their dashes."""


def main(arguments: list[str]) -> None:
    """Parse the command line and print the script."""
    parser = argparse.ArgumentParser(
        prog="nla completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=_SCRIPTS)
    args = parser.parse_args(arguments)
    print(_SCRIPTS[args.shell](commands()))


def commands() -> dict[str, Command]:
    """All commands by name; their options are read off their own help."""
    from nla_jax.config import ExperimentConfig

    fields, configs = list(field_options(ExperimentConfig("any"))), list(shipped_configs())
    names = dict.fromkeys(_ON_CONFIGS, configs) | {"stage": [*STAGES, *configs], "completion": list(_SCRIPTS)}
    names["data"] = [*ACTIONS, *configs]

    def options(name: str) -> list[str]:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            importlib.import_module(f"nla_jax.commands.{name}").main(["--help"])
        own = re.findall(r"(?<![\w-])--[a-z][a-z-]*\b(?!\.)", printed.getvalue())
        return sorted({"--help", *own, *(fields if name in _ON_CONFIGS else ())})

    return {name: Command(line, names.get(name, []), options(name)) for name, line in COMMANDS.items()}


def field_options(config: Any, prefix: str = "") -> Iterator[str]:
    """The options that set a config's fields, by their dotted names: --rl.loop.steps, and --no-... for truth values."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from field_options(value, f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}"
            if isinstance(value, bool):
                yield f"--{prefix}no-{name}"


def _bash(known: dict[str, Command]) -> str:
    cases = "\n".join(
        f'    {name}) names="{" ".join(command.names)}"; options="{" ".join(command.options)}" ;;'
        for name, command in known.items()
    )
    return f"""_nla() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" names="" options="--help --version"
  if [ "$COMP_CWORD" -eq 1 ]; then
    names="{" ".join(known)}"
  else
    options=""
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  case "$current" in
    -*) COMPREPLY=( $(compgen -W "$options" -- "$current") ) ;;
    *) COMPREPLY=( $(compgen -W "$names" -- "$current") ) ;;
  esac
}}
complete -o default -F _nla nla"""


def _zsh(known: dict[str, Command]) -> str:
    return f"autoload -Uz compinit bashcompinit\ncompinit\nbashcompinit\n{_bash(known)}"


def _fish(known: dict[str, Command]) -> str:
    lines = []
    for name, command in known.items():
        line = command.help.replace("'", "\\'")
        lines.append(f"complete -c nla -n __fish_use_subcommand -f -a {name} -d '{line}'")
        after = f"complete -c nla -n '__fish_seen_subcommand_from {name}'"
        if command.names:
            lines.append(f"{after} -a '{' '.join(command.names)}'")
        lines += [f"{after} -l {option.removeprefix('--')}" for option in command.options]
    return "\n".join(lines)


_SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
