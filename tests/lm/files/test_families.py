"""What differs between families, without another implementation to compare with."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_models import BLOCKS, CONFIGS, VOCABULARY, WINDOW
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from nla_jax.autoencoder.prompts import ReconstructorPrompt
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.lm.attention import PAD_POSITION
from nla_jax.lm.config import Experts, LMConfig, RopeScaling
from nla_jax.lm.files.configs import config_from_hf, config_to_hf
from nla_jax.lm.files.families import FAMILIES
from nla_jax.lm.files.safetensors_files import open_safetensors
from nla_jax.lm.files.weights import export_hf, load_params
from nla_jax.lm.logits import token_statistics
from nla_jax.lm.sampling import for_decoding, sample
from nla_jax.lm.transformer import (
    Injection,
    Transformer,
    extend,
    parameter_shapes,
    stack_blocks,
    unstack_blocks,
)

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (2, 9)))


def hf_config(name, **changes):
    """The config.json of a small model of a family."""
    model_type, settings = CONFIGS[name]
    architecture = next(f.architecture for f in FAMILIES.values() if f.model_type == model_type)
    return {"architectures": [architecture], **settings, **changes}


def random_model(name):
    """Config and parameters that are all random."""
    config, rng = config_from_hf(hf_config(name)), np.random.default_rng(1)
    flat = {
        path: jnp.asarray(
            rng.standard_normal(shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5), jnp.float32
        )
        for path, shape in parameter_shapes(config).items()
    }
    return config, unflatten_dict(flat, sep="/")


def assert_same_params(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_truncation_cuts_the_patterns_and_gives_the_same_stream(tmp_path):
    config, params = random_model("gemma3")
    backbone = config.truncated(1)
    assert (backbone.num_layers, backbone.sliding_layers, backbone.has_lm_head) == (2, (True, False), False)
    kept = {name: params[name] for name in ("embed", "blocks_0", "blocks_1")}
    out = Transformer(backbone).apply({"params": kept}, TOKENS, capture=(1,))
    whole = Transformer(config).apply({"params": params}, TOKENS, capture=(1,))
    np.testing.assert_allclose(out.resid[1], whole.resid[1], rtol=1e-5, atol=1e-5)
    assert out.final_BTD is None

    export_hf(kept, backbone, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["layer_types"] == ["sliding_attention", "full_attention"]
    assert dataclasses.replace(config_from_hf(written), has_lm_head=False) == backbone
    # Gemma adds one to the scales of its norms.
    np.testing.assert_array_equal(
        load_file(tmp_path / "model.safetensors")["model.norm.weight"], np.zeros(24)
    )
    assert_same_params(load_params(open_safetensors(tmp_path), backbone), kept)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "mixtral"])
def test_scanned_blocks_equal_unrolled_ones(name):
    """Windows and frequencies that differ between blocks (gemma3), no frequencies (gpt2), experts (mixtral)."""
    config, params = random_model(name)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, VOCABULARY, (2, WINDOW + 4)))

    def loss(params):
        final_BTD = Transformer(config).apply({"params": params}, tokens).final_BTD
        return jnp.sin(final_BTD).sum(), final_BTD

    unrolled, unrolled_final = jax.jit(jax.grad(loss, has_aux=True))(params)
    scanned, scanned_final = jax.jit(jax.grad(loss, has_aux=True))(stack_blocks(params))
    np.testing.assert_allclose(scanned_final, unrolled_final, rtol=1e-4, atol=1e-4)
    for path, leaf in flatten_dict(unstack_blocks(scanned), sep="/").items():
        other = flatten_dict(unrolled, sep="/")[path]
        assert np.linalg.norm(leaf - other) <= 1e-4 * np.linalg.norm(other) + 1e-6, path


def test_blocks_of_two_kinds_cannot_be_scanned():
    _, params = random_model("qwen3_moe")
    with pytest.raises(ValueError, match="blocks 0 and 1 have different parameters.*turn scan_blocks off"):
        stack_blocks(params)


def test_reconstructor_of_learned_positions_keeps_them():
    config, params = random_model("gpt2")
    prompt = ReconstructorPrompt("{explanation}", prefix=(3, 4), suffix=(5,))
    reconstructor = Reconstructor(config.truncated(1), prompt)
    ids = TOKENS[:, :5]
    rows = jnp.concatenate([jnp.tile(jnp.array([[3, 4]]), (2, 1)), ids], axis=1)
    whole = Transformer(config).apply({"params": params}, rows, capture=(1,))
    rebuilt = reconstructor(reconstructor.init(params), ids, jnp.array([5, 5]))
    np.testing.assert_allclose(rebuilt, whole.resid[1][:, -1], rtol=1e-4, atol=1e-5)


def test_truncation_cuts_the_experts_pattern():
    config = config_from_hf(hf_config("qwen3_moe"))
    assert config.expert_layers == (True, False, True)
    assert config.truncated(1).expert_layers == (True, False)


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_the_embedding_layer_is_the_stream_that_enters_block_0(name):
    config, params = random_model(name)
    run = jax.jit(lambda **kw: Transformer(config).apply({"params": params}, TOKENS, **kw).final_BTD)
    stream_BD = params["embed"]["embedding"][TOKENS[:, 4]]
    if name == "gemma3":
        stream_BD = stream_BD * config.d_model**0.5
    else:
        stream_BD = stream_BD + params["position_embed"]["embedding"][4]
    np.testing.assert_allclose(run(inject=Injection(stream_BD, slot=4)), run(), rtol=1e-5, atol=1e-5)


def test_learned_positions_keep_padding_finite_and_end_with_the_table():
    config, params = random_model("gpt2")
    positions = jnp.where(jnp.arange(9) < 7, jnp.arange(9), PAD_POSITION)
    apply = jax.jit(lambda p: Transformer(config).apply({"params": params}, TOKENS, p).final_BTD)
    plain = apply(jnp.tile(jnp.arange(9), (2, 1)))
    padded = apply(jnp.tile(positions, (2, 1)))
    np.testing.assert_allclose(padded[:, :7], plain[:, :7], rtol=1e-5, atol=1e-5)
    assert np.isfinite(padded).all()
    late = apply(jnp.tile(jnp.arange(9) + config.max_positions - 8, (2, 1)))
    assert np.isnan(late[:, 8]).all()


def test_sampled_log_probs_are_those_of_the_capped_logits():
    config, params = random_model("gemma2")
    prompt = jax.jit(lambda p: Transformer(config).apply({"params": p}, TOKENS))(params)
    samples = sample(
        for_decoding(params, config),
        config,
        extend(None, prompt.segments),
        prompt.final_BTD[:, -1],
        9,
        jax.random.key(0),
        group=1,
        max_tokens=6,
        closing=(VOCABULARY,),
        end_token=VOCABULARY,
    )
    whole = jnp.concatenate([TOKENS, samples.tokens_BT], axis=1)
    final = Transformer(config).apply({"params": params}, whole).final_BTD[:, 8:-1]
    expected = token_statistics(params, config, final, samples.tokens_BT).log_prob
    np.testing.assert_allclose(samples.log_probs_BT, expected, atol=1e-4)


def rename_tensors(directory, rename):
    tensors = load_file(directory / "model.safetensors")
    save_file({rename(name): value for name, value in tensors.items()}, directory / "model.safetensors")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_gemma3_inside_its_multimodal_wrapper(tmp_path, prefix):
    config, params = random_model("gemma3")
    export_hf(params, config, tmp_path)
    rename_tensors(tmp_path, lambda name: name.replace("model.", prefix, 1))
    tensors = load_file(tmp_path / "model.safetensors")
    vision = {"vision_tower.a.weight": np.ones(2), "multi_modal_projector.b": np.ones(3)}
    save_file(tensors | vision, tmp_path / "model.safetensors")
    text = {key: value for key, value in config_to_hf(config).items() if key != "architectures"}
    wrapper = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    assert config_from_hf(wrapper) == config
    assert_same_params(load_params(open_safetensors(tmp_path), config), params)
    save_file(tensors | {"audio_tower.a": np.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unused: audio_tower.a"):
        load_params(open_safetensors(tmp_path), config)


def test_gpt2_without_its_prefix_and_with_mask_buffers(tmp_path):
    config, params = random_model("gpt2")
    export_hf(params, config, tmp_path)
    rename_tensors(tmp_path, lambda name: name.removeprefix("transformer."))
    tensors = load_file(tmp_path / "model.safetensors") | {"h.0.attn.bias": np.ones((1, 1, 4, 4))}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_params(load_params(open_safetensors(tmp_path), config), params)


def test_fused_and_stacked_tensors_by_hand(tmp_path):
    config, params = random_model("gpt_neox")
    export_hf(params, config, tmp_path)
    fused = load_file(tmp_path / "model.safetensors")["gpt_neox.layers.1.attention.query_key_value.weight"]
    # Rows: query, key and value of head 0, then those of head 1, ...
    size = config.head_dim
    for offset, name in enumerate(["query", "key", "value"]):
        kernel = params["blocks_1"]["attention"][name]["kernel"]
        head_2 = fused[(3 * 2 + offset) * size :][:size]
        np.testing.assert_array_equal(head_2, kernel[:, 2 * size : 3 * size].T)

    config, params = random_model("mixtral")
    export_hf(params, config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, path in {"w1": "gate", "w3": "up", "w2": "down"}.items():
        expert = tensors[f"model.layers.2.block_sparse_moe.experts.3.{name}.weight"]
        np.testing.assert_array_equal(expert, params["blocks_2"]["mlp"][path][3].T)


def test_a_missing_expert_is_named(tmp_path):
    config, params = random_model("qwen3_moe")
    export_hf(params, config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.4.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model.layers.2.mlp.experts.4.up_proj.weight"):
        load_params(open_safetensors(tmp_path), config)


def test_fields_that_published_configs_leave_out_come_from_the_family():
    # What google/gemma-3-4b-it's text_config says.
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = config_from_hf({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text})
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert config.rope(0) == (10000.0, None)
    assert config.rope(5) == (1000000.0, RopeScaling("linear", 8.0))
    assert [config.window(layer) for layer in range(4, 8)] == [1024, None, 1024, 1024]
    assert config.tie_embeddings and config.attention_scale == 1 / 16


def test_expert_layers_by_step():
    config = config_from_hf(hf_config("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[]))
    assert config.expert_layers == (False, True, False)
    assert config_from_hf(config_to_hf(config)) == config


def test_a_window_that_is_switched_off_is_none():
    config = config_from_hf(hf_config("qwen2", use_sliding_window=False))
    assert (config.sliding_window, config.sliding_layers) == (None, ())
    assert config_from_hf(hf_config("qwen2")).sliding_layers == (False, *[True] * (BLOCKS - 1))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function='tanh'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0"),
        ("gemma3", {"hidden_activation": "mish"}, "hidden_activation='mish'"),
        ("qwen3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 3, "short_factor": [1.0] * 3}},
            "rope_type='longrope'",
        ),
    ],
)
def test_fields_that_are_refused(name, change, message):
    with pytest.raises(ValueError, match=f"config fields not supported by this port: .*{message}"):
        config_from_hf(hf_config(name, **change))


def test_unknown_architectures_list_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown architecture 'T5Model'; known: GPT2LM.*Gemma3ForCond.*Qwen3Moe"
    ):
        config_from_hf({"architectures": ["T5Model"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_layers": (True,), "sliding_window": 3}, "sliding_layers has 1 entries for 2 blocks"),
        ({"sliding_layers": (True, False)}, "sliding_layers names blocks, but sliding_window is None"),
        ({"expert_layers": (True, False)}, "expert_layers names blocks, but experts is None"),
        ({"expert_layers": (True,) * 3, "experts": Experts(2, 1, 4)}, "expert_layers has 3 entries"),
    ],
)
def test_patterns_that_contradict_the_config(change, message):
    with pytest.raises(ValueError, match=message):
        LMConfig("llama", 10, 8, 2, 2, 1, 4, 16, **change)


def test_the_windows_in_these_tests_are_crossed():
    assert TOKENS.shape[1] > WINDOW
