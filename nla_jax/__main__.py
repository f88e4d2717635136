"""The command `nla`, which is also `python -m nla_jax` and what the scripts in experiments/ start.

It knows the commands' names and one line about each (`nla_jax.commands`); the rest is imported once the command is
known.
"""

import difflib
import importlib
import sys

from nla_jax.commands import COMMANDS
from nla_jax.commands.startup import silence_libtpu, use_huge_pages

_COMPUTE = ("train", "stage", "evaluate")
"""Those that run for hours, for which a restart with a better allocator pays."""

_USAGE = f"""usage: nla COMMAND [ARGUMENTS ...]

Natural Language Autoencoders: explain a language model's activations in plain text, and check the text.

commands:
{chr(10).join(f"  {name:11} {line}" for name, line in COMMANDS.items())}

`nla COMMAND --help` tells what a command takes; `nla --version` prints the library's version. A run on any machine:

  nla train smollm2_135m_cpu
  nla explain runs/smollm2_135m_cpu "The Eiffel Tower stands in the city of\""""


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the first of the arguments names, by default of the process's arguments.

    Raises:
      SystemExit: with status 2, no command or an unknown one; or what the command exits with.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help", "help"):
        print(_USAGE)
        return
    if name == "--version":
        from nla_jax.shipped import version

        print(f"nla_jax {version()}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        known = f"nla: there is no command {name!r}{meant}\n\n" if name else ""
        print(known + _USAGE, file=sys.stderr)
        raise SystemExit(2)
    if name in _COMPUTE:
        use_huge_pages()
    silence_libtpu()
    importlib.import_module(f"nla_jax.commands.{name}").main(rest)


if __name__ == "__main__":
    main()
