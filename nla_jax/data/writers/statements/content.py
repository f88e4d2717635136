"""What a text is about: its rarest words and pairs of words, out of their order."""

import re
from collections import Counter

from nla_jax.data.writers.statements.facts import Facts
from nla_jax.data.writers.statements.languages import language_of, stop_words
from nla_jax.text_analysis import last_words, stem

_TOKEN = re.compile(
    r"[\u30a0-\u30ff]{2,8}|[\u3400-\u9fff]{1,4}"  # Katakana, and Chinese characters: no blanks between words.
    r"|[^\W_\u3040-\u30ff\u3400-\u9fff]+(?:['’-][^\W_\u3040-\u30ff\u3400-\u9fff]+)*"
)
_LONGEST_WORD = 24
_BETWEEN = ("", " ")
_SENTENCE_START = frozenset('.!?:\n"“')

_ABOUT = ("About {}.", "{}.", "On {}.", "Topic {}.", "Concerns {}.", "Mentions {}.")


def topic(facts: Facts) -> str | None:
    """What the closed sentence, line, turn or span is about; inside a sentence, what the text is about."""
    found = topic_phrases(facts)
    if not found:
        return None
    about = facts.choose(_ABOUT, "topic").format(", ".join(found))
    return about[0].upper() + about[1:]


def topic_phrases(facts: Facts) -> list[str]:
    """Words and pairs of neighboring words with the highest tf-idf, best first.

    At places that close something they are of what is closed. Two phrases that are neighbors in the text are not
    neighbors here, so that no run of three words is copied.
    """
    text = facts.said if facts.is_inside else facts.closed
    most = facts.inside_topic_words if facts.is_inside else facts.topic_words
    # What is quoted as the ending is not said twice.
    quoted = {stem(word.lower()) for word in _TOKEN.findall(last_words(text, facts.ending_words))}
    phrases = phrases_of(text, language_of(facts.said), quoted if facts.is_inside else set())
    counts = Counter(word.lower() for phrase in phrases for word in phrase)

    def score(index: int) -> float:
        values = [counts[word.lower()] * facts.rarity(word.lower()) for word in phrases[index]]
        return sum(values) / len(values)

    chosen: list[int] = []
    stems: set[str] = set()
    words = 0
    for index in sorted(range(len(phrases)), key=lambda i: (-score(i), i)):
        new = {stem(word.lower()) for word in phrases[index]}
        if words + len(phrases[index]) <= most and not new & stems:
            chosen.append(index)
            stems |= new
            words += len(phrases[index])
    return [" ".join(phrases[index]) for index in _apart(chosen)]


def phrases_of(text: str, language: str, without: set[str]) -> list[tuple[str, ...]]:
    """The content words of a text in its order, one or two neighboring ones in each phrase.

    Args:
      text: any text.
      language: its code, whose function words are left out.
      without: stems of further words that are left out.
    """
    ignored = stop_words(language)
    phrases: list[tuple[str, ...]] = [()]
    end = 0
    for match in _TOKEN.finditer(text):
        word, between = match.group(), text[end : match.start()]
        begins_sentence = not end or not _SENTENCE_START.isdisjoint(between)
        end = match.end()
        if not _is_content(word, ignored) or stem(word.lower()) in without:
            phrases.append(())  # Words on both sides of one that is left out are no pair.
            continue
        # A capital is kept where it marks a name.
        written = word.lower() if begins_sentence and word[1:].islower() else word
        if len(phrases[-1]) == 1 and between in _BETWEEN:
            phrases[-1] = (*phrases[-1], written)
        else:
            phrases.append((written,))
    return [phrase for phrase in phrases if phrase]


def _is_content(word: str, ignored: frozenset[str]) -> bool:
    plain = word.lower().replace("’", "'")
    if plain in ignored or plain.partition("'")[0] in ignored or len(word) > _LONGEST_WORD:
        return False
    return len(word) > 1 or word.isdigit() or not word.isascii()


def _apart(indices: list[int]) -> list[int]:
    """The same indices, where none is followed by its successor: such pairs change places."""
    ordered = list(indices)
    for i in range(len(ordered) - 1):
        if ordered[i + 1] == ordered[i] + 1:
            ordered[i], ordered[i + 1] = ordered[i + 1], ordered[i]
    return ordered
