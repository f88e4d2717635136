"""The built-in writer with room: two to four short statements about a row, by rules and small word lists.

Which statements a row gets depends on its place. Inside a sentence an activation holds the last words and what follows
them, and where something closes, what was said. No API and no model is needed. Wording and order vary, keyed by the
row, so that the AV learns language and not one form.
"""

import dataclasses
import re
from typing import Any

from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.splits import hash_fraction
from nla_jax.data.writers.reports import Tally
from nla_jax.data.writers.statements import STATEMENTS
from nla_jax.data.writers.statements.content import kind_and_topic
from nla_jax.data.writers.statements.facts import Facts, place_of
from nla_jax.data.writers.word_counts import WordCounts

ORDERS: dict[str, tuple[str, ...]] = {
    "inside": ("ending", "next", "language", "kind", "syntax", "topic", "tone", "speakers"),
    "sentence_end": ("topic", "next", "language", "syntax", "tone", "kind", "speakers", "ending"),
    "line_end": ("topic", "ending", "next", "language", "kind", "syntax", "tone", "speakers"),
    "turn_end": ("topic", "kind", "language", "next", "tone", "syntax", "speakers", "ending"),
    "answer_start": ("topic", "next", "kind", "language", "speakers", "tone", "syntax", "ending"),
    "span": ("topic", "language", "kind", "syntax", "next", "tone", "speakers", "ending"),
}
"""Place -> statements, those first that are said first where there is not room for all."""

_PIECE = re.compile(r"[a-zA-Z0-9]+|[^\W\d_a-zA-Z]+|[^\w\s]|_")


@dataclasses.dataclass(frozen=True)
class DescriptiveConfig:
    """The statements of a descriptive text, and their sizes."""

    statements: tuple[str, ...] = tuple(STATEMENTS)
    """Names of statements that may be made; see data/writers/statements."""
    most_sentences: int = 4
    """Most statements of a text; those that come first at the row's place are made first."""
    most_tokens: int = 44
    """A statement that would make a text longer than this is left out. Tokens are estimated, see `estimated_tokens`."""
    topic_words: int = 8
    """Most words that tell what is closed, at the end of sentences, lines and turns, at answers and over spans."""
    inside_topic_words: int = 2
    """Most words that tell what a text is about, inside sentences."""
    next_words: int = 3
    """Most words that are listed of those that the target expects; fewer where it is sure. 0 lists none."""
    ending_words: int = 2
    """Number of last words that are quoted; 0 quotes none."""

    def __post_init__(self):
        if unknown := [name for name in self.statements if name not in STATEMENTS]:
            raise ValueError(
                f"writer.descriptive.statements names {', '.join(unknown)}, and the statements are "
                f"{', '.join(STATEMENTS)}"
            )
        if not self.statements:
            raise ValueError(f"writer.descriptive.statements is empty; name some of {', '.join(STATEMENTS)}")
        least = {"most_sentences": 1, "most_tokens": 1, "topic_words": 0, "inside_topic_words": 0}
        for name, value in {**least, "next_words": 0, "ending_words": 0}.items():
            if getattr(self, name) < value:
                raise ValueError(
                    f"writer.descriptive.{name} is {getattr(self, name)}, expected at least {value}"
                )


def ablations(config: DescriptiveConfig, *, alone: bool = False) -> dict[str, DescriptiveConfig]:
    """The configs that tell what each statement is worth: all statements, and all but one for each.

    Args:
      config: of the whole text.
      alone: whether each statement by itself is added.
    """
    found = {"all": config}
    for name in config.statements if len(config.statements) > 1 else ():
        rest = tuple(other for other in config.statements if other != name)
        found[f"without {name}"] = dataclasses.replace(config, statements=rest)
    if alone:
        found |= {
            f"{name} alone": dataclasses.replace(config, statements=(name,)) for name in config.statements
        }
    return found


class DescriptiveWriter:
    """A writer of explanations for rows with contexts; whatever else their columns tell is used."""

    def __init__(self, config: DescriptiveConfig, *, seed: int, words: WordCounts):
        """Take the statements, the seed of their wording, and the words of all contexts."""
        self.config, self.seed, self.words = config, seed, words
        self.tally = Tally()

    def explain(self, rows: ActivationDataset) -> list[str | None]:
        """The text of each row; None where no statement can be made, as of an empty context.

        Raises:
          ValueError: the rows lack their contexts.
        """
        if rows.contexts is None:
            raise ValueError(
                "the descriptive writer needs the context of each row, the column detokenized_text_truncated; extract "
                "again, or take a data set that has it"
            )
        texts = [self.text(self.facts(rows, row)) for row in range(len(rows))]
        self.tally.refused["nothing to say"] += texts.count(None)
        self.tally.count(texts)
        return texts

    def facts(self, rows: ActivationDataset, row: int) -> Facts:
        """What is known of one row, as its statements take it."""

        def column(name: str) -> Any:
            return rows.extra[name][row] if name in rows.extra else None

        context, end, start = rows.contexts[row] or "", int(rows.n_raw_tokens[row]), column("span_start")
        place = column("place") or place_of(context)
        config = self.config
        return Facts(
            key=f"{rows.doc_ids[row]} {end} {place}",
            seed=self.seed,
            context=context,
            place=place,
            role=column("role"),
            turn=column("turn"),
            genre=column("genre") or "",
            next_words=tuple(column("next_words") or ()),
            next_probabilities=tuple(column("next_probabilities") or ()),
            span_tokens=end - start if place == "span" and start is not None and start >= 0 else 0,
            rarity=self.words.rarity,
            topic_words=config.topic_words,
            inside_topic_words=config.inside_topic_words,
            listed_words=config.next_words,
            ending_words=config.ending_words,
        )

    def text(self, facts: Facts) -> str | None:
        """The statements about a row that have room, in an order of its own; None where there are none.

        What kind of text it is and what it is about become one sentence.
        """
        made: dict[str, str] = {}
        left = self.config.most_tokens
        for name in ORDERS.get(facts.place, ORDERS["sentence_end"]):
            if name not in self.config.statements or len(made) == self.config.most_sentences:
                continue
            statement = STATEMENTS[name](facts)
            if statement is not None and ((tokens := estimated_tokens(statement)) <= left or not made):
                made[name] = statement
                left -= tokens
        if {"kind", "topic"} <= made.keys():
            del made["kind"]
            made["topic"] = kind_and_topic(facts)

        def place_in_text(name: str) -> float:
            return hash_fraction(f"{facts.key} {name}", seed=self.seed, purpose="order")

        return " ".join(made[name] for name in sorted(made, key=place_in_text)) or None

    def prompts(self, rows: ActivationDataset) -> None:
        """None: no model is asked."""

    def about(self) -> dict[str, Any]:
        """Who writes."""
        return {"writer": "descriptive"}

    def report(self) -> dict[str, Any]:
        """How many texts were written."""
        return self.tally.report(**self.about())


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has: one for six letters of each word, for each other letter, and for each mark."""
    pieces = _PIECE.findall(text)
    return sum(-(-len(piece) // 6) if piece.isascii() else len(piece) for piece in pieces)
