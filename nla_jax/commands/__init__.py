"""The commands behind `nla`: a module each, whose `main(arguments)` reads what stands after the command's name.

This file and `nla_jax.__main__` import next to nothing, so that the help and a restart of the process are quick.
"""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn the errors that a wrong input raises into one line on stderr, "error: MESSAGE", and exit status 1.

    Raises:
      SystemExit: the block raised ValueError, OSError, RuntimeError or ModuleNotFoundError.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
