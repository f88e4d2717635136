"""AV and AR that start from another model than the one that is explained."""

import dataclasses

import numpy as np
import pytest
from processes import ROOT
from tiny_model import write_tiny_model

import nla_jax
from nla_jax.config import load_config
from nla_jax.data.dataset import load_dataset
from nla_jax.lm.files.weights import load_language_model
from nla_jax.lm.transformer import unstack_blocks
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.stages import run_stages


def config_of(target, initial, **lora):
    config = load_config(ROOT / "configs" / "tiny.py")
    loop = dataclasses.replace(config.av_sft.loop, steps=1, evaluate_every=1, checkpoint_every=1)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, path=str(target), initial_path=None if initial is None else str(initial)
        ),
        corpus=dataclasses.replace(config.corpus, max_documents=40),
        extraction=dataclasses.replace(config.extraction, positions_per_document=2),
        av_sft=dataclasses.replace(config.av_sft, loop=loop),
        ar_sft=dataclasses.replace(config.ar_sft, loop=loop),
        lora=dataclasses.replace(config.lora, **lora),
    )


def query(params) -> np.ndarray:
    return np.asarray(unstack_blocks(params)["blocks_0"]["attention"]["query"]["kernel"])


def test_activations_are_the_targets_and_av_and_ar_start_from_the_other_model(shallow_model_dir, tmp_path):
    other = write_tiny_model(tmp_path / "other", num_layers=2, seed=5)
    run = Run(config_of(shallow_model_dir, other), tmp_path / "run")
    run_stages(run, ["extract", "explain", "av_sft", "ar_sft"])

    base = load_dataset(run.directory / "data" / "base")
    assert base.sidecar.extraction.base_model == str(shallow_model_dir)
    context, vector = base.contexts[0], base.activations[0]
    target = nla_jax.load_lm(str(shallow_model_dir))
    tokens = target.tokenizer(context)["input_ids"]
    assert len(tokens) == base.n_raw_tokens[0]

    nla = nla_jax.load(run.directory)
    assert nla.target.name == str(shallow_model_dir)
    np.testing.assert_allclose(np.ravel(nla.activations(context)[-1]), vector, rtol=1e-4, atol=1e-4)
    start = query(load_language_model(other).params)
    for params in (nla.av_params["lm"], nla.ar_params["lm"]):
        # One step away from the other model, and far from the target.
        assert np.abs(query(params) - start).max() < 0.1 * np.abs(start).max()
        assert np.abs(query(params) - query(target.params)).max() > np.abs(start).max()


def test_adapters_are_on_the_other_model(shallow_model_dir, tmp_path):
    other = write_tiny_model(tmp_path / "other", num_layers=2, seed=5)
    models = Run(config_of(shallow_model_dir, other, rank=2), tmp_path / "run").models
    np.testing.assert_array_equal(query(models.base.params), query(load_language_model(other).params))
    np.testing.assert_array_equal(
        query(models.target.params), query(load_language_model(shallow_model_dir).params)
    )
    models.release_target()
    assert "base" in vars(models) and "target" not in vars(models)


def test_another_initial_model_is_part_of_what_texts_are_and_not_of_what_activations_are(tmp_path):
    plain, other = config_of("target", None), config_of("target", "other")
    assert stage_digest(plain, "extract") == stage_digest(other, "extract")
    for stage in ("explain", "av_sft", "rl"):
        assert stage_digest(plain, stage) != stage_digest(other, stage)


def test_an_initial_model_of_another_width_is_refused_before_anything_is_computed(
    shallow_model_dir, tmp_path
):
    other = write_tiny_model(tmp_path / "wide", num_layers=2, d_model=48)
    run = Run(config_of(shallow_model_dir, other), tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"is 48 wide, and that of the target .* 32; name a model of the target's"
    ):
        run_stages(run, ["extract"])
