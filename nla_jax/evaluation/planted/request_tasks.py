"""Tasks about a user's request in the target's chat template, read where the assistant's answer begins.

Nothing but what the template writes stands between the request and the token that is read at the answer's start.
"""

from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from nla_jax.evaluation.planted import fillers, request_fillers
from nla_jax.evaluation.planted.closing_tasks import REASONS, hinted, refused
from nla_jax.evaluation.planted.task import LETTERS, Draw, Task
from nla_jax.lm.chat_template import Message
from nla_jax.lm.tokenized import tokenize_chat

PLACE = "answer_start"


def tasks(tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    """The tasks, in the chat template of a tokenizer; one with a system prompt only where the template takes those."""

    def asked(
        name: str,
        question: str,
        answers: Mapping[str, str],
        write: Callable[[Draw, str], str],
        chat: Callable[[str], tuple[Message, ...]] = _of_user,
    ) -> Task:
        return Task(name, question, answers, write, PLACE, chat=chat, tokenizer=tokenizer)

    found = [
        asked(
            "language of the request",
            "What language does the user write in?",
            {name: name for name in request_fillers.REQUESTS_IN},
            _in_language,
        ),
        asked(
            "what is wanted",
            "What does the user want?",
            {name: name for name in request_fillers.WANTED},
            lambda draw, label: _request(draw, _on_theme(draw, request_fillers.WANTED[label], 1, 2)),
        ),
        asked(
            "topic of the request",
            "What is the request about?",
            {name: name for name in request_fillers.TOPICS},
            _on_topic,
        ),
        asked(
            "tone of the user",
            "How does the user sound?",
            {name: name for name in request_fillers.TONES},
            lambda draw, label: _request(
                draw,
                [
                    *draw.some(request_fillers.TONES[label], 2, 3),
                    *_on_theme(draw, request_fillers.ON_THEMES, 1, 2),
                ],
            ),
        ),
        asked(
            "harm",
            "Is the request harmful or harmless?",
            {name: name for name in request_fillers.HARM},
            _harm,
        ),
        asked(
            "form of the answer",
            "In which form does the user want the answer?",
            {name: name for name in request_fillers.FORMATS},
            lambda draw, label: _request(
                draw,
                [
                    *_on_theme(draw, request_fillers.ON_THEMES, 1, 2),
                    *draw.some(request_fillers.FORMATS[label], 1, 2),
                ],
            ),
        ),
        asked(
            "length of the answer",
            "Does the user want a short or a long answer?",
            {"short": "a short answer", "long": "a long answer"},
            lambda draw, label: _request(
                draw,
                [
                    *_on_theme(draw, request_fillers.ON_THEMES, 1, 2),
                    *draw.some(request_fillers.LENGTHS[label], 1, 2),
                ],
            ),
        ),
        asked(
            "form of the request",
            "What does the user do?",
            {name: f"the user {name}" for name in request_fillers.FORMS},
            lambda draw, label: " ".join(_on_theme(draw, request_fillers.FORMS[label], 1, 4)),
        ),
        asked(
            "option hinted in a chat",
            "Which option does the user suggest?",
            {letter: f"option {letter}" for letter in LETTERS},
            hinted,
        ),
    ]
    if _takes_system_prompts(tokenizer):
        found.append(
            asked(
                "system prompt that refuses",
                "Why will the assistant not give a full answer?",
                REASONS,
                lambda draw, label: "\n".join(refused(draw, label)),
                _of_system_and_user,
            )
        )
    return found


def _takes_system_prompts(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        tokenize_chat(tokenizer, _of_system_and_user("Be brief.\nHello."))
    except ValueError:
        return False
    return True


def _of_user(written: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": written},)


def _of_system_and_user(written: str) -> tuple[Message, ...]:
    """A chat of which the first line is the system prompt."""
    system, _, request = written.partition("\n")
    return ({"role": "system", "content": system}, {"role": "user", "content": request})


def _request(draw: Draw, sentences: Sequence[str]) -> str:
    """The sentences with others before or after them that tell nothing."""
    asides = [
        aside.format(name=draw.one(fillers.NAMES), place=draw.one(fillers.PLACES))
        for aside in draw.some(request_fillers.ASIDES, 0, 3)
    ]
    before = int(draw.rng.integers(len(asides) + 1))
    return " ".join([*asides[:before], *sentences, *asides[before:]])


def _on_theme(draw: Draw, templates: Sequence[str], least: int, most: int) -> list[str]:
    """Sentences about one theme."""
    theme = draw.one(request_fillers.THEMES)
    return [
        (text[:1].upper() + text[1:])
        for text in (
            one.format(theme=theme, name=draw.one(fillers.NAMES), place=draw.one(fillers.PLACES))
            for one in draw.some(templates, least, most)
        )
    ]


def _in_language(draw: Draw, label: str) -> str:
    chosen = draw.some(request_fillers.REQUESTS_IN[label], 1, 3)
    return " ".join(
        one.format(name=draw.one(fillers.NAMES), place=draw.one(fillers.PLACES)) for one in chosen
    )


def _on_topic(draw: Draw, label: str) -> str:
    things = draw.some(request_fillers.TOPICS[label], 1, 3)
    frames = draw.some(request_fillers.ABOUT_TOPICS, 3, 3)
    return " ".join(
        frame.format(thing=thing, name=draw.one(fillers.NAMES))
        for frame, thing in zip(frames, things, strict=False)
    )


def _harm(draw: Draw, label: str) -> str:
    chosen = draw.some(request_fillers.HARM[label], 1, 2)
    return _request(draw, [one.format(person=draw.one(request_fillers.PERSONS)) for one in chosen])
