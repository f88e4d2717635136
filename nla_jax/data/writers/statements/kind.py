"""What kind of text it is, and in which language and register."""

import re

from nla_jax.data.writers.statements.facts import Facts
from nla_jax.data.writers.statements.languages import language_name, language_of
from nla_jax.text_analysis import words

_CODE = {
    "Python code": r"^\s*(?:def \w+\(|class \w+[:(]|import \w|from \w[\w.]* import|elif |return |@\w+|self\.)|:\s*$",
    "JavaScript": r"\b(?:const|let|var) \w+ =|=>\s*[{(]|\bfunction\b.*\{|console\.",
    "C code": r"^\s*#include|\bint main\(|->\w+|\b(?:void|int|char|double) \*?\w+ ?[(;=]",
    "SQL": r"^\s*(?:SELECT|INSERT|UPDATE|CREATE TABLE|FROM|WHERE|JOIN|GROUP BY)\b",
    "HTML": r"</?(?:div|p|a|span|html|body|head|ul|li|table|tr|td|h\d)\b[^>]*>",
    "JSON": r"^\s*\"[\w-]+\"\s*:|^\s*[\]}],?\s*$",
    "shell commands": r"^\s*(?:\$ |sudo |pip install|cd |git |echo |export )",
}
_LEAST_LINES = {"Python code": 3}
"""How many lines speak for it; 2 for the others."""
_FORMS = {
    "letter": r"^\s*(?:Dear|Sehr geehrte|Liebe|Chère?|Cher|Estimad[oa]) .{1,40},"
    r"|^\s*(?:Sincerely|Best regards|Yours)\b",
    "dialogue": r"[\"”,]\s*(?:he|she|I|they|\w+) (?:said|asked|replied|cried|answered|whispered)\b|[\"”]\s+[\"“]",
    "numbered list": r"(?:^\s*\d{1,2}[.)] .*\n?){2}",
    "bullet list": r"(?:^\s*[-*•] .*\n?){2}",
    "table": r"(?:^.*\|.*\|.*\n?){2}",
}
_REQUESTS = {
    "translation request": r"\btranslate\b",
    "request to correct": r"\b(?:correct|proofread|fix|debug|improve) (?:this|my|the)\b",
    "request to rewrite": r"\b(?:rewrite|rephrase|paraphrase|edit)\b",
    "summary request": r"\bsummar(?:y|i[sz]e)\b",
    "coding request": r"\b(?:code|function|script|program|class|python|javascript|sql|regex|bash)\b",
    "letter to write": r"\bwrite\b.{0,40}\b(?:letter|e-?mail|message|note|reply|invitation|speech)\b",
    "poem to write": r"\b(?:poem|haiku|song|lyrics|rhyme|limerick)\b",
    "story to write": r"\b(?:story|tale|scene|dialogue|fairy)\b",
    "text to write": r"\b(?:write|draft|compose)\b",
    "list request": r"\b(?:list|name|give me \w+|suggest|make a table|recommend)\b",
    "comparison": r"\b(?:compare|difference between|different from|versus|better than)\b",
    "explanation request": r"\b(?:explain|describe|define|teach me|what does .* mean)\b",
    "calculation": r"\b(?:how many|how much|calculate|solve|percent|sum of)\b|\d\s*[-+*/x]\s*\d",
    "plan request": r"\b(?:plan|prepare|schedule|organi[sz]e|help me)\b",
    "advice wanted": r"\b(?:should i|advice|what can i do|worried|how do i|how can i)\b",
    "true-or-false question": r"\b(?:is it true|true or false)\b",
    "why question": r"^\W*why\b",
    "how question": r"^\W*how\b",
    "who question": r"^\W*who\b",
    "where question": r"^\W*where\b",
    "when question": r"^\W*when\b",
    "what question": r"^\W*(?:what|which)\b",
    "yes-no question": r"^\W*(?:is|are|do|does|did|can|could|should|will|would|has|have)\b.*\?",
    "question": r"[?？]\s*$",
}
"""What a user wants, the more special first."""
_PATTERNS = {
    name: re.compile(pattern, re.MULTILINE | re.IGNORECASE)
    for name, pattern in {**_FORMS, **_REQUESTS}.items()
}
_CODE_PATTERNS = {name: re.compile(pattern, re.MULTILINE) for name, pattern in _CODE.items()}
_TECHNICAL = re.compile(
    r"\b(?:arguments?|parameters?|functions?|methods?|class(?:es)?|modules?|attributes?|callables?|arrays?|strings?|"
    r"instances?|objects?|returns?|raises|default|dtypes?|tensors?|iterables?|exceptions?)\b|\w_\w|`"
)
_CASUAL = re.compile(
    r"\b(?:gonna|wanna|gotta|kinda|yeah|hey|hi|lol|stuff|guys|cool|awesome|ok|okay|dude|btw|nope|yep)\b|\w+n['’]t\b|"
    r"\b(?:I|you|we|they)['’](?:m|ll|re|ve|d)\b",
    re.IGNORECASE,
)
_REQUEST_GENRE = re.compile(r"request\b.*\((\w+)\)")
"""The genre of a request that the corpus made, with its kind in brackets."""
_GENRE = re.compile(r"[A-Za-z][\w .,&-]{1,23}")
_TECHNICAL_WORDS = 3
"""How many of them make documentation."""
_READ = 400
"""Characters at the end of a text by which its form is told."""


def kind(facts: Facts) -> str | None:
    """The `kind_of` a text as a sentence of its own."""
    name = kind_of(facts)
    if name is None:
        return None
    return facts.choose(("{}.", "Kind: {}."), "kind").format(name)


def kind_of(facts: Facts) -> str | None:
    """What kind of text it is: code, a form such as a list, what a user wants, or where the text comes from.

    Inside a sentence only forms are told that are not plain prose.
    """
    found = code_language(facts.said) or form_of(facts.said)
    if found is None and not facts.is_inside:
        found = _wanted(facts) if facts.is_chat else origin_of(facts)
    return None if found is None else found[0].upper() + found[1:]


def _wanted(facts: Facts) -> str | None:
    """What the user wants, by the genre of requests where their words tell no more than that they ask.

    None in turns of others, but for the start of an answer, where the user spoke last.
    """
    if facts.role != "user" and facts.place != "answer_start":
        return None
    found, genre = request_of(facts.said), _REQUEST_GENRE.fullmatch(facts.genre)
    return f"{genre[1]} request" if genre and found in (None, "question") else found


def origin_of(facts: Facts) -> str | None:
    """Where a text comes from, by its genre; documentation is told by its words. None where the genre is no name."""
    if not _GENRE.fullmatch(facts.genre):
        return None
    name = facts.genre.replace("_", " ")
    return f"{name} documentation" if is_technical(facts.said) else name


def is_technical(text: str) -> bool:
    """Whether the end of a text has the words of documentation of programs."""
    return len(_TECHNICAL.findall(text[-_READ:])) >= _TECHNICAL_WORDS


def code_language(text: str) -> str | None:
    """The programming language of code at the end of a text; None where there is no code."""
    lines = text[-_READ:].splitlines()
    for name, pattern in _CODE_PATTERNS.items():
        if sum(pattern.search(line) is not None for line in lines) >= _LEAST_LINES.get(name, 2):
            return name
    return None


def form_of(text: str) -> str | None:
    """The form at the end of a text: a letter, a dialogue, a list or a table; None for plain prose."""
    return next((name for name in _FORMS if _PATTERNS[name].search(text[-_READ:])), None)


def request_of(text: str) -> str | None:
    """What the user of a chat wants, told by English words; None where nothing tells it."""
    return next((name for name in _REQUESTS if _PATTERNS[name].search(text)), None)


def language(facts: Facts) -> str | None:
    """The language where it is not English, and the register where it is casual."""
    code = language_of(facts.said)
    if code not in ("", "en"):
        name = language_name(code) or "Another language"
        return facts.choose(("{}.", "In {}.", "{} text.", "Written in {}."), "language").format(name)
    casual = _CASUAL.findall(facts.said[-_READ:])
    if code == "en" and len(casual) >= 2 and len(casual) > 0.03 * len(words(facts.said[-_READ:])):
        return facts.choose(("Casual English.", "Colloquial.", "Informal wording."), "language")
    return None
