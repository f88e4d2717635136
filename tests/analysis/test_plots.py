"""Plots of a row of tokens: heights, labels and refusals."""

import matplotlib
import numpy as np
import pytest

from nla_jax.analysis.plots import plot_tokens
from nla_jax.autoencoder.results import Explanations, Scores
from nla_jax.lm.activations import Activations
from nla_jax.lm.tokenized import TokenizedText

matplotlib.use("agg")


@pytest.fixture
def explanations() -> Explanations:
    nothing = (None, None)
    source = TokenizedText(
        "$a b$", (0, 1), ("$a", " b$"), ((0, 2), (2, 5)), False, nothing, nothing, (True, True)
    )
    return Explanations(tuple("wxyz"), 2, Activations(np.ones((2, 4), np.float32), 0, source, (0, 1)))


def scores(count: int, fve_nrm: bool = True) -> Scores:
    values_N = np.arange(count, dtype=np.float32) / 10
    return Scores(values_N + 0.5, 1 - 2 * values_N, values_N if fve_nrm else None, None, "against the mean")


def test_bars_are_means_and_dots_are_samples(explanations):
    ax = plot_tokens(explanations, scores(4))
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.05, 0.25])
    np.testing.assert_allclose(
        ax.collections[0].get_offsets(), [[0, 0.0], [0, 0.1], [1, 0.2], [1, 0.3]], rtol=1e-6
    )
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0 '$a'", "1 ' b$'"]
    ax.figure.canvas.draw()
    assert (ax.get_ylabel(), ax.get_title("left")) == ("fve_nrm", "against the mean")


def test_without_a_training_mean_the_cosine_is_drawn_where_it_is_wanted(explanations):
    own = matplotlib.figure.Figure().subplots()
    assert plot_tokens(explanations, scores(4, fve_nrm=False), ax=own) is own
    assert [bar.get_height() for bar in own.patches] == pytest.approx([0.55, 0.75])
    assert own.get_ylabel() == "cosine"


def test_a_failed_sample_without_a_training_mean_is_left_out(explanations):
    values = scores(4, fve_nrm=False)
    values.cosine_N[1] = values.cosine_N[2] = values.cosine_N[3] = np.nan
    ax = plot_tokens(explanations, values)
    heights = [bar.get_height() for bar in ax.patches]
    assert heights[0] == 0.5 and np.isnan(heights[1])
    ax.figure.canvas.draw()


def test_scores_of_other_explanations_are_refused(explanations):
    with pytest.raises(ValueError, match="3 scores for 4 explanations"):
        plot_tokens(explanations, scores(3))
