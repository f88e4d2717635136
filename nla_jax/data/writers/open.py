"""The protocol of writers of warm-start texts, and the writer that a config names."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from nla_jax import text_analysis
from nla_jax.chat.models import open_chat_model
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.stage_texts import holds_a_tag
from nla_jax.data.writers.chat import ChatWriter
from nla_jax.data.writers.column import ColumnWriter
from nla_jax.data.writers.config import WriterConfig
from nla_jax.data.writers.descriptive import DescriptiveWriter
from nla_jax.data.writers.predictive import PredictiveWriter
from nla_jax.data.writers.reports import Tally
from nla_jax.data.writers.word_counts import Split, WordCounts, long_words
from nla_jax.files import AnyPath


@runtime_checkable
class Writer(Protocol):
    """Whatever writes the texts that warm starts learn from. The text of a row does not depend on the other rows."""

    def explain(self, rows: ActivationDataset) -> list[str | None]:
        """One text for each row; None for a row without one, which is then left out of supervised training."""

    def prompts(self, rows: ActivationDataset) -> list[str] | None:
        """What a chat model would be asked first about each row, for estimates; None where none is asked."""

    def about(self) -> dict[str, Any]:
        """Who writes, with names and digests of whatever decides the texts beside the config."""

    def report(self) -> dict[str, Any]:
        """`about`, and the numbers of all rows so far: see `Tally.report`."""


def open_writer(
    config: WriterConfig, *, seed: int, words: Callable[[Split], WordCounts], cache: AnyPath
) -> Writer:
    """Open the writer that a config names.

    Args:
      config: the writer's name and options.
      seed: of wording that varies.
      words: counts the words of all contexts, split by the function that it is given; it is called only for a writer
        that needs them.
      cache: SQLite file with the answers of chat models, made when the first is asked.

    Raises:
      ValueError: the writer lacks an option, or a class of the user's own cannot be used.
      ModuleNotFoundError: there is no module of the user's own class.
    """
    if config.name == "predictive":
        return PredictiveWriter(config.predictive, seed=seed, words=words(long_words))
    if config.name == "descriptive":
        return DescriptiveWriter(config.descriptive, seed=seed, words=words(text_analysis.words))
    if config.name == "chat":
        return ChatWriter(config.chat, lambda: open_chat_model(config.chat.chat, cache))
    if config.name == "column":
        return ColumnWriter(config.column)
    return OwnWriter(config, seed=seed)


class OwnWriter:
    """A writer of the user's own: a class with a method `explain(rows)`, made as CLASS(OPTIONS, seed=SEED).

    OPTIONS is the dictionary that `writer.options` holds as JSON. What the class returns is checked for its form alone.
    """

    def __init__(self, config: WriterConfig, *, seed: int):
        """Import the class and make its object; modules in the working directory are found.

        Raises:
          ModuleNotFoundError: there is no such module.
          ValueError: the module has no such class, the class has no `explain`, or it cannot be made.
        """
        self.name, self.tally = config.name, Tally()
        kind, options = _imported(config.name), config.own_options()
        if not callable(getattr(kind, "explain", None)):
            raise ValueError(
                f"the writer {config.name} has no method explain(rows); give it one that returns a text or None for "
                "each row, see data/writers/open.py"
            )
        try:
            self.writer = kind(options, seed=seed)
        except TypeError as error:
            raise ValueError(
                f"the writer {config.name} cannot be made as CLASS(OPTIONS, seed=SEED) ({error}); give it this "
                "signature, and the options that it needs with writer.options"
            ) from error

    def explain(self, rows: ActivationDataset) -> list[str | None]:
        """What the class writes, without blanks around it; blank texts count as None.

        Raises:
          ValueError: not one text or None for each row, or a text that holds an explanation tag.
        """
        written = list(self.writer.explain(rows))
        if len(written) != len(rows):
            raise ValueError(
                f"the writer {self.name} returned {len(written)} texts for {len(rows)} rows; return one "
                "for each, or None"
            )
        for row, text in enumerate(written):
            if text is not None and (not isinstance(text, str) or holds_a_tag(text)):
                raise ValueError(
                    f"the writer {self.name} returned {str(text)[:80]!r} of type {type(text).__name__} for row {row}; "
                    "return a text without <explanation> tags, or None"
                )
        texts = [(text or "").strip() or None for text in written]
        self.tally.refused["no text from the class"] += texts.count(None)
        self.tally.count(texts)
        return texts

    def prompts(self, rows: ActivationDataset) -> list[str] | None:
        """What the class says that it would ask; None where it has no such method."""
        asks = getattr(self.writer, "prompts", None)
        return None if asks is None else asks(rows)

    def about(self) -> dict[str, Any]:
        """The class's name, and what the class itself adds if it has a method of this name."""
        adds = getattr(self.writer, "about", dict)
        return {"writer": self.name, **adds()}

    def report(self) -> dict[str, Any]:
        """How many rows have a text."""
        return self.tally.report(**self.about())


def _imported(name: str) -> Any:
    module_name, _, class_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # The module is there, and needs another one.
        raise ModuleNotFoundError(
            f"the writer {name} needs the module {module_name}, which is neither installed nor in {os.getcwd()}; "
            "install it, or start the command in the folder that holds it",
            name=error.name,
        ) from error
    if not hasattr(module, class_name):
        raise ValueError(
            f"the module {module_name} has no class {class_name}; it has "
            f"{', '.join(key for key, value in vars(module).items() if isinstance(value, type)) or 'none'}"
        )
    return getattr(module, class_name)
