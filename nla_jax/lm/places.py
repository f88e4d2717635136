"""The places of tokens in a text: inside, at the end of a sentence, a line or a turn, or before an answer.

Tokens that close something have much to say about what they close, and tokens inside of it about the next word.
"""

import bisect
import re

from nla_jax.lm.tokenized import TokenizedText

TOKEN_PLACES = ("inside", "sentence_end", "line_end", "turn_end", "answer_start")
"""The places that a token of a text can have, from the weakest to the strongest: a token has the strongest."""

_CLOSERS = r"[\"'”’»›)\]}*_`」』】）]*"
_SENTENCE_END = re.compile(rf"(?P<mark>[.!?…؟।]+){_CLOSERS}(?=\s|$)|(?P<full>[。！？｡]+){_CLOSERS}")
_LAST_WORD = re.compile(r"[^\s(\[{\"'“‘]+$")
_LONGEST_WORD = 40

_BEFORE_NAMES = re.compile(
    r"mrs?|ms|dr|prof|st|gen|gov|sen|rep|hon|rev|capt|col|sgt|lt|vs|cf|e\.g|i\.e|viz|eds?", re.IGNORECASE
)
"""Abbreviations, without their last full stop, that end no sentence."""
_BEFORE_NUMBERS = re.compile(r"nos?|nr|pp?|figs?|eqs?|sec|ch|vol|art", re.IGNORECASE)
"""Those that end none where a digit follows."""
_AFTER_WORDS = re.compile(
    r"etc|inc|ltd|co|corp|jr|sr|approx|ca|al|a\.m|p\.m|dept|est|ibid|bzw|usw", re.IGNORECASE
)
"""Those that end none where a small letter follows."""
_INITIAL = re.compile(r"(?:[A-Za-z]\.)*[A-HJ-Z]")


def places(source: TokenizedText) -> tuple[str | None, ...]:
    """The place of each token, one of `TOKEN_PLACES`; None for a BOS and for what a template writes around contents.

    - sentence_end: the last token of a sentence, which is its full stop, question mark or exclamation mark, or the
      quotes and brackets that close after it. Abbreviations, initials, decimals and numbers of lists end none.
    - line_end: a token that holds a line break.
    - turn_end: the last token of a message's content.
    - answer_start: the last token of what the template writes before an assistant's content.
    """
    text, spans = source.text, source.spans
    found: list[str | None] = ["inside" if inside else None for inside in source.in_content]
    starts = [start for start, _ in spans]
    ends = [(end - 1, "sentence_end") for end in sentence_ends(text)]
    for character, place in ends + [(match.start(), "line_end") for match in re.finditer("\n", text)]:
        # Of several tokens that make up one character, the last one closes.
        i = bisect.bisect_right(starts, character) - 1
        while i >= 0 and spans[i][1] <= character:
            i -= 1
        more = text[character + 1 : spans[i][1]]  # A sentence may go on where the token does.
        if i >= 0 and found[i] is not None and (place == "line_end" or not more.strip()):
            found[i] = place
    if {*source.turns} - {None}:
        for i in source.last_of_turns():
            found[i] = "turn_end"
        for i in answer_starts(source):
            found[i] = "answer_start"
    return tuple(found)


def answer_starts(source: TokenizedText) -> list[int]:
    """The last token before each assistant's content, and the last token of all where the text opens an answer."""
    first = {turn: i for i, turn in reversed(list(enumerate(source.turns))) if source.in_content[i]}
    before = [
        i - 1
        for turn, i in sorted(first.items(), key=lambda pair: pair[1])
        if source.roles[i] == "assistant" and i and not source.in_content[i - 1]
    ]
    return before + [len(source) - 1] * source.opens_answer


def sentence_ends(text: str) -> list[int]:
    """The characters where sentences end, in ascending order: each is the index after the sentence's last character."""
    return [match.end() for match in _SENTENCE_END.finditer(text) if _closes(match, text)]


def _closes(match: re.Match, text: str) -> bool:
    """Whether a match of `_SENTENCE_END` ends a sentence."""
    after = text[match.end() : match.end() + _LONGEST_WORD].lstrip(" \t")
    mark, continues = match["mark"], after[:1].islower()
    if mark is None:
        return True
    if continues and (match.group() != mark or mark.startswith(("..", "…"))):
        return False  # A quotation inside a sentence, or an ellipsis.
    before = text[max(match.start() - _LONGEST_WORD, 0) : match.start()]
    word = _LAST_WORD.search(before)
    if mark != "." or word is None:
        return True
    if _AFTER_WORDS.fullmatch(word.group()):
        return not continues
    numbers_line = word.group().isdigit() and not before[: word.start()].rpartition("\n")[2].strip()
    if numbers_line or _BEFORE_NAMES.fullmatch(word.group()) or _INITIAL.fullmatch(word.group()):
        return not after or after[0] == "\n"
    return not (_BEFORE_NUMBERS.fullmatch(word.group()) and after[:1].isdigit())
