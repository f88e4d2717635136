"""What a text is about: its rarest words and pairs of words, out of their order."""

import re
from collections import Counter
from collections.abc import Collection, Sequence

from nla_jax.data.writers.statements.facts import Facts
from nla_jax.data.writers.statements.kind import kind_of
from nla_jax.data.writers.statements.languages import language_of, stop_words
from nla_jax.text_analysis import last_words, stem, words

_HAN = "\u3400-\u9fff"
_KANA = "\u3040-\u30ff"
_CHINESE_FORMS = (
    "的了是在和我你他她它这那也就不人们吗呢请该怎么什为何与或把被让给对到说要会能可以有没很都个一上下着过些"
)
"""Chinese characters that rarely begin or end a word of content."""
_TOKEN = re.compile(
    # Chinese and Japanese have no blanks between words: runs of Katakana, and of characters with a meaning.
    rf"[\u30a0-\u30ff]{{2,8}}|(?:(?![{_CHINESE_FORMS}])[{_HAN}]){{2,4}}"
    rf"|[^\W_{_KANA}{_HAN}]+(?:['’-][^\W_{_KANA}{_HAN}]+)*"
)
_ADVERB = re.compile(
    r"(?!(?:family|reply|supply|assembly|anomaly|italy|july|monopoly|butterfly)$)[a-z]{3,}ly"
)
_LONGEST_WORD = 24
_SENTENCE_START = frozenset(".!?:\n")

_FEWEST_WORDS = 5
"""Words of a topic below which words of the text before it are added."""

_KIND_ABOUT = ("{} on {}.", "{}: {}.", "{} about {}.", "{} with {}.")
_ABOUT = ("About {}.", "{}.", "On {}.", "Topic {}.", "Concerns {}.", "Mentions {}.")


def topic(facts: Facts) -> str | None:
    """What the closed sentence, line, turn or span is about; inside a sentence, what the text is about."""
    found = topic_phrases(facts)
    if not found:
        return None
    about = facts.choose(_ABOUT, "topic").format(", ".join(found))
    return about[0].upper() + about[1:]


def kind_and_topic(facts: Facts) -> str | None:
    """What kind of text is about what, as one sentence; None where one of the two is not known."""
    name, found = kind_of(facts), topic_phrases(facts)
    if name is None or not found:
        return None
    return facts.choose(_KIND_ABOUT, "kind and topic").format(name, ", ".join(found))


def topic_phrases(facts: Facts) -> list[str]:
    """Words and pairs of neighboring words with the highest tf-idf, best first.

    At places that close something they are of what is closed. Two phrases that are neighbors in the text are not
    neighbors here, so that no run of three words is copied.
    """
    text, language = facts.said, language_of(facts.said)
    if facts.is_inside:
        # What is quoted as the ending is not said twice.
        quoted = {stem(word.lower()) for word in _TOKEN.findall(last_words(text, facts.ending_words))}
        return _rarest(phrases_of(text, language, quoted), facts.inside_topic_words, facts)
    found = _rarest(phrases_of(facts.closed, language), facts.topic_words, facts)
    said = words(" ".join(found))
    if len(said) < min(_FEWEST_WORDS, facts.topic_words):
        before = text.strip().removesuffix(facts.closed) or facts.before
        earlier = phrases_of(before, language_of(before), {stem(word) for word in said})
        found += _rarest(earlier, min(_FEWEST_WORDS, facts.topic_words) - len(said), facts)
    return found


def _rarest(phrases: Sequence[tuple[str, ...]], most: int, facts: Facts) -> list[str]:
    """The phrases with the highest tf-idf, best first, that have so many words together and no word twice."""
    counts = Counter(word.lower() for phrase in phrases for word in phrase)

    def score(index: int) -> float:
        values = [counts[word.lower()] * facts.rarity(word.lower()) for word in phrases[index]]
        return sum(values) / len(values)

    chosen: dict[int, str] = {}
    stems: set[str] = set()
    length = 0
    for index in sorted(range(len(phrases)), key=lambda i: (-score(i), i)):
        new = {stem(word.lower()): word for word in phrases[index]}
        said = [word for root, word in new.items() if root not in stems]
        if said and length + len(said) <= most:
            chosen[index] = " ".join(said)
            stems |= new.keys()
            length += len(said)
    return [chosen[index] for index in _apart([*chosen])]


def phrases_of(text: str, language: str, without: Collection[str] = ()) -> list[tuple[str, ...]]:
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
        is_content = _is_content(word, ignored) and not (language == "en" and _ADVERB.fullmatch(word))
        if not is_content or stem(word.lower()) in without:
            phrases.append(())  # Words on both sides of one that is left out are no pair.
            continue
        # A capital is kept where it marks a name.
        written = word.lower() if begins_sentence and word[1:].islower() else word
        if len(phrases[-1]) == 1 and between == " ":
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
