"""Rewritten explanations: the same meaning in other words, to see what a reconstruction really depends on.

An explanation that carries its information in its meaning survives a rewrite; one that carries it in word choice, order
or spelling does not. Rules make the light rewrites, a language model the heavy ones.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from nla_jax import text_analysis

Edit = Callable[[str, np.random.Generator], str]
Writer = Callable[[Sequence[str]], list[str]]
"""A function that answers prompts, such as a language model."""

_PLACEHOLDERS = [chr(0xE000 + index) for index in range(256)]
"""Characters that stand for the quoted spans of a text while it is edited: for private use, so no rule touches them."""


def edited(texts: Sequence[str | None], edit: Edit, *, quotes: bool, seed: int) -> list[str | None]:
    """Apply an edit to every text; quoted spans are kept unchanged, or taken out first.

    Args:
      texts: explanations; None stays None.
      edit: a rule, such as one of RULES.
      quotes: whether quoted spans are kept.
      seed: a text's edit depends on this seed and on the text's index.
    """
    results: list[str | None] = []
    for index, text in enumerate(texts):
        if text is None:
            results.append(None)
            continue
        rng = np.random.default_rng([seed, index])
        spans = [match.group() for match in text_analysis.QUOTE.finditer(text)] if quotes else []
        stand_ins = dict(zip(_PLACEHOLDERS, spans, strict=False))
        names = iter(stand_ins)
        bare = (
            text_analysis.QUOTE.sub(lambda _, names=names: next(names), text)
            if quotes
            else _without_quotes(text)
        )
        changed = edit(bare, rng)
        for name, span in stand_ins.items():
            changed = changed.replace(name, span)
        results.append(changed.strip())
    return results


def _without_quotes(text: str) -> str:
    """The text without its quoted spans, and without the spaces that they leave before marks."""
    return re.sub(r"\s+([.,;:!?])", r"\1", text_analysis.without_quotes(text))


def unchanged(text: str, rng: np.random.Generator) -> str:
    """The same text; with quotes taken out, this shows what they alone are worth."""
    return text


def shuffled_sentences(text: str, rng: np.random.Generator) -> str:
    """The same sentences in another order."""
    parts = text_analysis.sentences(text)
    return " ".join(parts[i] for i in rng.permutation(len(parts)))


def shuffled_lists(text: str, rng: np.random.Generator) -> str:
    """The same sentences, with the items of their lists in another order."""
    done = []
    for sentence in text_analysis.sentences(text):
        *head, last = re.split(r"(?<=: )|(?<=\bNext )|(?<=\bThen )", sentence, maxsplit=1)
        end = last[len(last.rstrip(".!?")) :]
        items = last.removesuffix(end).split(", ") if end else last.split(", ")
        if len(items) > 1:
            last = ", ".join(items[i] for i in rng.permutation(len(items))) + end
        done.append("".join([*head, last]))
    return " ".join(done)


def synonyms(text: str, rng: np.random.Generator) -> str:
    """The text with words exchanged for synonyms, articles dropped, and its first letter in lower case."""

    def exchange(match: re.Match) -> str:
        word = match.group()
        others = _SYNONYMS.get(word.lower())
        return others[rng.integers(len(others))] if others else word

    changed = re.sub(r"\b(the|a|an) ", "", re.sub(r"[A-Za-z]+", exchange, text), flags=re.I)
    return changed[:1].lower() + changed[1:]


def keywords(text: str, rng: np.random.Generator) -> str:
    """The content words alone, in another order: the heaviest paraphrase that a rule can make."""
    kept = [
        word
        for word in re.findall(r"[^\s,.;:!?()]+", text)
        if text_analysis.content_words(word) or word in _PLACEHOLDERS
    ]
    return ", ".join(kept[i] for i in rng.permutation(len(kept))) + "."


RULES: dict[str, Edit] = {
    "unchanged": unchanged,
    "sentences shuffled": shuffled_sentences,
    "lists shuffled": shuffled_lists,
    "synonyms and light edits": synonyms,
    "content words alone, shuffled": keywords,
}

ASKED: dict[str, tuple[str, ...]] = {
    "paraphrase": ("Say this in other words, in one or two short sentences:\n{text}",),
    "translation and back": (
        "Translate this into French:\n{text}",
        "Translate this into English:\n{text}",
    ),
    "summary": ("Sum this up in a few words:\n{text}",),
}
"""Name of a rewrite -> the requests that a language model gets, one after the other."""


def asked(
    texts: Sequence[str | None], requests: Sequence[str], write: Writer, *, quotes: bool
) -> list[str | None]:
    """Texts rewritten by a language model; with `quotes`, a text's quoted spans are appended to its rewrite."""
    kept = [
        [match.group() for match in text_analysis.QUOTE.finditer(text or "")] if quotes else []
        for text in texts
    ]
    now = [_without_quotes(text or "") for text in texts]
    for request in requests:
        # Answers about a text that is empty by now are dropped.
        now = [
            answer if text else ""
            for text, answer in zip(now, write([request.format(text=text) for text in now]), strict=True)
        ]
    return [
        None if text is None else " ".join([answer, *spans]).strip()
        for text, answer, spans in zip(texts, now, kept, strict=True)
    ]


_SYNONYMS = {
    word: [other for other in group.split("|") if other != word]
    for group in (
        "ends|finishes|closes|stops",
        "end|finish|close",
        "last|final|closing",
        "words|terms",
        "word|term",
        "next|following|upcoming",
        "then|afterwards|after that",
        "likely|probable|expected",
        "about|concerning|regarding",
        "topic|subject|theme",
        "on|regarding|concerning",
        "text|passage|writing",
        "begins|starts|opens",
        "with|using",
        "source|origin",
        "from|out of",
        "list|enumeration",
        "array|matrix",
        "function|routine|method",
        "value|quantity",
        "number|figure",
        "error|mistake|fault",
        "file|document",
        "name|title",
        "key|identifier",
        "type|kind|sort",
        "size|extent",
        "user|person",
        "return|give back",
        "returns|gives back",
        "create|make|build",
        "creates|makes|builds",
        "use|employ",
        "used|employed",
        "big|large",
        "small|little",
        "new|fresh",
        "many|numerous",
        "shows|displays",
        "describes|explains",
        "model|system",
        "data|information",
        "result|outcome",
        "input|argument",
        "output|result",
        "set|group",
        "first|initial",
        "same|identical",
        "other|different",
        "optional|not required",
        "default|standard",
        "path|location",
        "code|program",
        "test|check",
        "story|tale",
        "news|report",
        "people|persons",
        "city|town",
        "money|funds",
    )
    for word in group.split("|")
    if " " not in word
}
