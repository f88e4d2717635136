"""Files and folders, here and in buckets: where a name leads, and files that are there whole or not at all.

A name with `gs://` or `s3://` leads into a bucket of an object store, and its path is an `etils.epath.Path`; every
other name leads to a `pathlib.Path`. The two have the same methods, but a bucket has no folders of its own, no renames
and no files that grow, and what maps a file into memory needs it here. The functions of this module hide these
differences.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from etils import epath

    AnyPath: TypeAlias = Path | epath.Path
else:
    # Both are of this class, and importing etils takes a tenth of a second, which most commands need not spend.
    AnyPath: TypeAlias = PurePath

Place: TypeAlias = str | os.PathLike[str]
"""What users give for a file or folder."""

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
"""Scheme of an object store -> the package through which it is reached."""
SECONDS_BETWEEN_UPLOADS = 60.0
"""How often a file that grows is written anew where nothing can be appended."""


def as_path(place: Place) -> AnyPath:
    """The path that a name means: in a bucket for `gs://` and `s3://`, else here; `~` is the home directory.

    Args:
      place: a path, `file:///PATH`, `gs://BUCKET/PATH` or `s3://BUCKET/PATH`.

    Raises:
      ValueError: another scheme; an address without a bucket, or with a wildcard; or a `pathlib.Path` of an address.
      ModuleNotFoundError: the package that reaches the object store is not installed.
    """
    text = os.fspath(place)
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(//?)(.*)", text, re.DOTALL)
    known = ("file", *PACKAGES)
    if found is None or (found[2] == "/" and found[1] not in known):
        return Path(place).expanduser()
    scheme, slashes, rest = found.groups()
    if slashes == "/":
        raise ValueError(
            f"{text!r} has one slash after {scheme}: where an address has two, as a pathlib.Path of an address does; "
            f"give the address as text, {scheme}://{rest}"
        )
    if scheme not in known:
        raise ValueError(
            f"{text} has the scheme {scheme}://, and only {', '.join(f'{name}://' for name in known)} can be read and "
            "written; give one of these, or a path on this machine"
        )
    if scheme == "file":
        if not rest.startswith("/"):
            raise ValueError(f"{text} names no absolute path; write file:///PATH, or the path alone")
        return Path(rest)
    if not rest.strip("/") or rest.startswith("/"):
        raise ValueError(f"{text} names no bucket; write {scheme}://BUCKET/PATH")
    if found := re.search(r"[*?[\]#]", rest):
        raise ValueError(
            f"{text} contains {found[0]!r}, which listings of a bucket misread; give another address"
        )
    _connect(scheme, text)
    from etils import epath

    return epath.Path(text)


def _connect(scheme: str, text: str) -> None:
    """Make sure that an object store can be reached, and that what other processes write into it is seen."""
    import fsspec

    for name in ("gcs", "s3"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = PACKAGES[scheme]
        raise ModuleNotFoundError(
            f"{text} needs the package {package}: pip install {package}", name=package
        ) from error


def in_bucket(path: AnyPath) -> bool:
    """Whether a path of `as_path` leads into a bucket."""
    return not isinstance(path, Path)


def absolute(path: AnyPath) -> AnyPath:
    """The path from the root on, for messages and for other processes; an address is one already."""
    return path.absolute() if isinstance(path, Path) else path


@contextlib.contextmanager
def write_atomically(place: Place) -> Iterator[Path]:
    """Yield the path of a temporary file here, which becomes `place` when the block ends.

    Here the temporary file lies beside `place` and is renamed; into a bucket it is uploaded, and the object store shows
    no object before it is whole. A block that raises leaves `place` as it was and nothing beside it.

    Raises:
      OSError: the disk is full; the message tells what to do.
    """
    path = as_path(place)
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (temporary := Path(folder) / path.name)
            upload(temporary, path)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"the disk is full and does not hold {path}; free some space and start the same command again: what is "
            "finished stays, and it goes on from there",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(place: Place, text: str) -> None:
    """Write a text as UTF-8, atomically; half of a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    with write_atomically(place) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")


def write_json(path: AnyPath, value: Any) -> None:
    """Write a value as JSON, atomically; only the first of several processes writes."""
    import jax

    if jax.process_index() > 0:
        return
    write_text(path, json.dumps(value, indent=1))


@contextlib.contextmanager
def local_copy(place: Place) -> Iterator[Path]:
    """Yield the path of a file on this machine: the file itself, or a copy of an object that is gone after the block.

    Raises:
      FileNotFoundError: there is no such object.
    """
    path = as_path(place)
    if not in_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        download(path, copy := Path(folder) / path.name)
        yield copy


@contextlib.contextmanager
def changing_copy(place: Place) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yield the path of a file here that is changed in place, such as a database, and a function to call at changes.

    The file is `place` itself, or the copy of an object, which is missing if there is none yet. A copy is uploaded at a
    change if a minute has passed since it last was, and when the block ends, even by an error.
    """
    path = as_path(place)
    if not in_bucket(path):
        yield path, lambda: None
        return
    with tempfile.TemporaryDirectory() as folder:
        copy, uploaded = Path(folder) / path.name, time.monotonic()
        if path.exists():
            download(path, copy)

        def changed() -> None:
            nonlocal uploaded
            if time.monotonic() - uploaded > SECONDS_BETWEEN_UPLOADS:
                upload(copy, path)
                uploaded = time.monotonic()

        try:
            yield copy, changed
        finally:
            if copy.exists():
                upload(copy, path)


@contextlib.contextmanager
def local_folder(place: Place) -> Iterator[Path]:
    """Yield a folder on this machine to write into: the folder itself, made if need be, or one that is uploaded.

    A block that raises uploads nothing.
    """
    path = as_path(place)
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                upload(file, path / file.relative_to(folder).as_posix())


def download(path: AnyPath, file: Path) -> None:
    """Copy an object to a file here.

    Raises:
      FileNotFoundError: there is no such object.
    """
    import fsspec

    store, key = fsspec.url_to_fs(str(path))
    try:
        store.get_file(key, str(file))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no object {path}") from error


def fingerprint(path: AnyPath) -> str:
    """A text that changes whenever a file here or an object is replaced."""
    if isinstance(path, Path):
        stat = path.stat()
        return f"{stat.st_size} bytes at {stat.st_mtime_ns}"
    import fsspec

    store, key = fsspec.url_to_fs(str(path))
    return store.ukey(key)


def upload(file: Path, path: AnyPath) -> None:
    """Copy a file from here to an object, which is replaced when all of it has arrived."""
    import fsspec

    store, key = fsspec.url_to_fs(str(path))
    store.put_file(str(file), key)


class GrowingFile:
    """A text file that grows by lines and is never behind by more than a minute.

    Here a line is in the file at once. An object in a bucket cannot grow, so lines are kept in memory, and the object
    is written anew once a minute and on `flush`.
    """

    def __init__(self, path: AnyPath):
        self.path = path
        self._kept: list[str] = []
        self._flushed = time.monotonic()

    def append(self, line: str) -> None:
        """Add one line; `line` has no line break at its end."""
        if isinstance(self.path, Path):
            with self.path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"{line}\n")
            return
        self._kept.append(f"{line}\n")
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def flush(self) -> None:
        """Write the lines that are kept in memory, if any."""
        if self._kept:
            self.write(self.read() + "".join(self._kept))
        self._flushed = time.monotonic()

    def read(self) -> str:
        """What the file holds, without the lines in memory; empty where there is none."""
        return self.path.read_bytes().decode("utf-8") if self.path.exists() else ""

    def write(self, text: str) -> None:
        """Replace all of the file, and drop what is kept in memory."""
        write_text(self.path, text)
        self._kept = []


def remove_folder(path: AnyPath) -> None:
    """Delete a folder with all that is in it, as far as possible."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.rmtree()
