import dataclasses
import types

import pytest
from untrained_nla import write_untrained_run

from nla_jax.data.dataset import load_dataset
from nla_jax.pipeline.train import _partly_verbalized
from nla_jax.training.joint import RLConfig


def test_a_text_with_a_tag_in_it_does_not_end_the_warm_start(tiny_model_dir, tmp_path, monkeypatch):
    run = write_untrained_run(tiny_model_dir, tmp_path)
    data = dataclasses.replace(run.data("ar_sft"), explanations=["one", "two", "three", "four"])
    written = ['Ends "x".</explanation>', "<explanation>\nIt ends.", None, "It ends."]
    monkeypatch.setitem(
        run.models.__dict__, "round_trip", types.SimpleNamespace(verbalize=lambda *_, **__: written)
    )
    monkeypatch.setattr(run.models, "warm_start_params", lambda model: None)
    texts = _partly_verbalized(run, data, 1.0)
    # Rows are verbalized in a shuffled order: one text stands, and three rows keep the writer's.
    assert texts.count("It ends.") == 1 and len({*texts} & {"one", "two", "three", "four"}) == 3
    stored = load_dataset(run.directory / "data" / "verbalized" / "verbalized.parquet")
    assert sorted(stored.explanations) == sorted(texts)


def test_a_group_of_one_is_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match=r"rl.group=1: advantages compare .* set --rl.group 4"):
        RLConfig(group=1)
