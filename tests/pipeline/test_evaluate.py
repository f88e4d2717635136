import json

import numpy as np

from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.evaluation.subject import Subject
from nla_jax.pipeline import evaluate


def subject_of_rows(activations_ND, rebuilt_ND, **extraction):
    """What evaluation.json and the examples read of a subject that has no models."""
    N, D = activations_ND.shape
    origin = Extraction("org/model", D, 1, "brown", CorpusSlice(0, N), 1, **extraction)
    data = ActivationDataset(
        activations=activations_ND,
        explanations=None,
        doc_ids=[f"doc-{i}" for i in range(N)],
        n_raw_tokens=np.full(N, 51),
        contexts=None,
        extra={},
        sidecar=Sidecar("set", "base", N, origin),
    )
    return Subject(
        data=data,
        training=None,
        yardstick=Yardstick.of(np.eye(D, dtype=np.float32)),
        verbalizers={"checkpoint": lambda activations_ND, **_: ["a text"] * len(activations_ND)},
        reconstructors={"own": lambda texts: rebuilt_ND[: len(texts)]},
        load_target=lambda: None,
        config=EvaluationConfig(examples=N),
    )


def measured(subject, directory):
    about = evaluate._Evaluated("name", "org/model", 1, "a mean", EvaluationConfig(suites=()))
    evaluate._measure(subject, about, directory, "digest", {})
    return json.loads((directory / "evaluation.json").read_text())


def test_an_activation_without_a_direction_has_cosine_zero(tmp_path):
    subject = subject_of_rows(np.float32([[3, 4], [0, 0]]), np.float32([[4, 3], [4, 3]]))
    evaluate._write_examples(subject, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    cosines = {row["doc_id"]: row["cosine"] for row in rows}
    np.testing.assert_allclose([cosines["doc-0"], cosines["doc-1"]], [0.96, 0], rtol=1e-6)


def test_figures_name_the_documents_that_they_are_of(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "measure_suites", lambda *args: {})
    rows = np.float32([[3, 4], [1, 0]])
    run = measured(subject_of_rows(rows, rows, corpus_documents=7, corpus_digest="abc"), tmp_path)["run"]
    assert (run["corpus"], run["corpus documents"], run["corpus digest"]) == ("brown", 7, "abc")
    run = measured(subject_of_rows(rows, rows), tmp_path)["run"]
    assert run["corpus"] == "brown" and not {"corpus documents", "corpus digest"} & set(run)


def test_examples_are_drawn_from_all_places_alike():
    places = ["inside"] * 90 + ["answer_start"] * 6 + ["line_end"] * 2 + [None] * 2
    rows = evaluate._example_rows(places, 12, seed=0)
    assert [places[row] for row in rows] == ["answer_start"] * 4 + ["line_end"] * 2 + ["inside"] * 4 + [
        None
    ] * 2
    assert len(set(rows)) == 12 and rows == evaluate._example_rows(places, 12, seed=0)
    assert rows != evaluate._example_rows(places, 12, seed=1)
    # Where places are not told, rows are drawn from all.
    order = np.random.default_rng(3).permutation(100)[:12].tolist()
    assert evaluate._example_rows([None] * 100, 12, seed=3) == order
