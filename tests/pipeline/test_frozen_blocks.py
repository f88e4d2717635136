"""AV and AR whose first blocks and embeddings keep the target's weights."""

import dataclasses

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from processes import ROOT

import nla_jax
from nla_jax.config import ModelConfig, load_config
from nla_jax.lm.lora import LoraConfig, split_frozen
from nla_jax.lm.transformer import unstack_blocks
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.stages import run_stages
from nla_jax.training.checkpoint_files import describe


def config_of(model: str, frozen: int):
    config = load_config(ROOT / "configs" / "tiny.py")
    loop = dataclasses.replace(config.av_sft.loop, steps=1, evaluate_every=1, checkpoint_every=1)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=model, frozen_blocks=frozen),
        corpus=dataclasses.replace(config.corpus, max_documents=40),
        extraction=dataclasses.replace(config.extraction, positions_per_document=2),
        av_sft=dataclasses.replace(config.av_sft, loop=loop),
        ar_sft=dataclasses.replace(config.ar_sft, loop=loop),
        rl=dataclasses.replace(config.rl, loop=loop),
    )


def test_only_upper_blocks_are_trained_and_stored(shallow_model_dir, tmp_path):
    run = Run(config_of(str(shallow_model_dir), 1), tmp_path / "run")
    run_stages(run, ["extract", "explain", "av_sft", "ar_sft", "rl"])
    assert "target" not in vars(run.models)

    target = flatten_dict(nla_jax.load_lm(str(shallow_model_dir)).params, sep="/")
    nla = nla_jax.load(run.directory)
    for params, layers in ((nla.av_params, 3), (nla.ar_params, 2)):
        lm = flatten_dict(unstack_blocks(params["lm"]), sep="/")
        changed = {path.split("/")[0] for path, x in lm.items() if not np.array_equal(x, target[path])}
        kept = {path.split("/")[0] for path in lm} - changed
        assert kept == {"embed", "blocks_0"}
        assert {f"blocks_{i}" for i in range(1, layers)} <= changed
    for description in describe(run.directory):
        for held in description.trees.values():
            assert not any("blocks_0/" in path or "embed" in path for path in held)
            assert any("blocks_1/" in path for path in held)


def test_an_lm_in_two_parts():
    lm = {"embed": 0, "blocks_0": 1, "blocks_1": 2, "blocks_10": 3, "final_norm": 4}
    assert split_frozen(lm, 1) == (
        {"embed": 0, "blocks_0": 1},
        {"blocks_1": 2, "blocks_10": 3, "final_norm": 4},
    )
    with pytest.raises(ValueError, match="set model.scan_blocks to False"):
        split_frozen({"embed": 0, "blocks": 1}, 1)


def test_data_do_not_depend_on_what_is_frozen_and_runs_that_freeze_nothing_keep_their_digests():
    frozen, free = config_of("target", 1), config_of("target", 0)
    for stage in ("extract", "explain"):
        assert stage_digest(frozen, stage) == stage_digest(free, stage)
    assert stage_digest(frozen, "av_sft") != stage_digest(free, "av_sft")


def test_what_cannot_be_frozen_is_named():
    with pytest.raises(ValueError, match=r"model.frozen_blocks is 3; expected 0 .* to model.layer=2"):
        ModelConfig(layer=2, frozen_blocks=3)
    with pytest.raises(ValueError, match=r"frozen_blocks=1 and model.scan_blocks are both set"):
        ModelConfig(layer=2, frozen_blocks=1, scan_blocks=True)
    with pytest.raises(ValueError, match=r"lora.rank=4 and model.frozen_blocks=1 are both set"):
        dataclasses.replace(config_of("target", 1), lora=LoraConfig(rank=4))
