import json

import numpy as np
import pytest

from nla_jax.evaluation import chat_questions


class Scripted:
    """A chat model that is a function."""

    name = "scripted"

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, prompts, *, max_tokens, desc=None):
        self.asked += prompts
        return [self.answer(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("reply", "place"),
    [
        ("B", 1),
        ("b.", 1),
        ("(C) because it rains", 2),
        ("**D**", 3),
        ("B) in the mountains\nNot A) at the sea", 1),
        ("The answer is C, not the others.", 2),
        ("Answer: (D)", 3),
        ("I would say D) here", 3),
        ("<think>A or B? The answer is A.</think>\nB", 1),
        ("A text about ships", None),
        ("I think that it rains", None),
        ("It is A) or B)", None),
        ("B) Over a lake.", 1),
        ("B) at the sea", None),
        ("At the sea.", 0),
        ("in the mountains", None),
        ("E", None),
        ("", None),
    ],
)
def test_options_are_read(reply, place):
    assert (
        chat_questions.place_of(reply, ["at the sea", "over a lake", "in the mountains", "in the mountains"])
        == place
    )


def test_options_stand_in_keyed_random_order():
    """Whoever finds the word finds the option, whoever likes a letter is right by chance."""
    options = [["yes", "no", "perhaps", "never"]] * 40
    keys, told = [f"row {i}" for i in range(40)], {"AV": ["Notes: yes\n"] * 40, "guess": [""] * 40}

    def read(prompt):
        if prompt.startswith("Notes"):
            return next(line[0] for line in prompt.splitlines() if line.endswith(") yes"))
        return "A"

    model = Scripted(read)
    found = chat_questions.choices(model, told, "Does it?", options, keys, seed=0)
    assert found["AV"].tolist() == [0] * 40
    assert set(found["guess"].tolist()) == {0, 1, 2, 3}
    assert model.asked[0].removeprefix("Notes: yes\n") == model.asked[40]
    again = chat_questions.choices(
        Scripted(read), {"guess": [""] * 39}, "Does it?", options[1:], keys[1:], seed=0
    )
    np.testing.assert_array_equal(again["guess"], found["guess"][1:])
    other = chat_questions.choices(Scripted(read), told, "Does it?", options, keys, seed=1)
    assert other["guess"].tolist() != found["guess"].tolist()
    mute = chat_questions.choices(Scripted(lambda prompt: "no idea"), told, "Does it?", options, keys, seed=0)
    assert mute["AV"].tolist() == [-1] * 40


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ('[{"kind": "theme", "claim": "ships"}]', [("theme", "ships")]),
        ('Here:\n```json\n[{"kind": "detail", "claim": "[sic]"}]\n```', [("detail", "[sic]")]),
        ("[]", []),
        ('[{"kind": "mood", "claim": "ships"}]', None),
        ('[{"kind": "theme", "claim": ""}]', None),
        ('[{"kind": ["theme"], "claim": "x"}]', None),
        ('["ships"]', None),
        ('[{"kind": "theme", "claim": "shi', None),
        ('{"kind": "theme", "claim": "ships"}', None),
        ("It claims nothing.", None),
    ],
)
def test_lists_of_claims_are_read_or_refused(reply, read):
    assert chat_questions.claims_of(reply) == read


def test_verdicts_are_read_whole_or_not_at_all():
    both = json.dumps(["supported", "not stated"])
    assert chat_questions.verdicts_of(f"Sure: {both}", 2) == ["supported", "not stated"]
    assert chat_questions.verdicts_of(both, 3) == [None] * 3
    assert chat_questions.verdicts_of('["true"]', 1) == [None]
    assert chat_questions.verdicts_of('[["supported"]]', 1) == [None]
    assert chat_questions.verdicts_of("supported", 1) == [None]


def test_failed_texts_and_texts_without_claims_are_not_asked_about():
    model = Scripted(
        lambda prompt: "[]" if "empty" in prompt else '[{"kind": "theme", "claim": "ships {x}"}]'
    )
    found = chat_questions.claims(model, ["a {brace}", None, "empty"])
    assert found == [[("theme", "ships {x}")], [], []] and len(model.asked) == 2
    model = Scripted(lambda prompt: '["supported"]')
    assert chat_questions.verdicts(model, found, ["t", "u", "v"]) == [["supported"], [], []]
    assert len(model.asked) == 1 and "1. ships {x}" in model.asked[0]
