"""Statements about one row, each a function from its facts to a short sentence, or None where there is none to make."""

from collections.abc import Callable, Mapping

from nla_jax.data.writers.statements.content import topic
from nla_jax.data.writers.statements.facts import Facts
from nla_jax.data.writers.statements.form import ending, syntax
from nla_jax.data.writers.statements.kind import kind, language
from nla_jax.data.writers.statements.next_words import next_words
from nla_jax.data.writers.statements.voice import speakers, tone

Statement = Callable[[Facts], str | None]

STATEMENTS: Mapping[str, Statement] = {
    "topic": topic,
    "next": next_words,
    "ending": ending,
    "kind": kind,
    "language": language,
    "speakers": speakers,
    "tone": tone,
    "syntax": syntax,
}
"""Name -> statement."""
