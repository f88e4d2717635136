"""What a chat model's answer has to be before it becomes a warm-start text: parsing, and checks with complaints."""

import dataclasses
import html
import re

from nla_jax import text_analysis
from nla_jax.data.stage_texts import holds_a_tag

_OPEN, _CLOSE = (re.compile(rf"<\s*{slash}explanations?\s*>", re.IGNORECASE) for slash in ("", r"/\s*"))
_ANY_TAG = re.compile(r"<\s*/?\s*(explanations?|text|think|thinking)\s*>", re.IGNORECASE)
_BULLET = re.compile(r"^\s*(?:[-*•–]+|\(?\d{1,2}[.):])\s+")
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class TextChecks:
    """What a text has to be. A text that fails is asked for once more, and then left out."""

    needs_tag: bool = True
    """Whether an answer without <explanation> tags is refused; else all of it is the text."""
    fewest_statements: int = 2
    most_statements: int = 4
    fewest_words: int = 12
    most_words: int = 140
    copied_words: int = 8
    """Most words in a row that may stand in the context as well, outside of quotes in the last statement."""
    quoted_words: int = 16
    """Most words of one quote in the last statement that may stand in the context in a row."""

    def __post_init__(self):
        for fewest, most in (("fewest_statements", "most_statements"), ("fewest_words", "most_words")):
            low, high = getattr(self, fewest), getattr(self, most)
            if not 1 <= low <= high:
                raise ValueError(
                    f"the checks of texts have {fewest}={low} and {most}={high}; expected 1 or more, and the second no "
                    "smaller than the first"
                )
        for name in ("copied_words", "quoted_words"):
            if getattr(self, name) < 0:
                raise ValueError(f"the checks of texts have {name}={getattr(self, name)}; expected 0 or more")


class RefusedText(Exception):
    """An answer that is no warm-start text."""

    def __init__(self, reason: str, complaint: str):
        """Take a short reason, by which refusals are counted, and a sentence for the model that is asked again."""
        super().__init__(complaint)
        self.reason, self.complaint = reason, complaint


def checked_text(answer: str, context: str, checks: TextChecks) -> str:
    """The warm-start text in a chat model's answer: its statements, each on a line of its own, without bullets.

    Tolerated are thoughts before the text, other words around the tags, tags in another case, with blanks or escaped
    as in HTML, a missing opening tag, bullets and numbers before statements, and a fence of code around everything.

    Args:
      answer: all that the model said.
      context: the text that the activation was read in, which may not be copied.
      checks: what a text has to be.

    Raises:
      RefusedText: the answer holds no text that passes the checks.
    """
    lines = [_BULLET.sub("", line).strip() for line in _inside_tags(answer, checks.needs_tag).splitlines()]
    lines = [line for line in lines if line and not re.fullmatch(r"`{3,}\w*|[-*_=]{3,}", line)]
    text = "\n".join(lines)
    if not text:
        raise RefusedText("nothing inside the tags", "There is nothing inside the tags.")
    if holds_a_tag(text) or _ANY_TAG.search(text):
        raise RefusedText(
            "a tag inside the text", "There is a tag inside the description. Write one pair of tags only."
        )
    statements = lines if len(lines) > 1 else text_analysis.sentences(text)
    _check_size("statements", len(statements), checks.fewest_statements, checks.most_statements)
    _check_size("words", len(text_analysis.words(text)), checks.fewest_words, checks.most_words)
    _check_copies(statements, context, checks)
    return text


def _inside_tags(answer: str, needs_tag: bool) -> str:
    answer = _THOUGHTS.sub("", answer)
    if not _CLOSE.search(answer):
        answer = html.unescape(answer)
    opened, closed = _OPEN.search(answer), _CLOSE.search(answer)
    if closed:
        before = answer[: closed.start()]
        return before[opened.end() :] if opened and opened.end() <= closed.start() else before
    if opened:
        raise RefusedText(
            "no closing tag", "The closing tag </explanation> is missing. Be shorter, and close the tag."
        )
    if needs_tag:
        raise RefusedText(
            "no tag", "The tags are missing. Enclose the description in <explanation> and </explanation>."
        )
    return answer


def _check_size(what: str, count: int, fewest: int, most: int) -> None:
    if not fewest <= count <= most:
        raise RefusedText(
            f"too {'few' if count < fewest else 'many'} {what}",
            f"The description has {count} {what}; write {fewest} to {most}.",
        )


def _check_copies(statements: list[str], context: str, checks: TextChecks) -> None:
    *before, last = statements
    if _copies(" ".join([*before, text_analysis.without_quotes(last)]), context, checks.copied_words):
        raise RefusedText(
            "copied words",
            f"The description repeats more than {checks.copied_words} words of the text in a row. Use your own words, "
            "apart from the quotation of the last words in the last statement.",
        )
    if any(_copies(quote, context, checks.quoted_words) for quote in text_analysis.quotes(last)):
        raise RefusedText(
            "a long quotation",
            f"The quotation in the last statement is too long; quote at most {checks.quoted_words} words.",
        )


def _copies(text: str, context: str, most: int) -> bool:
    """Whether more than `most` words of a text stand in the context in a row."""
    copied, _ = text_analysis.copied_ngrams(text, context, most + 1)
    return copied > 0
