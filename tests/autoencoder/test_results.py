"""What explanations and scores show in a notebook."""

import re

import numpy as np
import pytest

from nla_jax.autoencoder.results import ROWS_SHOWN, Explanations, Scores
from nla_jax.lm.activations import Activations
from nla_jax.lm.tokenized import TokenizedText


def cells(html: str) -> list[list[str]]:
    """The texts of a table, row by row, markup taken out."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.S)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]


@pytest.fixture
def activations() -> Activations:
    nothing = (None,) * 3
    source = TokenizedText(
        "<a> b", (0, 1, 2), ("<", "a>", " b"), ((0, 1), (1, 3), (3, 5)), False, nothing, nothing, (True,) * 3
    )
    return Activations(np.ones((2, 4), np.float32), 5, source, (0, 2))


def test_explanations_are_a_table_of_tokens_and_samples(activations):
    explanations = Explanations(("<b>one</b>", None, "three", "four"), 2, activations)
    assert cells(explanations._repr_html_()) == [
        ["position", "token", "sample", "explanation"],
        ["0", "&#39;&lt;&#39;", "0", "&lt;b&gt;one&lt;/b&gt;"],
        ["0", "&#39;&lt;&#39;", "1", "(no closed explanation)"],
        ["2", "&#39; b&#39;", "0", "three"],
        ["2", "&#39; b&#39;", "1", "four"],
    ]


def test_explanations_of_plain_vectors_are_numbered_and_long_tables_are_cut():
    html = Explanations(("x",) * (ROWS_SHOWN + 3))._repr_html_()
    shown = cells(html)
    assert shown[:2] == [["row", "explanation"], ["0", "x"]] and len(shown) == ROWS_SHOWN + 1
    assert "and 3 more" in html


def test_scores_are_a_table_with_a_line_for_each_ar():
    def scores(*cosines: float, judges=None) -> Scores:
        cosine_N = np.array(cosines, np.float32)
        return Scores(cosine_N, 2 - 2 * cosine_N, 2 * cosine_N - 1, 0.25, "against <a mean>", judges or {})

    html = scores(0.5, 1.0, judges={"judge": scores(0.5, 0.5)})._repr_html_()
    assert cells(html) == [
        ["AR", "rows", "mean cosine", "mean fve_nrm", "fve_nrm of all rows together"],
        ["own", "2", "0.750", "0.500", "0.250"],
        ["judge", "2", "0.500", "0.000", "0.250"],
    ]
    assert "against &lt;a mean&gt;" in html


def test_scores_without_a_mean_have_dashes():
    unknown = Scores(np.array([0.5]), np.array([1.0]), None, None, "no mean")
    assert cells(unknown._repr_html_())[1] == ["own", "1", "0.500", "–", "–"]


def test_activations_show_their_text_with_the_chosen_tokens_marked(activations):
    html = activations._repr_html_()
    assert "2 of 3 tokens, layer 5, d 4" in html
    assert re.findall(r"<span[^>]*>(.*?)</span>", html) == ["&lt;", " b"]
    assert "a&gt;<span" in html


def test_of_a_long_text_the_part_around_the_chosen_tokens_is_shown():
    size = 3000
    nothing, spans = (None,) * size, tuple((i, i + 1) for i in range(size))
    text = "".join(chr(ord("a") + i % 26) for i in range(size))
    source = TokenizedText(
        text, tuple(range(size)), tuple(text), spans, False, nothing, nothing, (True,) * size
    )
    html = Activations(np.ones((1, 4), np.float32), 5, source, (2998,))._repr_html_()
    assert "tokens 2000 to 2999 are shown" in html
    assert re.findall(r"<span[^>]*>(.*?)</span>", html) == [text[2998]]
    assert re.sub(r"<p>.*?</p>|<.*?>", "", html) == text[2000:]
