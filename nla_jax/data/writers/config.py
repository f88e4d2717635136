"""WriterConfig: who writes the texts that warm starts learn from, and with which options."""

import dataclasses

from nla_jax.data.writers.predictive import PredictiveConfig


@dataclasses.dataclass(frozen=True)
class WriterConfig:
    """The writer of warm-start texts. Only the options of the writer that is named count."""

    name: str = "predictive"
    """The writer: `predictive` is built in."""
    predictive: PredictiveConfig = PredictiveConfig()
