"""Tasks whose texts are read at the end of their last sentence.

All texts of a task end in the same mark, but for questions and statements, which differ in it.
"""

from collections.abc import Sequence

from nla_jax.evaluation.planted import fillers, sentence_fillers
from nla_jax.evaluation.planted.closing_tasks import counted, in_language, reviewed, told
from nla_jax.evaluation.planted.request_fillers import TOPICS
from nla_jax.evaluation.planted.task import Draw, Task

PLACE = "sentence_end"


def tasks() -> list[Task]:
    """The tasks, each read at the last token of a sentence."""
    return [
        Task(
            name="language of the sentence",
            question="What language is the text in?",
            answers={name: name for name in fillers.LANGUAGES},
            write=lambda draw, label: in_language(draw, fillers.LANGUAGES[label]),
            place=PLACE,
        ),
        Task(
            name="tense of the sentence",
            question="Does the text tell of the past, the present or the future?",
            answers={"past": "the past", "present": "the present", "future": "the future"},
            write=lambda draw, label: told(draw, ("past", "present", "future").index(label)),
            place=PLACE,
        ),
        Task(
            name="number in the sentence",
            question="Is the text about one thing or about several?",
            answers={"one": "one thing", "several": "several things"},
            write=lambda draw, label: counted(draw, label == "several"),
            place=PLACE,
        ),
        Task(
            name="sentiment of the sentence",
            question="Does the writer like it or not?",
            answers={"likes": "the writer likes it", "dislikes": "the writer dislikes it"},
            write=lambda draw, label: reviewed(draw, label == "likes"),
            place=PLACE,
        ),
        Task(
            name="person",
            question="Who is the text about?",
            answers={"I": "the writer", "you": "the reader", "others": "other people"},
            write=_of_person,
            place=PLACE,
        ),
        Task(
            name="topic of the sentence",
            question="What is the text about?",
            answers={name: name for name in TOPICS},
            write=_on_topic,
            place=PLACE,
        ),
        Task(
            name="register",
            question="What style is the text written in?",
            answers={name: f"in a {name} style" for name in sentence_fillers.REGISTERS},
            write=lambda draw, label: _some(draw, sentence_fillers.REGISTERS[label]),
            place=PLACE,
        ),
        Task(
            name="kind of text",
            question="What kind of text is it?",
            answers={name: name for name in sentence_fillers.KINDS},
            write=lambda draw, label: _some(draw, sentence_fillers.KINDS[label]),
            place=PLACE,
        ),
        Task(
            name="question or statement",
            question="Does the text end with a question or with a statement?",
            answers={"question": "with a question", "statement": "with a statement"},
            write=_asked_or_stated,
            place=PLACE,
        ),
        Task(
            name="open quotation",
            question="Is somebody still speaking where the text ends?",
            answers={"open": "yes, the quotation is open", "closed": "no, the quotation has ended"},
            write=_quoted,
            place=PLACE,
        ),
    ]


def _some(draw: Draw, sentences: Sequence[str]) -> str:
    return " ".join(draw.some(sentences, 2, 4))


def _of_person(draw: Draw, label: str) -> str:
    sentences = [
        f"{draw.rng.choice(sentence_fillers.PERSONS[label])} {deed} in {draw.one(fillers.PLACES)}."
        for deed in draw.some(sentence_fillers.DEEDS, 2, 5)
    ]
    return " ".join(
        sentence[:1].upper() + sentence[1:]
        for sentence in (one.format(name=draw.one(fillers.NAMES)) for one in sentences)
    )


def _on_topic(draw: Draw, topic: str) -> str:
    things = draw.some(TOPICS[topic], 2, 4)
    frames = draw.some(sentence_fillers.ON_TOPICS, 4, 4)
    return " ".join(
        frame.format(thing=thing, name=draw.one(fillers.NAMES))
        for frame, thing in zip(frames, things, strict=False)
    )


def _asked_or_stated(draw: Draw, label: str) -> str:
    def pair() -> tuple[str, str]:
        question, statement = draw.one(sentence_fillers.QUESTIONS)
        name, place = draw.one(fillers.NAMES), draw.one(fillers.PLACES)
        return question.format(name=name, place=place), statement.format(name=name, place=place)

    # What comes before the last sentence is of both kinds, so that only the end tells the label.
    before = [pair()[draw.rng.integers(2)] for _ in range(draw.rng.integers(1, 4))]
    return " ".join([*before, pair()[label == "statement"]])


def _quoted(draw: Draw, label: str) -> str:
    name, other = draw.some(fillers.NAMES, 2, 2)
    saying = draw.one(sentence_fillers.SAYING).format(name=name, other=other)
    sentences = draw.some(sentence_fillers.SPOKEN, 3, 5)
    end = len(sentences) if label == "open" else int(draw.rng.integers(1, len(sentences)))
    said, after = " ".join(sentences[:end]), sentences[end:]
    return f'{saying}: "{said}' if label == "open" else " ".join([f'{saying}: "{said}"', *after])
