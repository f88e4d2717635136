import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tiny_model import write_tiny_model

from nla_jax.lm.activations import residual_of
from nla_jax.lm.files import weights
from nla_jax.lm.files.configs import config_from_hf
from nla_jax.lm.files.safetensors_files import SafetensorsFiles, open_safetensors
from nla_jax.lm.files.weights import export_hf, load_language_model, load_params


@pytest.fixture
def model_dir(tiny_model_dir, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def edit_tensors(directory, change):
    """Apply `change` to the dict of tensors in a directory."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory, **fields):
    config = json.loads((directory / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(config))


def relabel(file, kinds):
    """Give tensors of a file another type with the same number of values."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header, moved, body = json.loads(data[8:start]), 0, b""
    names = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    for name in names:
        first, last = header[name]["data_offsets"]
        values = data[start + first : start + last]
        if name in kinds:
            old, header[name]["dtype"] = kinds[name]
            assert old == "F32"
            values = values[: len(values) // 4]
        header[name]["data_offsets"] = [moved, moved := moved + len(values)]
        body += values
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)


def assert_same_params(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_parameter_tree_holds_the_files_tensors(tiny_model_dir, tiny_lm):
    tensors = load_file(tiny_model_dir / "model.safetensors")
    flat = flatten_dict(tiny_lm.params, sep="/")
    assert len(flat) == len(tensors)
    block = "model.layers.2"
    for path, expected in {
        "embed/embedding": tensors["model.embed_tokens.weight"],
        "final_norm/scale": tensors["model.norm.weight"],
        "blocks_2/attention_norm/scale": tensors[f"{block}.input_layernorm.weight"],
        "blocks_2/attention/query/kernel": tensors[f"{block}.self_attn.q_proj.weight"].T,
        "blocks_2/attention/key/kernel": tensors[f"{block}.self_attn.k_proj.weight"].T,
        "blocks_2/attention/value/kernel": tensors[f"{block}.self_attn.v_proj.weight"].T,
        "blocks_2/attention/out/kernel": tensors[f"{block}.self_attn.o_proj.weight"].T,
        "blocks_2/mlp_norm/scale": tensors[f"{block}.post_attention_layernorm.weight"],
        "blocks_2/mlp/gate/kernel": tensors[f"{block}.mlp.gate_proj.weight"].T,
        "blocks_2/mlp/up/kernel": tensors[f"{block}.mlp.up_proj.weight"].T,
        "blocks_2/mlp/down/kernel": tensors[f"{block}.mlp.down_proj.weight"].T,
    }.items():
        np.testing.assert_array_equal(flat[path], expected, err_msg=path)
        assert flat[path].dtype == jnp.float32


def test_untied_models_have_their_own_head(tmp_path):
    directory = write_tiny_model(tmp_path, tie=False, num_layers=1)
    head = load_language_model(directory).params["lm_head"]["kernel"]
    np.testing.assert_array_equal(head, load_file(directory / "model.safetensors")["lm_head.weight"].T)


def test_name_is_the_absolute_path(tiny_model_dir, monkeypatch):
    monkeypatch.chdir(tiny_model_dir.parent)
    assert load_language_model(tiny_model_dir.name).name == str(tiny_model_dir)


def test_bfloat16_files_become_float32(model_dir, tiny_lm):
    edit_tensors(model_dir, lambda t: t.update({k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()}))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), tiny_lm.params)
    assert_same_params(load_language_model(model_dir).params, rounded)


def shard(directory):
    """Split model.safetensors into two shards and an index; return the shards' names."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


def test_shards_load_like_one_file(model_dir, tiny_lm):
    shard(model_dir)
    assert_same_params(load_language_model(model_dir).params, tiny_lm.params)


def test_missing_shard(model_dir):
    second = shard(model_dir)[1]
    (model_dir / second).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {second} named by model.safetensors.index.json"):
        load_language_model(model_dir)


def test_parameters_can_stay_in_bfloat16(model_dir, tiny_lm):
    edit_tensors(model_dir, lambda t: t.update({k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()}))
    params = load_language_model(model_dir, dtype="bfloat16").params
    assert_same_params(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_lm.params))


def test_float16_files(model_dir, tiny_lm):
    edit_tensors(model_dir, lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()}))
    rounded = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), tiny_lm.params)
    assert_same_params(load_language_model(model_dir).params, rounded)


@pytest.mark.parametrize(
    "index", [(), (slice(2, 5),), (slice(0, 9), slice(1, 3)), (slice(4, 8), slice(0, 7))]
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_parts_of_a_tensor(tmp_path, index, dtype):
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((9, 7)).astype(dtype) for name in "ab"}
    save_file(tensors, tmp_path / "model.safetensors")
    part = open_safetensors(tmp_path).read("b", index)
    assert part.dtype == dtype
    np.testing.assert_array_equal(part, tensors["b"][index])


def test_nothing_of_a_file_stays_mapped(tiny_model_dir, tiny_lm):
    source = open_safetensors(tiny_model_dir)
    source.read("model.norm.weight", (slice(0, 3),))
    source.read("model.embed_tokens.weight", (slice(0, 3), slice(0, 3)))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what is mapped")
    assert str(tiny_model_dir) not in maps.read_text()


def test_progress_is_shown_for_large_models_alone(tiny_model_dir, capsys, monkeypatch):
    load_language_model(tiny_model_dir)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(weights, "QUIET_BELOW", 0)
    params = load_language_model(tiny_model_dir).params
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert f"100%|██████████| {size / 1000:.0f}k/{size / 1000:.0f}k" in capsys.readouterr().err


def test_everything_that_does_not_fit_is_named_at_once(model_dir):
    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        tensors["model.norm.weight"] = np.ones(31, np.float32)

    edit_tensors(model_dir, damage)
    with pytest.raises(ValueError, match="llama model of 4 blocks") as error:
        load_language_model(model_dir)
    assert "missing: model.layers.1.mlp.up_proj.weight" in str(error.value)
    assert "unused: model.layers.0.self_attn.q_proj.bias" in str(error.value)
    assert "wrong shape: model.norm.weight (31,) instead of (32,)" in str(error.value)


def test_tensors_that_are_no_weights_as_they_are(model_dir):
    edit_tensors(model_dir, lambda t: t.update({"model.norm.weight": np.ones(32, np.int32)}))
    names = {"model.layers.0.mlp.up_proj.weight": ("F32", "F8_E4M3")}
    relabel(model_dir / "model.safetensors", names)
    with pytest.raises(ValueError, match="holds tensors that are not F32, F16, BF16: ") as error:
        load_language_model(model_dir)
    assert "model.norm.weight I32, model.layers.0.mlp.up_proj.weight F8_E4M3; take the" in str(error.value)


def test_rotary_buffers_are_ignored(model_dir, tiny_lm):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(model_dir, lambda t: t.update({name: np.ones(4, np.float32)}))
    assert_same_params(load_language_model(model_dir).params, tiny_lm.params)


def test_repeated_tied_head_is_read_once(model_dir, tiny_lm):
    edit_tensors(model_dir, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert_same_params(load_language_model(model_dir).params, tiny_lm.params)


def test_tied_head_that_differs_is_an_error(model_dir):
    edit_tensors(model_dir, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true: lm_head.weight"):
        load_language_model(model_dir)


def test_truncated_safetensors(model_dir):
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or not a safetensors file"):
        load_language_model(model_dir)


def test_truncated_shard(model_dir):
    second = model_dir / shard(model_dir)[1]
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{second.name} is truncated or not a safetensors file .* again"):
        load_language_model(model_dir)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "index.json has no weight_map"),
        ("[]", "index.json holds a list instead of an object; download it again"),
        ("{", "index.json is not valid JSON"),
    ],
)
def test_index_that_is_none(model_dir, text, message):
    (model_dir / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_language_model(model_dir)


def test_pickled_weights_are_not_read(model_dir):
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="lacks model.safetensors .weights are read from safetensors"):
        load_language_model(model_dir)


@pytest.fixture
def names_read(monkeypatch):
    """The names of the tensors that are read, in the order of reading."""
    names, read = [], SafetensorsFiles.read

    def noted(self, name, index=()):
        names.append(name)
        return read(self, name, index)

    monkeypatch.setattr(SafetensorsFiles, "read", noted)
    return names


@pytest.mark.parametrize("last_layer", [0, 2])
def test_nothing_beyond_the_last_layer_is_read(tiny_model_dir, tiny_lm, names_read, last_layer):
    lm = load_language_model(tiny_model_dir, last_layer=last_layer)
    blocks = [int(name.split(".")[2]) for name in names_read if ".layers." in name]
    assert set(blocks) == set(range(last_layer + 1)) and len(blocks) == 9 * (last_layer + 1)
    assert [name for name in names_read if ".layers." not in name] == ["model.embed_tokens.weight"]
    assert lm.config == tiny_lm.config.truncated(last_layer) and not lm.config.has_lm_head
    wanted = {"embed", *(f"blocks_{layer}" for layer in range(last_layer + 1))}
    assert_same_params(lm.params, {name: tiny_lm.params[name] for name in wanted})
    # The activations are those of the whole model.
    ids = tiny_lm.tokenizer.encode("The array has a shape")
    expected_TD = residual_of(tiny_lm.params, tiny_lm.config, ids, last_layer)
    np.testing.assert_allclose(
        residual_of(lm.params, lm.config, ids, last_layer), expected_TD, rtol=1e-5, atol=1e-6
    )


def test_what_is_not_read_must_fit_all_the_same(model_dir):
    edit_tensors(model_dir, lambda t: t.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(
        ValueError, match=r"do not fit a llama model of 4 blocks.*missing: model.layers.3.mlp.up_proj"
    ):
        load_language_model(model_dir, last_layer=1)


def test_a_last_layer_that_there_is_not(tiny_model_dir):
    with pytest.raises(ValueError, match="layer 4 is outside the model: it has blocks 0 to 3"):
        load_language_model(tiny_model_dir, last_layer=4)


def test_config_and_tokenizer_without_weights(tiny_model_dir, tiny_lm, names_read):
    lm = load_language_model(tiny_model_dir, weights=False)
    assert (lm.config, lm.name, lm.params) == (tiny_lm.config, tiny_lm.name, {}) and names_read == []
    assert lm.tokenizer.encode("a shape") == tiny_lm.tokenizer.encode("a shape")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_files(model_dir, file):
    (model_dir / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load_language_model(model_dir)


def test_config_that_is_not_json(model_dir):
    (model_dir / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        load_language_model(model_dir)


def test_config_without_a_field(model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    del config["hidden_size"]
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json lacks the field 'hidden_size'"):
        load_language_model(model_dir)


@pytest.mark.parametrize("tie", [True, False])
def test_export_then_load_is_the_identity(tmp_path, tie):
    # Kernels whose sides differ, so that a forgotten transpose cannot pass.
    lm = load_language_model(write_tiny_model(tmp_path / "a", tie=tie, num_layers=2, d_model=24, d_ff=40))
    export_hf(lm.params, lm.config, tmp_path / "b")
    assert config_from_hf(json.loads((tmp_path / "b" / "config.json").read_text())) == lm.config
    assert_same_params(load_params(open_safetensors(tmp_path / "b"), lm.config), lm.params)
    original, exported = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    assert_same_params(original, exported)


def test_truncated_backbone_is_written_with_a_norm_and_read_without(tmp_path, tiny_lm):
    config = tiny_lm.config.truncated(1)
    params = {k: tiny_lm.params[k] for k in ("embed", "blocks_0", "blocks_1")}
    export_hf(params, config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.norm.weight"], np.ones(32))
    assert len(tensors) == 2 + 2 * 9
    assert_same_params(load_params(open_safetensors(tmp_path), config), params)


def test_export_of_parameters_that_do_not_fit(tmp_path, tiny_lm):
    params = {**tiny_lm.params, "final_norm": {"scale": jnp.ones(31)}}
    del params["blocks_3"]
    with pytest.raises(ValueError, match="do not fit the config") as error:
        export_hf(params, tiny_lm.config, tmp_path)
    assert "blocks_3/attention/key/kernel" in str(error.value)
    assert "final_norm/scale (31,)" in str(error.value)
