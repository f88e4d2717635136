"""Adapters as PEFT and others write them: what is read computes what PEFT computes, and the rest is refused by name."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nla_jax.lm.files.configs import config_from_hf
from nla_jax.lm.files.peft import ADAPTER_CONFIG, ADAPTER_FILE, export_peft, load_peft, peft_base
from nla_jax.lm.files.safetensors_files import open_safetensors
from nla_jax.lm.files.weights import load_params
from nla_jax.lm.lora import FrozenBase
from nla_jax.lm.transformer import Transformer, stack_blocks

TOKENS = np.arange(12).reshape(2, 6) + 5
MODULES = ["q_proj", "v_proj", "down_proj"]
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def peft_logits(base_dir, directory):
    """Logits of the adapted model, as PEFT computes them."""
    peft, torch, transformers = map(pytest.importorskip, ("peft", "torch", "transformers"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, directory)
    with torch.inference_mode():
        return model(torch.tensor(TOKENS)).logits.numpy()


def our_logits(lm, directory, form=lambda tree: tree):
    """Logits of the adapted model, as they are computed here; `form` is applied to both parts of the parameters."""
    adapters, lora = load_peft(directory, lm.config)
    params = FrozenBase(form(lm.params), lora.scale).with_adapters({"lm": form(adapters)})["lm"]
    final_BTD = Transformer(lm.config).apply({"params": params}, jnp.asarray(TOKENS)).final_BTD
    return final_BTD @ lm.params["embed"]["embedding"].T


@pytest.fixture
def write(tiny_model_dir, tmp_path):
    """Write an adapter as PEFT does, with random numbers in both factors."""

    def write(**fields):
        peft, torch, transformers = map(pytest.importorskip, ("peft", "torch", "transformers"))
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        given = {"r": 4, "lora_alpha": 6, "target_modules": MODULES, "task_type": "CAUSAL_LM"} | fields
        model = peft.get_peft_model(model, peft.LoraConfig(**given))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.fixture
def adapter(tiny_lm, tmp_path):
    """An adapter of query, value and down in every block, without PEFT: rank 4, use_rslora."""
    rng, shapes = np.random.default_rng(0), {"q_proj": (32, 32), "v_proj": (32, 16), "down_proj": (64, 32)}
    tensors = {}
    for block in range(tiny_lm.config.num_layers):
        for name, (inputs, outputs) in shapes.items():
            part = "mlp" if name == "down_proj" else "self_attn"
            key = f"base_model.model.model.layers.{block}.{part}.{name}"
            tensors[f"{key}.lora_A.weight"] = rng.standard_normal((4, inputs)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = rng.standard_normal((outputs, 4)).astype(np.float32)
    save_file(tensors, tmp_path / ADAPTER_FILE)
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": "some/model",
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": MODULES,
    }
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(fields))
    return tmp_path


def change_config(directory, **fields):
    path = directory / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(directory, change):
    """Replace the tensors of an adapter with what `change` makes of them."""
    save_file(change(load_file(directory / ADAPTER_FILE)), directory / ADAPTER_FILE)


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 1.5),
        ({"use_rslora": True}, 3.0),
        ({"alpha_pattern": {"q_proj": 24}}, None),
        ({"alpha_pattern": {r"layers\.[12]\.self_attn\.v_proj": 1}, "use_rslora": True}, None),
        ({"rank_pattern": {"q_proj": 2, "layers.3.mlp.down_proj": 7}}, None),
        ({"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 3}}, None),
        ({"layers_to_transform": [2, 3]}, 1.5),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, 1.5),
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.1}, 1.5),
        ({"target_modules": r".*\.(q|k)_proj"}, 1.5),
        ({"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, 1.5),
    ],
)
def test_adapters_that_peft_writes_compute_what_peft_computes(fields, scale, write, tiny_lm, tiny_model_dir):
    directory = write(**fields)
    expected = peft_logits(tiny_model_dir, directory)
    plain = Transformer(tiny_lm.config).apply({"params": tiny_lm.params}, jnp.asarray(TOKENS)).final_BTD
    assert np.abs(plain @ tiny_lm.params["embed"]["embedding"].T - expected).max() > 0.1
    np.testing.assert_allclose(our_logits(tiny_lm, directory), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(our_logits(tiny_lm, directory, stack_blocks), expected, rtol=1e-3, atol=1e-3)
    if scale is not None:
        assert load_peft(directory, tiny_lm.config)[1].scale == pytest.approx(scale, rel=1e-12)


def test_fan_in_fan_out_changes_nothing_in_peft_and_here(adapter, tiny_lm, tiny_model_dir):
    before = our_logits(tiny_lm, adapter)
    change_config(adapter, fan_in_fan_out=True)
    np.testing.assert_array_equal(our_logits(tiny_lm, adapter), before)
    np.testing.assert_allclose(before, peft_logits(tiny_model_dir, adapter), rtol=1e-3, atol=1e-3)


def test_a_loaded_plain_scale_is_written_as_it_is_and_comes_back(adapter, tiny_lm, tmp_path):
    change_config(adapter, use_rslora=False)
    adapters, lora = load_peft(adapter, tiny_lm.config)
    assert (lora.rank, lora.alpha, lora.scale) == (4, 3.0, 1.5)
    export_peft(adapters, tiny_lm.config, lora, "some/model", tmp_path / "again")
    assert load_peft(tmp_path / "again", tiny_lm.config)[1] == lora


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("layers_pattern", ["experts"]),
        ("trainable_token_indices", [3]),
        ("megatron_config", {"hidden_size": 32}),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("alora_invocation_tokens", [5, 6]),
        ("use_qalora", True),
        ("a_field_of_the_future", 0.5),
    ],
)
def test_a_field_that_changes_the_computation_is_refused_with_its_value(field, value, adapter, tiny_lm):
    change_config(adapter, **{field: value})
    with pytest.raises(ValueError, match="merge_and_unload") as error:
        load_peft(adapter, tiny_lm.config)
    assert f"{field}={value!r}" in str(error.value) and str(adapter / ADAPTER_CONFIG) in str(error.value)


def test_all_refused_fields_are_named_at_once_and_neutral_ones_are_read(adapter, tiny_lm):
    change_config(adapter, bias="none", use_dora=False, modules_to_save=None, loftq_config={}, unknown=None)
    load_peft(adapter, tiny_lm.config)
    change_config(adapter, bias="all", use_dora=True)
    with pytest.raises(ValueError, match=r"bias='all', use_dora=True"):
        load_peft(adapter, tiny_lm.config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'; only LORA is read"),
        ({"peft_type": None}, "an adapter of type None; only LORA is read"),
        ({"r": None}, "r=None, expected a whole number above 0"),
        ({"r": 4.5}, r"r=4.5, expected a whole number above 0"),
        ({"lora_alpha": None}, "lora_alpha=None, expected a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan, expected a number above 0"),
        ({"rank_pattern": {"q_proj": "x"}}, r"rank_pattern\['q_proj'\]='x', expected a whole number above 0"),
        ({"alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\['q_proj'\]=-1, expected a number above 0"),
        ({"alpha_pattern": [64]}, r"alpha_pattern=\[64\], expected an object"),
        ({"alpha_pattern": {"q_proj(": 1}}, r"alpha_pattern\['q_proj\('\] is no regular expression"),
        (
            {"layers_to_transform": [0, 1]},
            r"layers_to_transform=\[0, 1\], but .* adapts blocks \[0, 1, 2, 3\]",
        ),
        ({"r": 8}, r"has rank 4, but the config says 8"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj.lora_A.weight has rank 4, but the config says 2"),
        (
            {"target_modules": [*MODULES, "k_proj"]},
            r"lacks adapters of model.layers.0.self_attn.k_proj, .* which target_modules names",
        ),
    ],
)
def test_a_config_that_cannot_be_right_is_named(fields, message, adapter, tiny_lm):
    change_config(adapter, **fields)
    with pytest.raises(ValueError, match=message) as error:
        load_peft(adapter, tiny_lm.config)
    assert str(adapter) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("[]", "holds a list instead of an object"), ("{}", "of type None")],
)
def test_a_config_that_is_no_config_is_named(text, message, adapter, tiny_lm):
    (adapter / ADAPTER_CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_peft(adapter, tiny_lm.config)
    assert ADAPTER_CONFIG in str(error.value)


def test_a_config_with_a_byte_order_mark_is_read(adapter, tiny_lm):
    text = (adapter / ADAPTER_CONFIG).read_text()
    (adapter / ADAPTER_CONFIG).write_text(text, encoding="utf-8-sig")
    assert load_peft(adapter, tiny_lm.config)[1].rank == 4


@pytest.mark.parametrize(
    "key",
    [
        f"{QUERY}.lora_magnitude_vector",
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        f"{QUERY}.base_layer.bias",
        f"{QUERY}.lora_B.bias",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_tensor_that_is_no_factor_of_a_linear_map_is_named(key, adapter, tiny_lm):
    change_tensors(adapter, lambda tensors: tensors | {key: np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="merge_and_unload") as error:
        load_peft(adapter, tiny_lm.config)
    assert key in str(error.value) and str(adapter / ADAPTER_FILE) in str(error.value)


@pytest.mark.parametrize("module", ["embed_tokens", "norm", "layers.1.input_layernorm"])
def test_an_adapter_of_something_else_than_a_map_in_a_block_is_named(module, adapter, tiny_lm):
    keys = [f"base_model.model.model.{module}.lora_{side}.weight" for side in "AB"]
    change_tensors(adapter, lambda tensors: tensors | dict.fromkeys(keys, np.ones((4, 4), np.float32)))
    with pytest.raises(ValueError, match=rf"adapts model.{module}, .*; merge"):
        load_peft(adapter, tiny_lm.config)


def test_half_an_adapter_and_none_at_all_are_named(adapter, tiny_lm):
    missing = f"{QUERY}.lora_B.weight"
    change_tensors(adapter, lambda tensors: {k: v for k, v in tensors.items() if k != missing})
    with pytest.raises(ValueError, match=r"lacks lora_A or lora_B of model.layers.0.self_attn.q_proj;"):
        load_peft(adapter, tiny_lm.config)
    change_tensors(adapter, lambda tensors: {})
    with pytest.raises(ValueError, match=r"holds no adapters; download it again"):
        load_peft(adapter, tiny_lm.config)


def test_two_adapters_of_one_map_are_named(adapter, tiny_lm):
    again = QUERY.replace("model.layers", "model.language_model.layers")
    keys = [".lora_A.weight", ".lora_B.weight"]
    change_tensors(adapter, lambda tensors: tensors | {again + key: tensors[QUERY + key] for key in keys})
    with pytest.raises(ValueError, match=r"holds two adapters of model.layers.0.self_attn.q_proj"):
        load_peft(adapter, tiny_lm.config)
    change_tensors(
        adapter,
        lambda tensors: {
            (k.replace(".weight", ".default.weight") if "language_model" in k else k).replace(
                "model.language_model.layers", "model.layers"
            ): value
            for k, value in tensors.items()
        },
    )
    with pytest.raises(ValueError, match=r"holds two adapters of model.layers.0.self_attn.q_proj"):
        load_peft(adapter, tiny_lm.config)


@pytest.mark.parametrize(
    "prefix", ["model.language_model.", "language_model.model.", "language_model.", "model.model.", ""]
)
def test_other_spellings_of_the_modules_load(prefix, adapter, tiny_lm):
    before = our_logits(tiny_lm, adapter)
    change_tensors(
        adapter,
        lambda tensors: {
            key.replace("base_model.model.model.", f"base_model.model.{prefix}"): value
            for key, value in tensors.items()
        },
    )
    np.testing.assert_array_equal(our_logits(tiny_lm, adapter), before)


def test_patterns_are_matched_with_the_names_in_the_file(adapter, tiny_lm):
    change_tensors(
        adapter,
        lambda tensors: {
            k.replace("model.layers", "model.language_model.layers"): v for k, v in tensors.items()
        },
    )
    before, _ = load_peft(adapter, tiny_lm.config)
    change_config(adapter, alpha_pattern={"^model.language_model.layers.0.self_attn.q_proj": 12})
    after, _ = load_peft(adapter, tiny_lm.config)
    query = [tree["blocks_0"]["attention"]["query"]["lora_b"] for tree in (before, after)]
    np.testing.assert_array_equal(2 * query[0], query[1])


def test_names_of_the_adapter_within_keys_load(adapter, tiny_lm):
    before = our_logits(tiny_lm, adapter)
    change_tensors(
        adapter, lambda tensors: {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}
    )
    np.testing.assert_array_equal(our_logits(tiny_lm, adapter), before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_numbers_that_are_none_are_counted(bad, adapter, tiny_lm):
    def change(tensors):
        tensors[f"{QUERY}.lora_B.weight"][:3, 1] = bad
        return tensors

    change_tensors(adapter, change)
    with pytest.raises(ValueError, match=r"lora_B.weight holds 3 of 128 numbers that are NaN, infinite"):
        load_peft(adapter, tiny_lm.config)


def test_integers_are_not_read_as_weights(adapter, tiny_lm):
    key = f"{QUERY}.lora_A.weight"
    change_tensors(adapter, lambda tensors: tensors | {key: np.ones((4, 32), np.int8)})
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight I8; take the file as it was before quant"):
        load_peft(adapter, tiny_lm.config)


def test_pickled_adapters_are_not_read(adapter, tiny_lm):
    (adapter / ADAPTER_FILE).rename(adapter / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"no adapter_model.safetensors in .*adapter_model.bin .*save_pr"
    ):
        load_peft(adapter, tiny_lm.config)


def test_the_base_is_named_or_asked_for(adapter, tiny_lm):
    assert peft_base(adapter) == "some/model"
    change_config(adapter, revision="v2")
    assert peft_base(adapter) == "some/model@v2"
    change_config(adapter, base_model_name_or_path=None, revision=None)
    load_peft(adapter, tiny_lm.config)
    with pytest.raises(ValueError, match=r"names no base_model_name_or_path; .*target=.*base="):
        peft_base(adapter)
    with pytest.raises(ValueError, match=r"load its own model, which adapter_config.json does not name"):
        load_peft(adapter, dataclasses.replace(tiny_lm.config, num_layers=3))
    change_config(adapter, base_model_name_or_path="/root/elsewhere/model")
    with pytest.raises(
        FileNotFoundError, match=r"base '/root/elsewhere/model', which is not on this machine"
    ):
        peft_base(adapter)


def test_a_revision_of_the_base_is_written_in_its_own_field(tiny_lm, tmp_path, adapter):
    adapters, lora = load_peft(adapter, tiny_lm.config)
    export_peft(adapters, tiny_lm.config, lora, "some/model@v2", tmp_path / "again")
    fields = json.loads((tmp_path / "again" / ADAPTER_CONFIG).read_text())
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("some/model", "v2")
    assert peft_base(tmp_path / "again") == "some/model@v2"


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory):
    """A GPT-2 without a tokenizer, and below it one PEFT adapter for each module that is named."""
    peft, torch, transformers = map(pytest.importorskip, ("peft", "torch", "transformers"))
    directory = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(directory)
    for module in ("attn.c_attn", "mlp.c_fc"):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        given = {"r": 2, "target_modules": [module], "fan_in_fan_out": True, "init_lora_weights": False}
        peft.get_peft_model(model, peft.LoraConfig(**given)).save_pretrained(directory / module)
    return directory


def test_factors_of_kernels_that_lie_the_other_way_round_compute_the_same(gpt2_dir):
    config = config_from_hf(json.loads((gpt2_dir / "config.json").read_text()))
    params = load_params(open_safetensors(gpt2_dir), config)
    adapters, lora = load_peft(gpt2_dir / "mlp.c_fc", config)
    params = FrozenBase(params, lora.scale).with_adapters({"lm": adapters})["lm"]
    final_BTD = Transformer(config).apply({"params": params}, jnp.asarray(TOKENS)).final_BTD
    logits = final_BTD @ params["embed"]["embedding"].T
    np.testing.assert_allclose(logits, peft_logits(gpt2_dir, gpt2_dir / "mlp.c_fc"), rtol=1e-3, atol=1e-3)


def test_an_adapter_of_fused_maps_is_named(gpt2_dir):
    config = config_from_hf(json.loads((gpt2_dir / "config.json").read_text()))
    with pytest.raises(ValueError, match=r"adapts transformer.h.0.attn.c_attn, .*; merge"):
        load_peft(gpt2_dir / "attn.c_attn", config)


def test_adapters_in_bfloat16_come_back(adapter, tiny_lm, tmp_path):
    adapters, lora = load_peft(adapter, tiny_lm.config)
    export_peft(adapters, tiny_lm.config, lora, "some/model", tmp_path / "half", dtype="bfloat16")
    half, _ = load_peft(tmp_path / "half", tiny_lm.config)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), adapters)
    jax.tree.map(np.testing.assert_array_equal, half, rounded)
