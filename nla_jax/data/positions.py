"""Where activations of documents are read: at sampled tokens, and as means over sampled spans of tokens.

Positions are keyed by (seed, document id), so that they do not depend on order, batch or number of processes.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from nla_jax.data.corpora.documents import Document
from nla_jax.data.splits import hash_fraction
from nla_jax.lm.places import TOKEN_PLACES, places
from nla_jax.lm.tokenized import TokenizedText, special_ids, tokenize_chat, tokenize_texts
from nla_jax.process import warn

CONTINUATION_TOKENS = 16
"""Number of tokens of the true continuation that are stored with each activation."""
SPAN_PLACE = "span"
"""The place of a row whose vector is a mean over several tokens; `lm.places.TOKEN_PLACES` has those of single ones."""


@dataclasses.dataclass(frozen=True)
class PlaceWeights:
    """How often tokens of each place are read, see `lm.places`.

    Of the rows of a document each place has a share in proportion to its weight, among the places that occur there. A
    place with fewer tokens than its share has them all read, and the others share the rest.
    """

    inside: float = 0.4
    """The weight of tokens that have none of the places below. A place with weight 0 is never read."""
    sentence_end: float = 0.25
    line_end: float = 0.1
    turn_end: float = 0.1
    answer_start: float = 0.15

    def __post_init__(self):
        for place, weight in self.of_places.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(
                    f"extraction.place_weights.{place} is {weight}, expected a finite number that is not negative"
                )
        if not any(self.of_places.values()):
            raise ValueError(
                "extraction.place_weights are all 0, so that no token would be read; give one place a positive weight"
            )

    @functools.cached_property
    def of_places(self) -> dict[str, float]:
        """Place -> weight."""
        return {place: getattr(self, place) for place in TOKEN_PLACES}

    def expected_rows(self, tokens: Mapping[str, int], rows: int) -> dict[str, float]:
        """Divide the rows of a document among its places.

        Args:
          tokens: place -> number of tokens that may be read, at least 1.
          rows: how many tokens are read, if there are so many.

        Returns:
          Place -> rows, a fraction that chance rounds, for the places whose weight is positive.
        """
        open_places = {place: self.of_places[place] for place in tokens if self.of_places[place]}
        shares: dict[str, float] = {}
        while open_places:
            each = rows / sum(open_places.values())
            full = [place for place, weight in open_places.items() if weight * each >= tokens[place]]
            if not full:
                return shares | {place: weight * each for place, weight in open_places.items()}
            for place in full:
                shares[place] = float(tokens[place])
                rows -= tokens[place]
                del open_places[place]
        return shares


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """The tokens of documents that activations are read at."""

    max_tokens: int = 128
    """Documents are cut after this many tokens."""
    min_position: int = 50
    """First token index that an activation is read at; shorter contexts decode to noise."""
    positions_per_document: int = 6
    by_place: bool = True
    """Whether places have the shares that `place_weights` gives them. Otherwise each token is as likely as any other,
    and most rows lie inside of sentences."""
    place_weights: PlaceWeights = PlaceWeights()
    """How often tokens of each place are read."""
    roles: tuple[str, ...] = ()
    """Roles of chats whose tokens may be read, such as assistant or tool; all roles and plain text by default."""
    spans: int = 0
    """Number of further rows of each document whose vector is the mean over a span of tokens."""
    span_tokens: tuple[int, int] = (8, 32)
    """Shortest and longest span."""

    def __post_init__(self):
        for name, least in {"min_position": 0, "positions_per_document": 1, "spans": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"extraction.{name} is {getattr(self, name)}, expected at least {least}")
        if self.min_position >= self.max_tokens:
            raise ValueError(
                f"extraction.min_position is {self.min_position}, and documents are cut after extraction.max_tokens="
                f"{self.max_tokens} tokens, so that no position is left; raise max_tokens or lower min_position"
            )
        shortest, longest = self.span_tokens
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"extraction.span_tokens is {self.span_tokens}, expected the shortest and the longest span in tokens, "
                "for instance 8 32"
            )


@dataclasses.dataclass(frozen=True)
class Reading:
    """The tokens of a document whose mean activation makes a row: one, or those of a span."""

    start: int
    end: int
    """The token after the last one."""
    place: str
    """The place of the token, see `lm.places`, or `SPAN_PLACE`."""
    role: str | None
    """The role in whose turn the last token lies; None in plain text."""
    turn: int | None
    """The index of that turn's message."""


@dataclasses.dataclass(frozen=True)
class Context:
    """A tokenized document and the readings chosen in it."""

    document: Document
    tokens: tuple[int, ...]
    """The document's tokens, cut at `max_tokens`."""
    continuation: tuple[int, ...]
    """The tokens after the cut that the last reading's continuation may need."""
    readings: tuple[Reading, ...]
    """Those of single tokens by their positions, then those of spans."""

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions of the readings of single tokens."""
        return tuple(reading.start for reading in self.readings if reading.place != SPAN_PLACE)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Start and end of the readings of spans."""
        return tuple((reading.start, reading.end) for reading in self.readings if reading.place == SPAN_PLACE)

    @property
    def length(self) -> int:
        """The number of tokens that have to be read for all readings."""
        return max(reading.end for reading in self.readings)


@dataclasses.dataclass
class Tally:
    """What is said of the documents that were tokenized: how many there were, and why some have no rows."""

    documents: int = 0
    used: int = 0
    longest: int = 0
    """Most tokens of a document."""
    roles: set[str] = dataclasses.field(default_factory=set)
    """Those that occurred."""
    without_role: int = 0
    """Documents that have none of the roles that were asked for."""
    without_place: int = 0
    """Documents that have tokens to read, and none of a place whose weight is positive."""
    rows: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Place -> rows, those of spans under `SPAN_PLACE`."""
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Why the chat template refused chats -> how many."""

    def check(self, config: PositionConfig) -> None:
        """Refuse documents that have no rows at all, or none of a role that was asked for.

        Raises:
          ValueError: naming what there is.
        """
        if missing := [role for role in config.roles if role not in self.roles]:
            raise ValueError(
                f"no document has the role {', '.join(missing)} (extraction.roles); the roles of the corpus are "
                f"{', '.join(sorted(self.roles)) or 'none, since it has no chats'}"
            )
        if not self.used and self.refused:
            raise ValueError(
                f"the chat template of the tokenizer refuses all chats, the first because {next(iter(self.refused))}; "
                "use chats that it takes, or a model with another template"
            )
        if not self.used and self.without_place:
            raise ValueError(
                f"no document has a token to read of the places {', '.join(_weighted(config))}, which alone have a "
                f"positive weight (extraction.place_weights), though {self.without_place} of {self.documents} have "
                "others; give those a weight"
            )
        if not self.used:
            raise ValueError(
                f"no document is longer than min_position={config.min_position} tokens (the longest of "
                f"{self.documents} has {self.longest}); use longer documents or lower extraction.min_position"
            )

    def describe_rows(self) -> str:
        """How many rows there are and how they are divided among places, as one line; the largest share first."""
        total = self.rows.total()
        shares = ", ".join(f"{place} {count / total:.1%}" for place, count in self.rows.most_common())
        return f"{total} rows by place: {shares}" if total else "no rows"

    def warn(self, config: PositionConfig) -> None:
        """Say which documents are left out, and why."""
        if refused := self.refused.total():
            reasons = ", ".join(f"{count} because {reason}" for reason, count in self.refused.most_common(3))
            warn(
                f"{refused} of {self.documents} documents are chats that the tokenizer's chat template refuses, and "
                f"are left out: {reasons}"
            )
        if self.without_role:
            warn(
                f"{self.without_role} of {self.documents} documents have no token of the roles "
                f"{', '.join(config.roles)}, and are left out (extraction.roles)"
            )
        if self.without_place:
            warn(
                f"{self.without_place} of {self.documents} documents have no token of the places "
                f"{', '.join(_weighted(config))}, and are left out (extraction.place_weights)"
            )
        if short := self.documents - self.used - refused - self.without_role - self.without_place:
            warn(
                f"{short} of {self.documents} documents have no token from position {config.min_position} on, where "
                "activations are read, and are left out (extraction.min_position)"
            )


def choose_positions(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    config: PositionConfig,
    seed: int,
    tally: Tally,
) -> list[Context]:
    """Tokenize documents and choose what is read of each.

    Special tokens are never read, nor what a chat template writes around contents but for the starts of answers.
    Documents without a token that may be read are left out.

    Args:
      documents: in order.
      tokenizer: of the model that will read them; chats need a chat template.
      config: the tokens that may be read, and how many.
      seed: another seed gives other, independent positions.
      tally: what is left out is counted here.

    Raises:
      ValueError: chats, and a tokenizer without a chat template.
    """
    special = special_ids(tokenizer)
    contexts = []
    for document, source in zip(documents, _tokenized(documents, tokenizer, config, tally), strict=True):
        tally.documents += 1
        if source is None:
            continue
        tally.longest = max(tally.longest, len(source))
        roles = {*source.roles} - {None}
        tally.roles |= roles
        if config.roles and not roles & {*config.roles}:
            tally.without_role += 1
            continue
        allowed = _allowed(source, special, config)
        if readings := _choose(document.id, source, allowed, config, seed):
            tally.used += 1
            tally.rows.update(reading.place for reading in readings)
            ids = source.ids
            after_cut = ids[config.max_tokens :][:CONTINUATION_TOKENS]
            contexts.append(Context(document, ids[: config.max_tokens], after_cut, readings))
        elif allowed:
            tally.without_place += 1
    return contexts


def _tokenized(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, config: PositionConfig, tally: Tally
) -> list[TokenizedText | None]:
    """The tokens of documents as far as they are needed; None for chats that the template refuses."""
    plain = [document.text for document in documents if document.messages is None]
    texts = iter(tokenize_texts(tokenizer, plain, config.max_tokens + CONTINUATION_TOKENS) if plain else ())
    if len(plain) < len(documents) and tokenizer.chat_template is None:
        raise ValueError(
            "the corpus holds chats, and the tokenizer has no chat template; use an instruction-tuned model, or a "
            "corpus of plain text"
        )
    sources: list[TokenizedText | None] = []
    for document in documents:
        if document.messages is None:
            sources.append(next(texts))
            continue
        try:
            sources.append(tokenize_chat(tokenizer, document.messages))
        except ValueError as error:
            tally.refused[str(error.__cause__ or error)] += 1
            sources.append(None)
    return sources


def _allowed(source: TokenizedText, special: set[int], config: PositionConfig) -> dict[int, str]:
    """The positions of a document that may be read, ascending, with their places."""
    # A plain text has no template around it, so that every token of it is content.
    around = None if {*source.roles} - {None} else "inside"
    last = min(len(source), config.max_tokens)
    rows = zip(range(last), source.ids, source.roles, places(source), strict=False)
    return {
        i: place or around
        for i, token, role, place in itertools.islice(rows, config.min_position, None)
        if (place or around)
        and (token not in special or place == "answer_start")
        and (not config.roles or role in config.roles)
    }


def _choose(
    doc_id: str, source: TokenizedText, allowed: Mapping[int, str], config: PositionConfig, seed: int
) -> tuple[Reading, ...]:
    """The readings of a document; none where no token may be read."""
    if not allowed:
        return ()
    rng = _rng(doc_id, seed, "positions")
    if config.by_place:
        chosen = _choose_by_place(allowed, config, rng)
    else:
        count = min(config.positions_per_document, len(allowed))
        chosen = sorted(rng.choice([*allowed], size=count, replace=False).tolist())
    singles = [Reading(i, i + 1, allowed[i], source.roles[i], source.turns[i]) for i in chosen]
    contents = [i for i, place in allowed.items() if place != "answer_start"]
    spans = _choose_spans(contents, source.turns, config, _rng(doc_id, seed, "spans")) if config.spans else []
    return (
        *singles,
        *(Reading(a, b, SPAN_PLACE, source.roles[b - 1], source.turns[b - 1]) for a, b in spans),
    )


def _choose_by_place(
    allowed: Mapping[int, str], config: PositionConfig, rng: np.random.Generator
) -> list[int]:
    """Positions, ascending, of which each place has as many as `PlaceWeights.expected_rows` says, on average.

    Each number of rows is rounded up or down. One random offset decides for all places, so that the sum is exact.
    """
    positions_of: dict[str, list[int]] = {}
    for i, place in allowed.items():
        positions_of.setdefault(place, []).append(i)
    tokens = {place: len(positions_of[place]) for place in TOKEN_PLACES if place in positions_of}
    expected = config.place_weights.expected_rows(tokens, config.positions_per_document)
    chosen: list[int] = []
    offset, total = rng.random(), 0.0
    for place, rows in expected.items():
        total = round(total + rows, 9)  # Sums of fractions that are whole numbers must be so exactly.
        count = math.floor(total + offset) - len(chosen)
        chosen += rng.choice(positions_of[place], size=count, replace=False).tolist() if count else []
    return sorted(chosen)


def _weighted(config: PositionConfig) -> list[str]:
    """The places whose weight is positive."""
    return [place for place, weight in config.place_weights.of_places.items() if weight]


def _choose_spans(
    allowed: Sequence[int], turns: Sequence[int | None], config: PositionConfig, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Start and end of different spans of consecutive tokens that may be read, each inside one turn.

    A document too short for the length that was drawn gets the longest span that it has room for, if it has one.
    """
    room: dict[int, int] = {}  # start -> most tokens of a span there
    for i in reversed(allowed):
        continued = i + 1 in room and turns[i + 1] == turns[i]
        room[i] = room[i + 1] + 1 if continued else 1
    shortest, longest = config.span_tokens
    most = max(room.values(), default=0)
    spans = set()
    for _ in range(config.spans if most >= shortest else 0):
        length = min(int(rng.integers(shortest, longest + 1)), most)
        start = int(rng.choice(sorted(i for i, tokens in room.items() if tokens >= length)))
        spans.add((start, start + length))
    return sorted(spans)


def _rng(doc_id: str, seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng(int(hash_fraction(doc_id, seed=seed, purpose=purpose) * 2**53))
