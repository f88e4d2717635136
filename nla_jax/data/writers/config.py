"""WriterConfig: who writes the texts that warm starts learn from, and with which options."""

import dataclasses
import json
import re
from typing import Any

from nla_jax.data.writers.chat import ChatWriterConfig
from nla_jax.data.writers.column import ColumnConfig
from nla_jax.data.writers.descriptive import DescriptiveConfig
from nla_jax.data.writers.predictive import PredictiveConfig

BUILT_IN = ("predictive", "descriptive", "chat", "column")
"""Names of the writers that come with the library."""


@dataclasses.dataclass(frozen=True)
class WriterConfig:
    """The writer of warm-start texts. Only the options of the writer that is named count."""

    name: str = "predictive"
    """`predictive` or `descriptive` (built in, ask no model), `chat` (a chat model writes), `column` (the data brings
    the texts), or MODULE:CLASS, a class of your own by its import path; see data/writers/open.py."""
    predictive: PredictiveConfig = PredictiveConfig()
    descriptive: DescriptiveConfig = DescriptiveConfig()
    chat: ChatWriterConfig = ChatWriterConfig()
    column: ColumnConfig = ColumnConfig()
    options: str = "{}"
    """A JSON object with the options of a class of your own, which is given them as a dictionary."""

    def __post_init__(self):
        if self.name not in BUILT_IN and not re.fullmatch(r"[\w.]+:\w+", self.name):
            raise ValueError(
                f"there is no writer {self.name!r}; writer.name is one of {', '.join(BUILT_IN)}, or MODULE:CLASS for a "
                "class of your own"
            )
        self.own_options()

    def own_options(self) -> dict[str, Any]:
        """The options of a class of the user's own.

        Raises:
          ValueError: they are no JSON object.
        """
        try:
            options = json.loads(self.options)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"writer.options is {self.options!r}, which is no JSON ({error}); write an object, as in "
                '\'{"style": "short"}\''
            ) from error
        if not isinstance(options, dict):
            raise ValueError(
                f"writer.options is {self.options!r}, a JSON value of type {type(options).__name__}; write an object, "
                'as in \'{"style": "short"}\''
            )
        return options

    def identity(self) -> dict[str, Any]:
        """The fields that decide the texts: the name and that writer's options, without how fast or dear they come.

        Instructions and classes are named, as corpora are; what an instruction holds is recorded with the texts.
        """
        if self.name not in BUILT_IN:
            return {"name": self.name, "options": self.own_options()}
        options = dataclasses.asdict(getattr(self, self.name))
        if self.name == "chat":
            chat = self.chat.chat
            options["chat"] = {"model": chat.model, "thinking_tokens": chat.thinking_tokens}
        return {"name": self.name, "options": options}
