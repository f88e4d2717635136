"""What a config says of the documents of a run."""

import dataclasses
import math

from nla_jax.data.corpora.duplicates import Duplicates
from nla_jax.data.corpora.self_prompts import SelfChatConfig, is_self_chat


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """The documents that contexts are taken from, and how they are shared out."""

    source: str = "docstrings"
    """`docstrings`, `packages` or `requests` (built in), a .txt, .jsonl, .json or .parquet file or a folder of them,
    here or at gs://..., hf:NAME[:CONFIG][:SPLIT], or self:PROMPTS for chats that the target LM writes itself; see
    data/corpora/corpus.py."""
    sources: tuple[str, ...] = ()
    """Several sources in place of `source`, which are mixed; the ids of their documents begin with the source."""
    weights: tuple[float, ...] = ()
    """The share of each of `sources` among the documents, up to a common factor; equal shares where none are given."""
    field: str = "text"
    """Name of the field or column that holds the text of a row, or its chat. In rows without it a chat is looked for
    under messages, conversation and conversations."""
    max_documents: int | None = None
    """Keep at most this many documents. A data set that is streamed is read until there are as many."""
    shuffle_buffer: int = 10_000
    """Rows of a streamed data set that are in memory, and of which the seed draws the next; 0 keeps the order."""
    duplicates: Duplicates = "same_id"
    """Which documents are left out as repetitions: those with the id of an earlier one; with exact also those with its
    text, but for case, punctuation and white space; with near also those with nearly its text; see
    `data/corpora/duplicates.py`."""
    min_characters: int = 0
    """Shorter documents are left out."""
    max_characters: int | None = None
    """Longer documents are left out; None keeps them."""
    languages: tuple[str, ...] = ()
    """Codes such as en and de: documents in other languages are left out. Where none is named, all are kept."""
    self_chat: SelfChatConfig = SelfChatConfig()
    """How the target LM writes the chats of sources self:PROMPTS."""
    av_sft: float = 0.25
    """Share of the documents for the AV's warm start; the four shares sum to 1."""
    ar_sft: float = 0.5
    rl: float = 0.15
    held_out: float = 0.1

    def __post_init__(self):
        if self.sources and self.source != "docstrings":
            raise ValueError(
                f"corpus.source is {self.source!r} and corpus.sources are given as well; name all of them in sources"
            )
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(
                f"corpus.sources names a source twice: {', '.join(self.sources)}; name each once"
            )
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"corpus.weights has {len(self.weights)} values for {len(self.sources)} sources in corpus.sources; "
                "give one for each, or none"
            )
        if any(not (math.isfinite(weight) and weight > 0) for weight in self.weights):
            raise ValueError(f"corpus.weights are {self.weights}; expected positive numbers")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(
                f"max_documents={self.max_documents}; expected a positive number, or None for all"
            )
        for name in ("shuffle_buffer", "min_characters"):
            if getattr(self, name) < 0:
                raise ValueError(f"corpus.{name} is {getattr(self, name)}, expected at least 0")
        if self.max_characters is not None and self.max_characters < max(1, self.min_characters):
            raise ValueError(
                f"corpus.max_characters is {self.max_characters}; expected at least min_characters="
                f"{self.min_characters} and 1, or None"
            )

    @property
    def fractions(self) -> dict[str, float]:
        """The shares of the documents by split name."""
        return {name: getattr(self, name) for name in ("av_sft", "ar_sft", "rl", "held_out")}

    @property
    def mixture(self) -> dict[str, float]:
        """The sources with their shares among the documents, which sum to 1."""
        sources = self.sources or (self.source,)
        weights = self.weights or (1.0,) * len(sources)
        return {source: weight / sum(weights) for source, weight in zip(sources, weights, strict=True)}

    @property
    def has_self_chat(self) -> bool:
        """Whether the target LM writes documents itself."""
        return any(is_self_chat(source) for source in self.mixture)

    @property
    def name(self) -> str:
        """The source, or the sources with their shares, such as "0.7 a.jsonl + 0.3 hf:ORG/NAME"."""
        if not self.sources:
            return self.source
        return " + ".join(f"{share:.3g} {source}" for source, share in self.mixture.items())
