"""Which documents a corpus keeps by their length and language."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from nla_jax.data.corpora.documents import Document

CHARACTERS_READ = 600
"""Characters from the middle of a text that its language is told by."""


def filter_documents(
    documents: Iterable[Document],
    *,
    min_characters: int,
    max_characters: int | None,
    languages: Sequence[str],
    notices: Counter[str],
) -> Iterator[Document]:
    """Yield the documents of the right length and language.

    Args:
      documents: in any order; what becomes of one does not depend on the others.
      min_characters: shorter texts are left out.
      max_characters: longer texts are left out; None for no bound.
      languages: codes of ISO 639-1, such as en; texts in other languages are left out. All where none is named.
      notices: what was left out is counted here.

    Raises:
      ValueError: a language that cannot be told.
      ModuleNotFoundError: languages are named, and the package `py3langid` is not installed.
    """
    language_of = language_identifier(tuple(languages)) if languages else None
    for document in documents:
        characters = len(document.text)
        if characters < min_characters:
            notices[f"documents of fewer than {min_characters} characters, left out"] += 1
        elif max_characters is not None and characters > max_characters:
            notices[f"documents of more than {max_characters} characters, left out"] += 1
        elif language_of is not None and language_of(_middle(document.text)) not in languages:
            notices["documents in other languages, left out"] += 1
        else:
            yield document


def _middle(text: str) -> str:
    start = max(0, (len(text) - CHARACTERS_READ) // 2)
    return text[start : start + CHARACTERS_READ]


@functools.lru_cache(maxsize=1)
def language_identifier(languages: tuple[str, ...] = ()) -> Callable[[str], str]:
    """What tells the language of a text, as a code of ISO 639-1, among all languages that are known.

    Args:
      languages: codes that have to be among them.

    Raises:
      ModuleNotFoundError: the package `py3langid` is not installed.
      ValueError: a language that is not known.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "languages are told by the optional package `py3langid`; run `pip install py3langid`"
        ) from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    known = sorted(identifier.labels)
    if unknown := sorted(set(languages) - set(known)):
        raise ValueError(
            f"corpus.languages names {', '.join(unknown)}; the languages that can be told are {', '.join(known)}"
        )
    return lambda text: str(identifier.classify(text)[0])
