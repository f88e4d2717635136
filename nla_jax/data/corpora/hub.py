"""Corpora on the Hugging Face hub, streamed: the package `datasets` behind the sources that begin with `hf:`."""

import re
from collections.abc import Iterator
from typing import Any

_FORM = "hf:NAME[:CONFIG][:SPLIT] or hf:ORG/NAME/CONFIG[:SPLIT]"


def parse_hub_source(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split that `hf:NAME[:CONFIG][:SPLIT]` says; colons in brackets belong to the split.

    The configuration may also follow the name after a slash, as in `hf:ORG/NAME/CONFIG`; paths that begin with a slash
    or a dot are folders on this machine and are left whole.

    Raises:
      ValueError: more or fewer parts, or an empty one.
    """
    name, *parts = re.split(r":(?![^\[]*\])", source.removeprefix("hf:"))
    config = None
    if name.count("/") == 2 and not name.startswith(("/", ".")):
        name, _, config = name.rpartition("/")
        parts = [config, *parts] if parts else [config, "train"]
    if not name or len(parts) > 2 or not all(parts) or (config is not None and not config):
        raise ValueError(
            f"corpus {source!r} is not of the form {_FORM}; for instance hf:ORG/NAME, hf:ORG/NAME:test, "
            "hf:ORG/NAME:CONFIG:train or hf:ORG/NAME:train[:1%]"
        )
    split = parts.pop() if parts else "train"
    return name, parts[0] if parts else None, split


def is_streamed(source: str) -> bool:
    """Whether the rows of a source are streamed: parts of splits, such as train[:1%], cannot be."""
    return re.fullmatch(r"[\w.-]+", parse_hub_source(source)[2]) is not None


def hub_rows(source: str, *, seed: int, shuffle_buffer: int) -> Iterator[tuple[str, Any]]:
    """Yield the place, for messages, and the row for all rows of a data set.

    A whole split is streamed and never downloaded: its files come in an order that the seed decides, and its rows
    through a buffer of `shuffle_buffer` rows from which the seed draws. A part of a split is downloaded.

    Args:
      source: see `parse_hub_source`.
      seed: seed of the order of a stream.
      shuffle_buffer: rows that a stream is shuffled among; 0 keeps the order of the data set.

    Raises:
      ModuleNotFoundError: the package `datasets` is not installed.
      ValueError: there is no such data set, configuration or split, or the hub cannot be reached.
    """
    name, config, split = parse_hub_source(source)
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"corpus {source!r} needs the optional package `datasets`; run `pip install datasets`, or give a "
            "local file or 'docstrings'"
        ) from error
    streaming = is_streamed(source)
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"corpus {source!r} cannot be loaded: {error}; {_remedy(name, config, split, error)}"
        ) from error
    if streaming and shuffle_buffer > 1:
        rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{source}, row {number}", row
    except OSError as error:
        raise ValueError(
            f"corpus {source!r} broke off after {number} rows: {error}; run the same command again when the hub can be "
            "reached"
        ) from error


def _remedy(name: str, config: str | None, split: str, error: Exception) -> str:
    """What to do about a data set that cannot be loaded."""
    import datasets

    if isinstance(error, OSError):
        return (
            "look whether the name is right and the hub can be reached, and log in with `hf auth login` where the data "
            "set asks for it"
        )
    try:
        is_config = config is None and split in datasets.get_dataset_config_names(name)
    except (ValueError, OSError):
        is_config = False
    if is_config:
        return f"{split!r} is a configuration: write hf:{name}:{split}:SPLIT, for instance with split train"
    return "write hf:NAME[:CONFIG][:SPLIT] with a configuration and a split that the data set has"
