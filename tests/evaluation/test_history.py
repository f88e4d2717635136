import json

import pytest

from nla_jax.evaluation.history import as_text, changes, histories, read_history


def row(text, cosine=0.5, name="doc@60"):
    return {
        "id": name,
        "place": "line_end",
        "context_tail": "as he said:\n",
        "writer_text": "It lists words.",
        "text": text,
        "cosine": cosine,
    }


def line(step, *rows):
    return {"stage": "rl", "step": step, "rows": list(rows)}


@pytest.mark.parametrize(
    ("before", "after", "pieces"),
    [
        ("a b c", "a b c", (("a b c", False),)),
        ("a b c", "a x y c", (("a ", False), ("x y ", True), ("c", False))),
        # Blanks are kept and not compared.
        ("a b", "  a\nb c", (("  ", True), ("a\nb ", False), ("c", True))),
        ("a b", "b", (("b", False),)),
        (None, "a b", (("a b", True),)),
        ("a b", None, ()),
    ],
)
def test_words_that_are_new_are_told(before, after, pieces):
    assert changes(before, after) == pieces
    assert "".join(part for part, _ in pieces) == (after or "")


def test_equal_texts_in_a_row_are_one_version():
    lines = [
        line(0, row("A b.", 0.1)),
        line(4, row("A b.", 0.1)),
        line(8, row(None, None)),
        line(12, row("A c.", 0.4)),
    ]
    (watched,) = histories(lines)
    assert (watched.id, watched.place, watched.writer_text) == ("doc@60", "line_end", "It lists words.")
    assert [(one.steps, one.text, one.cosine) for one in watched.versions] == [
        ("0 to 4", "A b.", 0.1),
        ("8", None, None),
        ("12", "A c.", 0.4),
    ]
    # Nothing came before the first text; the last stands against one that failed.
    assert watched.versions[0].pieces == (("A b.", False),)
    assert watched.versions[2].pieces == (("A c.", True),)


def test_each_activation_has_a_history_of_its_own():
    lines = [line(step, row(f"x {step}", name="a@1"), row("y", name="b@2")) for step in (0, 4)]
    assert [(one.id, len(one.versions)) for one in histories(lines)] == [("a@1", 2), ("b@2", 1)]


def test_a_terminal_shows_what_is_new_in_brackets(tmp_path):
    lines = [line(0, row("It ends.")), line(4, row("It stops. Now", None)), line(8, row(None, None))]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert as_text(read_history(tmp_path)).splitlines() == [
        "doc@60, line_end: ...'as he said:\\n'",
        "  writer: It lists words.",
        "  0 (cosine 0.50): It ends.",
        "  4: It [stops. Now]",
        "  8: (none could be read)",
    ]


def test_a_run_without_texts_has_no_history(tmp_path):
    assert read_history(tmp_path) == [] and as_text([]) == ""
