"""The built-in writer: warm-start texts about the context and about the words that the target expects next.

Texts about topics alone carry almost nothing of an activation; the last words and the expected next words do. No
API and no model is needed: the target's expectation was stored during extraction. Wording and order vary, keyed by
the row, so that the AV learns language and not one form.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.splits import hash_fraction
from nla_jax.data.writers.reports import Tally
from nla_jax.data.writers.word_counts import WordCounts, long_words
from nla_jax.text_analysis import last_words

_ABOUT_FIRST = 0.25
"""Share of the texts that begin with topic and source."""


@dataclasses.dataclass(frozen=True)
class PredictiveConfig:
    """The parts of a predictive text."""

    ending_words: int = 3
    """Number of the context's last words that are quoted."""
    ending_characters: int = 24
    """Longest quote in characters; a longer one loses words in front, and a single longer word its beginning."""
    next_words: int = 4
    """Number of expected next words that are listed."""
    topic_words: int = 2
    """Number of words that set the context apart from the corpus; 0 leaves the topic out."""
    source: bool = True
    """Whether the text's genre is named; it is only named beside a topic."""


_ENDING = ('Ends "{}".', 'It ends with "{}".', 'Last words "{}".')
_NEXT = ("Next {}.", "Likely next: {}.", "Then {}.")
_ABOUT = ("About {}.", "On {}.", "Topic {}.")
_ABOUT_FROM = ("About {}, from {}.", "On {}, from {}.", "Topic {}; source {}.")


class PredictiveWriter:
    """A writer of explanations for rows that have the columns `next_words` and `genre`."""

    def __init__(self, config: PredictiveConfig, *, seed: int, words: WordCounts):
        """Take the parts of a text, the seed of its wording, and the words of all contexts."""
        self.config, self.seed, self.words = config, seed, words
        self.tally = Tally()

    def explain(self, rows: ActivationDataset) -> list[str]:
        """Write one explanation for each row.

        Raises:
          ValueError: the rows lack `next_words`, `genre` or their contexts.
        """
        if missing := [name for name in ("next_words", "genre") if name not in rows.extra]:
            raise ValueError(
                f"the predictive writer needs the columns {missing}; extract with extraction.next_words > 0"
            )
        if rows.contexts is None:
            raise ValueError("the predictive writer needs the column detokenized_text_truncated")
        texts = [
            self._text(f"{doc_id} {n}", context, expected, genre)
            for doc_id, n, context, expected, genre in zip(
                rows.doc_ids,
                rows.n_raw_tokens,
                rows.contexts,
                rows.extra["next_words"],
                rows.extra["genre"],
                strict=True,
            )
        ]
        self.tally.count(texts)
        return texts

    def prompts(self, rows: ActivationDataset) -> None:
        """None: no model is asked."""

    def about(self) -> dict[str, Any]:
        """Who writes."""
        return {"writer": "predictive"}

    def report(self) -> dict[str, Any]:
        """How many texts were written."""
        return self.tally.report(**self.about())

    def topic(self, context: str) -> list[str]:
        """The words with the highest tf-idf in a context, best first."""
        counts = Counter(long_words(context))
        score = {word: n * self.words.rarity(word) for word, n in counts.items()}
        return sorted(score, key=lambda word: (-score[word], word))[: self.config.topic_words]

    def _text(self, key: str, context: str, expected: Sequence[str], genre: str) -> str:
        def choose(options: Sequence[str], purpose: str) -> str:
            return options[int(hash_fraction(key, seed=self.seed, purpose=purpose) * len(options))]

        config = self.config
        ending = last_words(context, config.ending_words, config.ending_characters)
        sentences = [choose(_ENDING, "ending").format(ending)]
        if expected and config.next_words:
            sentences.append(choose(_NEXT, "next").format(", ".join(expected[: config.next_words])))
        if topic := ", ".join(self.topic(context)):
            about = choose(_ABOUT_FROM if config.source else _ABOUT, "about")
            sentences.append(about.format(topic, genre) if config.source else about.format(topic))
        if hash_fraction(key, seed=self.seed, purpose="order") < _ABOUT_FIRST:
            sentences = [sentences[-1], *sentences[:-1]]
        return " ".join(sentences)
