"""Pieces of HTML: what they hold and what they escape."""

import pytest

from nla_jax.html import marked_text, number, pieces, table, tint


def test_numbers_and_colours():
    assert [number(value) for value in (0.12345, -2.0, None, float("nan"))] == ["0.123", "−2.000", "–", "–"]
    assert tint(None) == tint(float("nan")) == "transparent"
    assert tint(0.5) == "rgba(56, 132, 220, 0.375)"
    assert tint(-4.0) == "rgba(226, 120, 36, 0.750)"


@pytest.mark.parametrize(
    ("spans", "cut", "after"),
    [
        ([(0, 1), (1, 3)], [("", "a"), ("", " b")], "  c"),
        ([(0, 1), (2, 3), (5, 6)], [("", "a"), (" ", "b"), ("  ", "c")], ""),
        ([(0, 0), (0, 3), (0, 3), (2, 6)], [("", ""), ("", "a b"), ("", ""), ("", "  c")], ""),
    ],
)
def test_pieces_give_the_text_in_order(spans, cut, after):
    assert pieces("a b  c", spans) == (cut, after)
    assert "".join(before + own for before, own in cut) + after == "a b  c"


def test_marked_tokens_are_escaped_and_marked():
    html = marked_text("<a> & b", [(0, 3), (3, 5), (5, 7)], {1})
    assert html.count("<span") == 1
    assert "&lt;a&gt;<span" in html and "> &amp;</span> b</div>" in html


def test_a_table_escapes_and_aligns():
    html = table(("x", "<y>"), [(1, "<i>"), (0.5, None)], "a & b")
    assert '<th style="text-align: left">&lt;y&gt;</th>' in html and "<i>" not in html
    assert (
        '<td style="text-align: right">1</td>' in html and '<td style="text-align: right">0.500</td>' in html
    )
    assert html.endswith("<p>a &amp; b</p>")
