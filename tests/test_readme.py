"""The snippet that README.md begins with, run as it stands."""

import re

import numpy as np
from processes import ROOT


def test_the_readmes_snippet_runs_as_it_stands(monkeypatch):
    monkeypatch.chdir(ROOT)
    (snippet,) = re.findall(
        r"```python\n(import nla_jax\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    *lines, scored = snippet.rstrip().splitlines()
    names: dict = {}
    exec("\n".join([*lines, f"scores = {scored}"]), names)
    acts, texts, scores = names["acts"], names["texts"], names["scores"]
    assert acts.tokens == ["any", " text"] and acts.vectors_ND.shape == (2, 576)
    assert len(texts) == 4 and len(set(texts)) > 1
    assert texts.activations.positions == (1,)
    # Four samples of one activation, each scored against it.
    assert scores.cosine_N.shape == (4,) and (scores.cosine_N > 0.3).all()
    np.testing.assert_allclose(scores.cosine_N, 1 - scores.mse_nrm_N / 2, rtol=1e-6)
    assert scores.measured_against == "against the mean of 6400 training activations"
