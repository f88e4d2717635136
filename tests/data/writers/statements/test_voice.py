"""Speakers and tones."""

import pytest

from nla_jax.data.writers.statements.facts import Facts
from nla_jax.data.writers.statements.voice import speakers, tone


def facts(context, place="sentence_end", **fields) -> Facts:
    return Facts("key", 0, context, place, **fields)


def chat(system: str, *turns: str) -> Facts:
    parts = [("system", system)] if system else []
    parts += [(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in parts)
    return facts(f"{text}<|im_start|>assistant\n", "answer_start", role="assistant", turn=len(parts))


def test_who_speaks():
    assert speakers(facts("It rained.")) is None
    assert speakers(facts("It rained.", "turn_end", role="user")).startswith("User ")
    assert speakers(facts("It rained", "inside", role="assistant")).count("Assistant") == 1
    assert speakers(facts("It rained", "inside", role="user")) is None
    assert speakers(facts("It rained", "inside", role="system")).count("System prompt") == 1


def test_before_an_answer_only_what_is_special_is_said():
    assert speakers(chat("", "Hello.")) is None
    assert speakers(chat("You are a helpful AI assistant.", "Hello.")) is None
    assert "pirate" in speakers(chat("You are a pirate.", "Hello."))
    assert speakers(chat("", "Hello.", "Hi.", "Shorter.")) in ("Follow-up.", "Later turn.")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Could you open it, please?", "polite"),
        ("Perhaps it is late.", "doubtful"),
        ("Run to the house now!!", "excited"),
        ("Der Zug kommt bitte nicht zu spät, und ich bin sehr froh.", "polite"),
    ],
)
def test_manners(text, found):
    assert found in tone(facts(text)).lower()


def test_sentiment_is_told_where_it_is_strong():
    good = tone(facts("I love this wonderful place and the happy people."))
    bad = tone(facts("I hate this terrible place and the awful food."))
    assert any(word in good.lower() for word in ("positive", "favorable", "warm"))
    assert any(word in bad.lower() for word in ("negative", "critical", "gloomy"))
    assert tone(facts("The table is in the room.")) is None
    # Documentation has words that are no feelings there.
    assert (
        tone(facts("Returns the best value of the function, or raises an error for a bad argument.")) is None
    )
