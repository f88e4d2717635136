import pytest

from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.configs import config_from_gguf, config_from_hf

HF = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 77,
}
EXPECTED = LMConfig(
    family="llama",
    vocab_size=100,
    d_model=24,
    num_layers=5,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    d_ff=48,
    norm_eps=1e-5,
    rope_theta=500.0,
    tie_embeddings=True,
    max_positions=77,
)
HEADER = {
    "general.architecture": "llama",
    "tokenizer.ggml.tokens": ["x"] * 100,
    "llama.embedding_length": 24,
    "llama.block_count": 5,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.feed_forward_length": 48,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500.0,
    "llama.context_length": 77,
}


def test_hf_config_fields():
    assert config_from_hf(HF) == EXPECTED


def test_rope_theta_is_found_where_transformers_5_writes_it():
    hf = {k: v for k, v in HF.items() if k != "rope_theta"}
    hf["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    assert config_from_hf(hf) == EXPECTED


def test_hf_defaults_follow_llama():
    hf = {k: v for k, v in HF.items() if k not in ("num_key_value_heads", "tie_word_embeddings")}
    config = config_from_hf({**hf, "head_dim": 10})
    assert (config.num_kv_heads, config.tie_embeddings, config.head_dim) == (6, False, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "unknown architecture 'MambaForCausalLM'; known: .*Llama"),
        ({"hidden_act": "mish"}, "not supported by this port: hidden_act='mish'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_type='yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"vocab_size": "many"}, "transformers does not accept this llama config"),
        ({"num_key_value_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
    ],
)
def test_hf_configs_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**HF, **change})


def test_gguf_header_gives_the_same_config():
    assert config_from_gguf(HEADER, frozenset({"token_embd.weight"})) == EXPECTED


def test_gguf_with_an_output_tensor_is_not_tied():
    assert not config_from_gguf(HEADER, frozenset({"output.weight"})).tie_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "unknown architecture 'mamba'"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn' is not supported"),
        ({"llama.rope.dimension_count": 2}, "llama.rope.dimension_count=2 is not supported"),
        ({"llama.expert_count": 8}, "llama.expert_count=8 is not supported"),
        ({"llama.attention.sliding_window": 7}, "llama.attention.sliding_window=7 is not supported"),
    ],
)
def test_gguf_headers_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_gguf({**HEADER, **change}, frozenset())


@pytest.mark.parametrize("layer", [-1, 5])
def test_layers_outside_the_model(layer):
    with pytest.raises(ValueError, match=f"layer {layer} is outside the model: it has blocks 0 to 4"):
        EXPECTED.check_layer(layer)


def test_truncated_keeps_blocks_up_to_and_including_the_layer():
    backbone = EXPECTED.truncated(2)
    assert (backbone.num_layers, backbone.has_lm_head) == (3, False)
