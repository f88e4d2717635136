import pytest

from nla_jax.evaluation.text_probe import (
    FEWEST_EXAMPLES,
    predicted_labels,
    teachable,
    text_probe_accuracy,
)

SHIPS = ["A letter about a ship.", "The ship is late.", "Somebody praises a ship.", "One more ship."]
BREAD = ["A letter about bread.", "The bread is late.", "Somebody praises bread.", "One more bread."]
LABELS = ["ships"] * 4 + ["bread"] * 4


def test_a_word_that_goes_with_a_label_tells_it_in_other_texts():
    asked = ["Nobody saw the ship.", "It smells of bread here.", "A ship", "Bread!"]
    assert predicted_labels(asked, SHIPS + BREAD, LABELS).tolist() == ["ships", "bread", "ships", "bread"]
    assert text_probe_accuracy(asked, ["ships", "bread", "ships", "ships"], SHIPS + BREAD, LABELS) == 0.75


def test_the_order_of_two_words_tells_a_label_where_the_words_do_not():
    taught = ["very old and then so", "so it is very old"] * 4 + [
        "old very and then so",
        "so it is old very",
    ] * 4
    labels = ["one"] * 8 + ["two"] * 8
    assert predicted_labels(["a very old b", "a old very b"], taught, labels).tolist() == ["one", "two"]


def test_texts_that_failed_have_no_words():
    taught = [*SHIPS, *BREAD, None]
    assert predicted_labels(["a ship", None], taught, [*LABELS, "bread"])[0] == "ships"
    # Without any word the commonest label is all there is.
    assert predicted_labels([None, "a ship"], [None] * 9, [*LABELS, "bread"]).tolist() == ["bread", "bread"]


def test_too_few_examples_and_one_label_are_refused():
    assert FEWEST_EXAMPLES == 4 and teachable(LABELS) and not teachable(LABELS[:-1])
    assert teachable([*LABELS, "rare"]) and not teachable(["ships"] * 20)
    with pytest.raises(ValueError, match=r"learns from \{'ships': 4, 'bread': 3\}.*evaluation.task_taught"):
        predicted_labels(["a ship"], (SHIPS + BREAD)[:-1], LABELS[:-1])
    with pytest.raises(ValueError, match="8 texts with 7 labels teach"):
        predicted_labels(["a ship"], SHIPS + BREAD, LABELS[:-1])
    with pytest.raises(ValueError, match="0 texts with 0 labels are asked about"):
        text_probe_accuracy([], [], SHIPS + BREAD, LABELS)
    with pytest.raises(ValueError, match="1 texts with 2 labels are asked about"):
        text_probe_accuracy(["a ship"], ["ships", "bread"], SHIPS + BREAD, LABELS)
