"""Languages of texts: which one a text is in, its name, and its function words."""

import functools
import re

from nla_jax.data.corpora.filters import CHARACTERS_READ, language_identifier
from nla_jax.text_analysis import words

_ENGLISH_CONTENT = frozenset(
    words(
        "amount bill bottom cry describe detail empty fifteen fifty fill find fire front full hundred interest mill "
        "move name serious show side sincere sixty system thick thin top twelve twenty"
    )
)
"""Words of the English list that say something."""
_ENGLISH_FORMS = frozenset(
    words(
        "ain aren couldn d did didn does doesn doing don explain give going got hadn hasn haven having i'd i'll i'm "
        "i've isn just know let like ll m ma make makes mightn mustn need needn oh ok okay s said say says shan "
        "shouldn t tell that's there's thing things told use used using ve want wasn way weren won wouldn write yes"
    )
)
"""Words that say nothing and are not on the list."""
_ENGLISH_SHARE, _OTHER_SHARE = 0.2, 0.12
"""Least shares of function words in a text of a language that is written with blanks."""
_FEWEST_LATIN, _FEWEST_OTHERS = 12, 4
"""Letters below which no language is told, in Latin script and in others."""
_NAMES = {"nb": "norwegian", "nn": "norwegian", "no": "norwegian", "ms": "malay"}
_OTHER = {"no": "nb", "nn": "nb"}
"""Codes that the stop words of another one serve."""
_LETTER = re.compile(r"[^\W\d_]")


@functools.lru_cache(maxsize=256)
def language_of(text: str) -> str:
    """The language of a text as a code of ISO 639-1; empty where too little speaks for any, as in code.

    Plain English is told by its function words. Other texts are told by `py3langid`, and those in Latin letters need
    function words of that language as well.
    """
    part = text[-CHARACTERS_READ:]
    said = words(part)
    if part.isascii() and len(said) > 4 and _share(said, "en") >= _ENGLISH_SHARE:
        return "en"
    letters = _LETTER.findall(part)
    is_latin = sum(letter < "\u0250" for letter in letters) >= len(letters) / 2
    if len(letters) < (_FEWEST_LATIN if is_latin else _FEWEST_OTHERS):
        return ""
    found = language_identifier()(part)
    least = _ENGLISH_SHARE if found == "en" else _OTHER_SHARE
    return found if not is_latin or _share(said, found) >= least else ""


def _share(said: list[str], language: str) -> float:
    """The share of a language's function words among words."""
    ignored = stop_words(language)
    return sum(word in ignored for word in said) / max(len(said), 1)


@functools.cache
def stop_words(language: str) -> frozenset[str]:
    """The function words of a language, in lower case; none where no list of the language is known.

    Args:
      language: a code of ISO 639-1; empty stands for English.
    """
    # These packages are slow to import.
    if language in ("", "en"):
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

        return (ENGLISH_STOP_WORDS - _ENGLISH_CONTENT) | _ENGLISH_FORMS
    from stop_words import LANGUAGE_MAPPING, get_stop_words

    code = _OTHER.get(language, language)
    return frozenset(get_stop_words(code)) if code in LANGUAGE_MAPPING else frozenset()


def language_name(language: str) -> str | None:
    """The English name of a language, with a capital; None where it is not known."""
    from stop_words import LANGUAGE_MAPPING

    name = _NAMES.get(language) or LANGUAGE_MAPPING.get(language)
    return name and name.capitalize()
