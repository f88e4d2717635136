"""What of a context a statement is about, by the place."""

import pytest

from nla_jax.data.writers.statements.facts import Facts, place_of

CHAT = (
    "<|im_start|>system\nYou are a sailor.<|im_end|>\n<|im_start|>user\nHow deep is it? Tell me.<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def facts(context, place, **fields) -> Facts:
    return Facts("key", 0, context, place, **fields)


@pytest.mark.parametrize(
    "context",
    [
        CHAT,
        "<start_of_turn>system\nYou are a sailor.<end_of_turn>\n<start_of_turn>user\nHow deep is it? Tell me."
        "<end_of_turn>\n<start_of_turn>model\n",
    ],
)
def test_turns_come_without_what_a_template_writes(context):
    found = facts(context, "answer_start", role="assistant")
    assert [(role, text.strip()) for role, text in found.turns] == [
        ("system", "You are a sailor."),
        ("user", "How deep is it? Tell me."),
    ]
    assert found.system == "You are a sailor." and found.closed == "How deep is it? Tell me."


def test_the_turn_before_is_one_of_the_same_speaker():
    context = "<|a|>user\nOne.<|b|><|a|>assistant\nTwo.<|b|><|a|>user\nShorter.<|b|><|a|>assistant\n"
    assert facts(context, "answer_start", role="assistant").before == "One."
    assert facts("A plain text.", "sentence_end").before == ""


@pytest.mark.parametrize(
    ("context", "place", "closed"),
    [
        ("One ends. Two goes", "inside", "Two goes"),
        ("One ends. Two ends.", "sentence_end", "Two ends."),
        ("One ends.\nTwo of Dr. Who ends.\n", "line_end", "Two of Dr. Who ends."),
        ("A title\n\nthe text goes", "inside", "the text goes"),
        ("", "inside", ""),
    ],
)
def test_what_is_closed(context, place, closed):
    assert facts(context, place).closed == closed


def test_a_span_has_three_words_for_four_tokens():
    assert facts("a b c d e f g h", "span", span_tokens=4).closed == "f g h"
    assert facts("a b c d e f g h", "span", span_tokens=1).closed == "h"


@pytest.mark.parametrize(
    ("context", "place"),
    [("It ends.", "sentence_end"), ("It ends.\n", "line_end"), ("e.g", "inside"), ("", "inside")],
)
def test_places_are_told_by_the_text_where_no_column_tells_them(context, place):
    assert place_of(context) == place


def test_wordings_are_drawn_by_row_and_purpose():
    drawn = {
        purpose: [Facts(str(i), 0, "", "inside").choose("ab", purpose) for i in range(64)] for purpose in "xy"
    }
    assert drawn["x"] != drawn["y"] and all(20 < row.count("a") < 44 for row in drawn.values())
