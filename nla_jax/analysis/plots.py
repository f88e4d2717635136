"""Plots of explained tokens. Shape letters: N rows, one an explanation."""

from typing import TYPE_CHECKING

import numpy as np

from nla_jax.autoencoder.results import Explanations, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR, SAMPLE = "#2a6db0", "#1f2933"
INCHES_A_TOKEN = 0.34


def plot_tokens(explanations: Explanations, scores: Scores, *, ax: "Axes | None" = None) -> "Axes":
    """Plot how much of each token's activation its explanations carry, in the order of the explanations.

    A bar is the mean of a token's samples, a dot one of them. The height is `fve_nrm`, or the cosine where the NLA came
    without a training mean. A failed explanation counts as that mean, and is left out where there is none.

    Args:
      explanations: of the tokens of one text, or of plain vectors.
      scores: of these explanations.
      ax: where it is drawn; a new figure as wide as the tokens need if None.

    Returns:
      The axes, to set a title on or to save: `plot_tokens(...).figure.savefig(path)`.

    Raises:
      ValueError: scores of another number of explanations.
    """
    # It takes a second to import, and only plots need it.
    import matplotlib.pyplot as plt

    values_N = scores.cosine_N if scores.fve_nrm_N is None else scores.fve_nrm_N
    if len(values_N) != len(explanations):
        raise ValueError(
            f"{len(values_N)} scores for {len(explanations)} explanations; give the scores of these explanations"
        )
    samples = explanations.samples
    rows = explanations.rows()[::samples]
    by_token = np.ma.masked_invalid(np.asarray(values_N).reshape(len(rows), samples))
    if ax is None:
        width = max(4.0, 1.2 + INCHES_A_TOKEN * len(rows))
        _, ax = plt.subplots(figsize=(width, 3), layout="constrained")
    places = np.arange(len(rows))
    ax.bar(places, by_token.mean(axis=1).filled(np.nan), color=BAR, width=0.8, alpha=0.8)
    if samples > 1:
        ax.scatter(places.repeat(samples), by_token.ravel(), color=SAMPLE, s=9, zorder=3)
    # Tokens are data: a dollar sign in one is a dollar sign.
    ax.set_xticks(places, [row.label for row in rows], rotation=90, parse_math=False, fontsize=8)
    ax.axhline(0, color="#4b5563", linewidth=0.8)
    ax.margins(x=0.01)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_ylabel("cosine" if scores.fve_nrm_N is None else "fve_nrm")
    if scores.fve_nrm_N is not None:
        ax.set_title(scores.measured_against, loc="left", fontsize=8)
    return ax
