"""What comes with the library beside its code, in a checkout and in an installed wheel: configs and trained adapters.

nla_jax/configs and nla_jax/demo are links into the checkout's configs/ and experiments/adapters/; a wheel holds copies
in their places.
"""

import importlib.metadata
import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def version() -> str:
    """The installed version of the library, as in "0.1.0"; "not installed" where it is only on the path."""
    try:
        return importlib.metadata.version("nla_jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def shipped_configs() -> dict[str, Path]:
    """The files of the configs that come with the library, by their names in alphabetical order."""
    folder = _there("configs", "configs")
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def find_config(name: str | Path) -> Path:
    """The file of a config: `name` itself if it is the path of a file, else the shipped config of that name.

    Raises:
      FileNotFoundError: neither is there.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    if str(name) in shipped:
        return shipped[str(name)]
    path, hint = Path(name), ""
    if path.stem in shipped:
        hint = f"; {path.stem} alone is one of them"
    elif beside := sorted(str(other) for other in path.parent.glob("*.py")):
        hint = f"; beside it there are: {', '.join(beside)}"
    raise FileNotFoundError(
        f"config file {name} does not exist; give a Python file with get_config(), the directory of a run, or the "
        f"name of a config that comes with the library: {', '.join(shipped)}{hint}"
    )


def demo_directory() -> Path:
    """The directory of the trained adapters that come with the library, for SmolLM2-135M-Instruct: av/ and ar/ in it.

    Raises:
      FileNotFoundError: the installation lacks them.
    """
    directory = _there("demo", "experiments/adapters/smollm2_135m")
    if not (directory / "av" / "nla_meta.yaml").is_file():
        raise FileNotFoundError(
            f"{directory} does not hold the adapters that come with the library; install it again"
        )
    return directory


def _there(name: str, in_checkout: str) -> Path:
    """A folder of the package; a checkout on a system without links has it elsewhere."""
    inside = _PACKAGE / name
    return inside.resolve() if inside.is_dir() else _PACKAGE.parent / in_checkout


def git_commit() -> str:
    """The commit that the library runs from; empty outside a checkout.

    A repository around an installed copy, such as that of a project with a virtual environment in it, is not the
    library's: only one that tracks this very file answers.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return ""
