import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.lm.files.peft import export_peft, load_peft
from nla_jax.lm.lora import FrozenBase, LoraConfig, init_adapters, merge, with_adapters
from nla_jax.lm.transformer import Transformer, stack_blocks, unstack_blocks

LORA = LoraConfig(rank=4, alpha=6.0)
TOKENS = jnp.arange(12).reshape(2, 6) + 5


@pytest.fixture(scope="module")
def base(tiny_lm):
    return FrozenBase(tiny_lm.params, LORA.scale)


@pytest.fixture(scope="module")
def trained(tiny_lm):
    """Adapters as training leaves them: no factor is zero."""
    adapters = init_adapters(LORA, {"lm": tiny_lm.params}, jax.random.key(0))
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * jnp.asarray(noise.standard_normal(x.shape), x.dtype), adapters)


def stream(lm, params):
    run = jax.jit(lambda params: Transformer(lm.config).apply({"params": params["lm"]}, TOKENS).final_BTD)
    return run(params)


def test_the_scale_is_rank_stabilized():
    assert LoraConfig(rank=64, alpha=16.0).scale == 2.0


def test_a_fresh_adapter_changes_nothing_and_follows_the_kernels(tiny_lm, base):
    params = init_adapters(LORA, {"lm": tiny_lm.params, "affine": {"bias": jnp.ones(3)}}, jax.random.key(0))
    query = params["lm"]["blocks_3"]["attention"]["query"]
    assert {name: x.shape for name, x in query.items()} == {"lora_a": (32, 4), "lora_b": (4, 32)}
    assert params["lm"].keys() == {f"blocks_{i}" for i in range(4)} and params["affine"]["bias"].sum() == 3
    assert 0.1 < np.abs(query["lora_a"]).max() <= 32**-0.5
    other = params["lm"]["blocks_2"]["attention"]["query"]["lora_a"]
    assert not np.array_equal(query["lora_a"], other)
    attached = base.with_adapters(params)
    assert attached["lm"]["embed"]["embedding"] is tiny_lm.params["embed"]["embedding"]
    np.testing.assert_array_equal(stream(tiny_lm, attached), stream(tiny_lm, {"lm": tiny_lm.params}))


@pytest.mark.parametrize("form", [unstack_blocks, stack_blocks])
def test_attached_and_merged_adapters_compute_the_same(tiny_lm, base, trained, form):
    attached = with_adapters(FrozenBase(form(base.lm), base.scale), form(trained))
    merged = merge(attached)
    kernel = form(merged["lm"])
    assert jax.tree.structure(kernel) == jax.tree.structure(form(tiny_lm.params))
    out = stream(tiny_lm, attached)
    np.testing.assert_allclose(out, stream(tiny_lm, merged), rtol=1e-4, atol=1e-5)
    assert np.abs(out - stream(tiny_lm, {"lm": tiny_lm.params})).max() > 0.1


def test_merged_weights_by_hand(base, trained):
    down = trained["lm"]["blocks_1"]["mlp"]["down"]
    expected = base.lm["blocks_1"]["mlp"]["down"]["kernel"] + 6 / 4**0.5 * (
        np.asarray(down["lora_a"], np.float64) @ np.asarray(down["lora_b"], np.float64)
    )
    merged = merge(base.with_adapters(trained))["lm"]["blocks_1"]["mlp"]["down"]
    assert merged.keys() == {"kernel"}
    np.testing.assert_allclose(merged["kernel"], expected, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_the_merged_weights(tiny_lm, base, trained):
    def loss(trained, assemble):
        final_BTD = Transformer(tiny_lm.config).apply({"params": assemble(trained)["lm"]}, TOKENS).final_BTD
        return (final_BTD**2 * jnp.arange(32)).sum()

    attached, merged = (
        jax.jit(jax.grad(loss), static_argnums=1)(trained, assemble)
        for assemble in (base.with_adapters, lambda x: merge(base.with_adapters(x)))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max())), attached, merged
    )


def test_without_a_base_what_is_trained_is_everything(tiny_lm):
    assert with_adapters(None, {"lm": tiny_lm.params})["lm"] is tiny_lm.params


def test_adapters_come_back_from_peft_files(tiny_lm, trained, tmp_path):
    export_peft(trained["lm"], tiny_lm.config, LORA, "some/model", tmp_path)
    adapters, lora = load_peft(tmp_path, tiny_lm.config)
    assert (lora.rank, lora.alpha, set(lora.targets)) == (4, 6.0, set(LORA.targets))
    jax.tree.map(np.testing.assert_array_equal, adapters, trained["lm"])
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    assert description["base_model_name_or_path"] == "some/model" and description["use_rslora"]


def test_peft_computes_the_same_from_them(tiny_lm, tiny_model_dir, base, trained, tmp_path):
    peft, torch, transformers = map(pytest.importorskip, ("peft", "torch", "transformers"))
    export_peft(trained["lm"], tiny_lm.config, LORA, str(tiny_model_dir), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path)
    with torch.inference_mode():
        logits = model(torch.tensor(np.asarray(TOKENS))).logits.numpy()
    ours = stream(tiny_lm, base.with_adapters(trained)) @ tiny_lm.params["embed"]["embedding"].T
    np.testing.assert_allclose(ours, logits, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_adapted_is_an_error(tiny_lm, trained, tmp_path):
    with pytest.raises(ValueError, match=r"lora.targets=\('gate',\) names nothing in the model"):
        init_adapters(
            LoraConfig(4, targets=("gate",)), {"lm": {"embed": tiny_lm.params["embed"]}}, jax.random.key(0)
        )
    experts = {"lm": {"blocks_0": {"mlp": {"gate": jnp.zeros((2, 3, 4))}}}}
    with pytest.raises(ValueError, match="blocks_0/mlp/gate is a stack of experts"):
        init_adapters(LORA, experts, jax.random.key(0))
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json in .*; expected an adapter"):
        load_peft(tmp_path, tiny_lm.config)
    export_peft(trained["lm"], tiny_lm.config, LORA, "m", tmp_path)
    with pytest.raises(ValueError, match=r"adapts model.layers.3.* which the model does not have"):
        load_peft(tmp_path, dataclasses.replace(tiny_lm.config, num_layers=3))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="adapter of type 'IA3'"):
        load_peft(tmp_path, tiny_lm.config)
