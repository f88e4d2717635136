import dataclasses
import functools
import json
import runpy
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity
from untrained_nla import LAYER

from nla_jax.autoencoder.prompts import encode_reconstructor, encode_responses
from nla_jax.autoencoder.verbalizer import sft_loss
from nla_jax.commands import evaluate
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.evaluation.report import systems
from nla_jax.interop.model_directories import load_reconstructor, load_verbalizer
from nla_jax.lm.prompt_batches import pad
from nla_jax.lm.transformer import Transformer
from nla_jax.pipeline import export
from nla_jax.pipeline.evaluate import evaluate_nla
from nla_jax.pipeline.load import load
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.subject import subject_of_nla

ROOT = Path(__file__).parent.parent.parent
TEXT = "The array has a shape and a type, and every axis has a length of its own."


@pytest.fixture(scope="module")
def run(untrained_run):
    return untrained_run


@pytest.fixture(scope="module")
def exported(untrained_export):
    return untrained_export


def test_exported_models_are_the_runs(run, exported):
    av, ar = load_verbalizer(exported / "av"), load_reconstructor(exported / "ar")
    codec = run.models.autoencoder
    # The run says how its scale is found, the export what was found.
    named = dataclasses.replace(codec.verbalizer.injection, scale=codec.verbalizer.scale)
    assert av.verbalizer == dataclasses.replace(codec.verbalizer, injection=named)
    assert ar.reconstructor == codec.reconstructor
    for loaded, name in ((av, "av"), (ar, "ar")):
        jax.tree.map(np.testing.assert_array_equal, loaded.params, run.models.model_params("rl", name, 3))
    assert av.tokenizer.encode(TEXT) == run.models.lm.tokenizer.encode(TEXT)


def test_a_run_without_joint_training_is_named(run, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="holds no checkpoint of joint training; take its warm starts"
    ):
        export.export_run(Run(run.config, tmp_path), tmp_path / "out")


def test_an_export_explains_as_its_run_does(run, exported, tiny_model_dir):
    of_run = load(run.directory, quiet=True)
    of_export = load(exported, target=str(tiny_model_dir), quiet=True)
    assert of_export.layer == LAYER and of_export.min_position == run.config.extraction.min_position
    assert of_export.autoencoder.max_explanation_tokens == 8
    acts = of_run.activations(TEXT)
    np.testing.assert_array_equal(np.asarray(of_export.activations(TEXT)), np.asarray(acts))
    texts = of_run.explain(acts[[3, -1]], samples=2)
    assert of_export.explain(acts[[3, -1]], samples=2).texts == texts.texts
    ours, theirs = (
        of_run.score(acts, ["a text"] * len(acts), judges=False),
        of_export.score(acts, ["a text"] * len(acts)),
    )
    # The export carries the run's training mean, so both measure against the same.
    np.testing.assert_allclose(ours.fve_nrm_N, theirs.fve_nrm_N, rtol=1e-5)
    assert ours.measured_against == theirs.measured_against == "against the mean of 12 training activations"


def test_models_without_a_run_are_evaluated(run, exported, tiny_model_dir, tmp_path):
    nla = load(exported, target=str(tiny_model_dir), quiet=True)
    out, config = tmp_path / "out", EvaluationConfig()
    evaluate_nla(nla, run.data("held_out"), out, config)
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert list(evaluation["suites"]) == ["reconstruction", "controls"]
    assert evaluation["mean_is"] == "mean of 12 training activations"
    names = {(row["name"], row["labels"]["AR"]) for row in systems(evaluation)}
    assert names == {("explainer texts", "own"), ("AV checkpoint", "own")}
    assert "AV checkpoint" in (out / "report.html").read_text()
    # Another AR in the same directory gives its own figures, and not those that are kept there.
    head = {"kernel": -nla.ar_params["head"]["kernel"]}
    other = dataclasses.replace(nla, ar_params={**nla.ar_params, "head": head})
    evaluate_nla(other, run.data("held_out"), out, config)
    values = [
        next(row for row in systems(found) if row["name"] == "explainer texts")["figures"]["fve_nrm"]["value"]
        for found in (evaluation, json.loads((out / "evaluation.json").read_text()))
    ]
    assert abs(values[0] - values[1]) > 0.01
    own = dataclasses.replace(nla, judges={"judge": nla.reconstruct})
    with pytest.raises(ValueError, match="'judge' and the co-trained AR rebuild the same vectors"):
        evaluate_nla(own, run.data("held_out"), out, config)


def test_raw_fve_is_not_defined_where_no_scale_was_fitted(run, exported, tiny_model_dir, tmp_path):
    nla = load(exported, target=str(tiny_model_dir), quiet=True)
    head = {"kernel": 10 * nla.ar_params["head"]["kernel"]}
    longer = dataclasses.replace(nla, ar_params={**nla.ar_params, "head": head})
    found = []
    for name, model in (("as it is", nla), ("ten times as long", longer)):
        evaluate_nla(model, run.data("held_out"), tmp_path / name, EvaluationConfig(suites=("controls",)))
        suites = json.loads((tmp_path / name / "evaluation.json").read_text())["suites"]
        controls = {row["name"]: row["figures"] for row in suites["controls"]["tables"][0]["rows"]}
        assert abs(controls.pop("training mean")["fve"]["value"]) < 1e-6
        assert all(figures["fve"] is None for figures in controls.values())
        found.append({name: figures["fve_nrm"]["value"] for name, figures in controls.items()})
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_without_a_training_mean_half_of_the_documents_give_one(run, exported, tiny_model_dir, tmp_path):
    nla = dataclasses.replace(load(exported, target=str(tiny_model_dir), quiet=True), yardstick=None)
    data = run.data("held_out")
    data = dataclasses.replace(data, doc_ids=["a", "b", "b", "c"])
    subject = subject_of_nla(nla, data, EvaluationConfig())
    others = np.array([doc not in subject.data.doc_ids for doc in data.doc_ids])
    np.testing.assert_array_equal(subject.data.activations, data.activations[~others])
    np.testing.assert_allclose(subject.yardstick.mean_D, data.activations[others].mean(axis=0), atol=1e-6)
    assert len(set(subject.data.doc_ids)) == 2
    evaluate_nla(nla, data, tmp_path, EvaluationConfig(suites=("reconstruction",)))
    mean_is = json.loads((tmp_path / "evaluation.json").read_text())["mean_is"]
    assert mean_is == f"mean of {others.sum()} activations of 1 other documents of the data"
    with pytest.raises(ValueError, match=r"without a training mean, and the data is of 1 document\(s\)"):
        subject_of_nla(nla, dataclasses.replace(data, doc_ids=["a"] * 4), EvaluationConfig())


def test_fewer_rows_than_there_are_mix_documents(run, exported, tiny_model_dir):
    nla = load(exported, target=str(tiny_model_dir), quiet=True)
    data = run.data("held_out")
    many = data.take(np.arange(4).repeat(50))
    many = dataclasses.replace(many, n_raw_tokens=np.arange(200))
    subject = subject_of_nla(nla, many, EvaluationConfig(rows=40))
    assert len(subject.data) == 40 and set(subject.data.doc_ids) == set(data.doc_ids)
    assert (np.diff(subject.data.n_raw_tokens) > 0).all()


def test_an_ar_that_rebuilds_nan_is_named(run, exported, tiny_model_dir, tmp_path):
    nla = load(exported, target=str(tiny_model_dir), quiet=True)
    head = {"kernel": nla.ar_params["head"]["kernel"].at[0, 0].set(jnp.nan)}
    damaged = dataclasses.replace(nla, ar_params={**nla.ar_params, "head": head})
    with pytest.raises(ValueError, match="the AR of .* rebuilds NaN or infinity from 2 of 2 texts"):
        damaged.reconstruct(["a", "b"])
    with pytest.raises(ValueError, match="the AR of .* rebuilds NaN or infinity"):
        evaluate_nla(damaged, run.data("held_out"), tmp_path, EvaluationConfig())
    judged = dataclasses.replace(
        nla, judges={"mine": lambda texts: damaged.round_trip.reconstruct(damaged.ar_params, texts)}
    )
    vectors = run.data("held_out").activations[:2]
    with pytest.raises(ValueError, match="the AR 'mine' rebuilds NaN or infinity from 2 of 2"):
        judged.score(vectors, ["a", "b"])
    with pytest.raises(ValueError, match="the AR 'mine' rebuilds NaN or infinity"):
        subject_of_nla(judged, run.data("held_out"), EvaluationConfig())


def test_a_malformed_chat_model_is_refused_before_anything_is_loaded():
    places = [part for name in ("av", "ar", "target", "data", "out") for part in (f"--{name}", "nowhere")]
    with pytest.raises(SystemExit, match="error: the chat model 'gpt' is not PROVIDER:MODEL"):
        evaluate.main([*places, "--chat-model", "gpt"])


def test_dry_run_prints_names_and_writes_nothing(exported, monkeypatch, capsys):
    before = sorted(exported.rglob("*"))
    script = str(ROOT / "experiments" / "convert.py")
    monkeypatch.setattr(sys, "argv", [script, str(exported / "ar"), "--dry-run"])
    runpy.run_path(script, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "AR: llama, 2 blocks"
    assert "  model.layers.1.mlp.up_proj.weight [64, 32] -> lm/blocks_1/mlp/up/kernel transposed" in lines
    assert lines[-1] == "  value_head.safetensors: weight [32, 32] -> head/kernel transposed"
    assert sorted(exported.rglob("*")) == before


def test_the_adapters_that_come_along_tell_activations_apart(smollm2):
    folder = ROOT / "experiments" / "adapters" / "smollm2_135m"
    av, ar = load_verbalizer(folder / "av", base=smollm2), load_reconstructor(folder / "ar", base=smollm2)
    texts = [
        "Return the mean of the array along the given axis",
        "Raises an error if the file does not exist",
    ]
    explanations = [
        'Ends "given axis". Then of, and, is. On array.',
        'Ends "not exist". Then or, and, in. On file.',
    ]
    tokens_BT, lengths_B = pad([smollm2.tokenizer(text)["input_ids"] for text in texts], 16)
    layer, model = ar.meta.layer, Transformer(smollm2.config)
    read = jax.jit(functools.partial(model.apply, capture=(layer,), stop_after=layer))
    resid_BTD = read({"params": smollm2.params}, jnp.asarray(tokens_BT)).resid[layer]
    activations_ND = resid_BTD[jnp.arange(2), lengths_B - 1]
    prompts = encode_reconstructor(ar.tokenizer, ar.reconstructor.prompt, explanations, 32)
    rebuilt_ND = jax.jit(ar.reconstructor)(ar.params, *map(jnp.asarray, prompts))
    cosines = cosine_similarity(rebuilt_ND, activations_ND)
    assert (np.diag(cosines) > cosines[[0, 1], [1, 0]] + 0.05).all()
    responses = encode_responses(av.tokenizer, av.verbalizer.prompt, explanations, 26)

    summed = jax.jit(functools.partial(sft_loss, av.verbalizer))
    true, wrong = (
        summed(av.params, vectors_ND, *map(jnp.asarray, responses))[0]
        for vectors_ND in (activations_ND, activations_ND[::-1])
    )
    assert true < 0.8 * wrong


def test_an_av_alone_explains_and_says_what_it_cannot_do(run, exported, tiny_model_dir):
    nla = load(exported / "av", target=str(tiny_model_dir), quiet=True)
    acts = nla.activations(TEXT)
    assert nla.explain(acts[-1]).texts == load(run.directory, quiet=True).explain(acts[-1]).texts
    with pytest.raises(
        ValueError, match=r"av holds an AV alone, which can explain and not reconstruct; load"
    ):
        nla.reconstruct(["a text"])


def test_half_precision_halves_the_weights_and_the_target_ends_at_the_layer(run, exported, tiny_model_dir):
    whole = load(exported, target=str(tiny_model_dir), quiet=True)
    half = load(exported, target=str(tiny_model_dir), dtype="bfloat16", quiet=True)
    for name in ("av_params", "ar_params"):
        sizes = [sum(x.nbytes for x in jax.tree.leaves(getattr(nla, name)["lm"])) for nla in (half, whole)]
        assert sizes[0] * 2 == sizes[1]
    assert half.ar_params["head"]["kernel"].dtype == np.float32
    target = half.target
    assert target.config.num_layers == LAYER + 1 and "final_norm" not in target.params
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(target.params))
    acts, exact = half.activations(TEXT), whole.activations(TEXT)
    assert (cosine_similarity(acts.vectors_ND, exact.vectors_ND).diagonal() > 0.999).all()
    assert len(half.explain(acts[-1])) == 1


def test_a_second_call_compiles_nothing(exported, tiny_model_dir):
    nla = load(exported, target=str(tiny_model_dir), quiet=True)
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))

    def use(text, rows):
        acts = nla.activations(text)
        texts = nla.explain(acts[:rows])
        return nla.score(acts, texts)

    use(TEXT, 7)
    events.clear()
    # Other texts and fewer rows are padded to the same sizes.
    use(f"{TEXT} {TEXT}"[:70], 9)
    assert events.count("/jax/core/compile/jaxpr_trace_duration") == 0


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((2, 31), np.float32), r"shape \(2, 31\); this NLA reads vectors of width 32"),
        (np.full((2, 32), np.nan, np.float32), r"2 of 2 activations hold NaN or infinity \(rows \[0, 1\]\)"),
        (np.zeros((0, 32), np.float32), "there are no activations to explain"),
    ],
)
def test_vectors_that_cannot_be_explained_are_named(exported, vectors, message):
    with pytest.raises(ValueError, match=message):
        load(exported, quiet=True).explain(vectors)


def test_what_is_no_nla_is_named(run, exported, tiny_model_dir, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no NLA: it is no run .* no export .* no model of an NLA"
    ):
        load(tmp_path)
    with pytest.raises(ValueError, match="is a run, which has its own models; leave ar out"):
        load(run.directory, ar=exported / "ar")
    with pytest.raises(ValueError, match="is not a run, so it has no stage and no step"):
        load(exported, step=3)
    nla = load(exported, quiet=True)
    with pytest.raises(
        ValueError, match=r"does not say which language model it explains; name it: nla_jax.load"
    ):
        nla.activations(TEXT)
    with pytest.raises(ValueError, match="5 texts for 2 activations; give one text a row"):
        nla.score(np.ones((2, 32), np.float32), ["a"] * 5)


def test_an_av_and_an_ar_of_different_layers_are_refused(exported, tmp_path):
    changed = shutil.copytree(exported, tmp_path / "changed")
    meta = changed / "av" / "nla_meta.yaml"
    meta.write_text(meta.read_text().replace("extraction_layer_index: 1", "extraction_layer_index: 0"))
    with pytest.raises(ValueError, match="do not belong together: layer: AV 0, AR 1; give the AR of this AV"):
        load(changed)
