import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from nla_jax.autoencoder.prompts import PromptTemplates, build_reconstructor_prompt, build_verbalizer_prompt
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import InjectionConfig, Verbalizer
from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.interop.model_directories import (
    AdapterOrigin,
    export_reconstructor,
    export_verbalizer,
    live_tokens,
    load_reconstructor,
    load_verbalizer,
)
from nla_jax.lm.lora import LoraConfig, init_adapters
from nla_jax.pipeline.load import load

TEMPLATES = PromptTemplates(verbalizer="Vector: {injection_char}. Explain {it}.")


@pytest.fixture(scope="module")
def own(tiny_lm, tmp_path_factory):
    """Directories of an AV and an AR with the plainest settings."""
    folder = tmp_path_factory.mktemp("own")
    prompt = build_verbalizer_prompt(tiny_lm.tokenizer, TEMPLATES)
    verbalizer = Verbalizer(tiny_lm.config, prompt, InjectionConfig(scale=3.0), 3.0)
    arguments = tiny_lm.tokenizer, TEMPLATES
    export_verbalizer(verbalizer, verbalizer.init(tiny_lm.params), *arguments, folder / "av", layer=1)
    reconstructor = Reconstructor(tiny_lm.config.truncated(1), build_reconstructor_prompt(*arguments))
    params = reconstructor.init(tiny_lm.params)
    tokens = live_tokens(prompt, None)
    export_reconstructor(reconstructor, params, *arguments, folder / "ar", tokens=tokens)
    return folder


@pytest.mark.parametrize(
    ("injection", "changes", "refused", "notes"),
    [
        (InjectionConfig(scale=3.0), {}, False, ["append it there"]),
        (InjectionConfig(scale=3.0), {"forced_start": ""}, False, []),
        (
            InjectionConfig(layer=2, mode="add", scale=3.0),
            {},
            True,
            ["enters after block 2, not at the embedding", "by mode 'add', not 'replace'", "append it there"],
        ),
        (
            InjectionConfig(scale=3.0, affine=True),
            {"chat": False, "closing": "<|im_end|>"},
            True,
            [
                "a learned affine map",
                "plain text, not a user turn",
                "append it there",
                "answers close with '<|im_end|>', not with '</explanation>'",
            ],
        ),
    ],
)
def test_every_setting_comes_back(injection, changes, refused, notes, tiny_lm, tmp_path):
    """Also those that the shared format cannot express; the reference's client then finds no scale and stops."""
    templates = dataclasses.replace(TEMPLATES, **changes)
    prompt = build_verbalizer_prompt(tiny_lm.tokenizer, templates)
    verbalizer = Verbalizer(tiny_lm.config, prompt, injection, 3.0)
    params = verbalizer.init(tiny_lm.params)
    if injection.affine:
        d = tiny_lm.config.d_model
        params["affine"] = {"kernel": jnp.arange(d * d, dtype=jnp.float32).reshape(d, d), "bias": jnp.ones(d)}
    found = export_verbalizer(verbalizer, params, tiny_lm.tokenizer, templates, tmp_path, layer=1)
    assert len(found) == len(notes)
    assert all(note in text for note, text in zip(notes, found, strict=True))
    scale = yaml.safe_load((tmp_path / "nla_meta.yaml").read_text())["extraction"]["injection_scale"]
    assert scale == (None if refused else 3.0)
    loaded = load_verbalizer(tmp_path)
    assert loaded.verbalizer == verbalizer
    assert (loaded.meta.layer, loaded.meta.templates.closing) == (1, templates.closing)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_reconstructor_comes_back(own, tiny_lm):
    loaded = load_reconstructor(own / "ar")
    assert loaded.reconstructor.config == tiny_lm.config.truncated(1)
    assert loaded.reconstructor.prompt == build_reconstructor_prompt(tiny_lm.tokenizer, TEMPLATES)
    # The reference's AR class refuses a tokenizer that names a BOS and does not write it.
    assert tiny_lm.tokenizer.bos_token is not None and loaded.tokenizer.bos_token is None


def broken(own, tmp_path, role, change):
    """A copy of an exported model with one thing changed."""
    directory = tmp_path / "copy"
    shutil.copytree(own / role, directory)
    change(directory)
    return directory


def meta_change(*keys, value):
    def change(directory):
        path = directory / "nla_meta.yaml"
        fields = yaml.safe_load(path.read_text())
        inner = fields
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(yaml.safe_dump(fields))

    return change


def config_change(**values):
    def change(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def head_change(tensors):
    return lambda directory: save_file(tensors, directory / "value_head.safetensors")


def with_bad_numbers(*bad):
    """A head with these numbers at its end."""
    head_DD = np.eye(32, dtype=np.float32)
    head_DD.ravel()[-len(bad) :] = bad
    return head_DD


@pytest.mark.parametrize(
    ("role", "change", "message"),
    [
        ("av", meta_change("role", value="critic"), "role is 'critic': this is an AR, not an AV"),
        ("ar", meta_change("role", value="actor"), "role is 'actor': this is an AV, not an AR"),
        (
            "av",
            meta_change("tokens", "injection_token_id", value=77),
            "injection_token_id: meta 77, tokenizer 3; use the tokenizer files that came with the model",
        ),
        (
            "av",
            meta_change("tokens", "injection_left_neighbor_id", value=78),
            "left_neighbor_id: meta 78, tokenizer",
        ),
        (
            "av",
            meta_change("tokens", "critic_suffix_ids", value=[1, 2]),
            r"suffix_ids: meta \(1, 2\), tokenizer \(",
        ),
        (
            "ar",
            meta_change("tokens", "injection_token_id", value=77),
            "injection_token_id: meta 77, tokenizer 3",
        ),
        (
            "ar",
            meta_change("tokens", "critic_suffix_ids", value=[1, 2]),
            r"suffix_ids: meta \(1, 2\), tokenizer \(",
        ),
        ("av", config_change(hidden_size=64), "config.json says d_model 64, nla_meta.yaml says 32"),
        (
            "ar",
            config_change(num_hidden_layers=4),
            "config.json says 4 blocks, nla_meta.yaml says layer 1, which needs 2",
        ),
        (
            "ar",
            head_change({"weight": np.zeros((32, 31), np.float32)}),
            r"holds {'weight': \(32, 31\)}, expected {'weight': \(32, 32\)}",
        ),
        (
            "ar",
            head_change({"weight": np.zeros((32, 32), np.float32), "bias": np.zeros(32, np.float32)}),
            r"value_head.safetensors holds bias \(32,\) beside weight, which has no place in this model",
        ),
        (
            "ar",
            head_change({"weight": with_bad_numbers(np.nan, np.inf, 3e38)}),
            r"value_head.safetensors: weight holds 3 of 1024 numbers that are NaN, infinite or beyond 1e\+18",
        ),
        ("ar", head_change({"kernel": np.zeros((32, 32), np.float32)}), r"holds {'kernel': "),
        (
            "ar",
            lambda d: (d / "value_head.safetensors").write_bytes(b"x"),
            "truncated or not a safetensors file",
        ),
    ],
)
def test_what_does_not_fit_is_named(own, tmp_path, role, change, message):
    load = {"av": load_verbalizer, "ar": load_reconstructor}[role]
    with pytest.raises(ValueError, match=message) as error:
        load(broken(own, tmp_path, role, change))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("role", "name", "message"),
    [
        ("av", "nla_meta.yaml", "not a model of an NLA"),
        ("av", "config.json", "neither config.json nor adapter_config.json"),
        ("ar", "value_head.safetensors", "is missing; download or export the model again"),
    ],
)
def test_missing_files_are_named(own, tmp_path, role, name, message):
    load = {"av": load_verbalizer, "ar": load_reconstructor}[role]
    with pytest.raises(FileNotFoundError, match=message):
        load(broken(own, tmp_path, role, lambda directory: (directory / name).unlink()))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_numbers_of_an_affine_map_that_are_none_are_counted(name, tiny_lm, tmp_path):
    injection = InjectionConfig(scale=3.0, affine=True)
    prompt = build_verbalizer_prompt(tiny_lm.tokenizer, TEMPLATES)
    verbalizer = Verbalizer(tiny_lm.config, prompt, injection, 3.0)
    params = verbalizer.init(tiny_lm.params)
    export_verbalizer(verbalizer, params, tiny_lm.tokenizer, TEMPLATES, tmp_path, layer=1)
    file = tmp_path / "injection_affine.safetensors"
    tensors = load_file(file)
    tensors[name][..., :2] = np.nan
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match=rf"injection_affine.safetensors: {name} holds (64 of 1024|2 of 32) num"
    ):
        load_verbalizer(tmp_path)


def test_a_config_that_is_not_json_is_named(own, tmp_path):
    directory = broken(own, tmp_path, "av", lambda directory: (directory / "config.json").write_text("{"))
    with pytest.raises(ValueError, match=r"copy/config.json is not valid JSON"):
        load_verbalizer(directory)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_all_exported_files_have_the_mode_that_the_umask_gives(mask, mode, tiny_lm, tmp_path):
    prompt = build_verbalizer_prompt(tiny_lm.tokenizer, TEMPLATES)
    verbalizer = Verbalizer(tiny_lm.config, prompt, InjectionConfig(scale=3.0, affine=True), 3.0)
    reconstructor = Reconstructor(
        tiny_lm.config.truncated(1), build_reconstructor_prompt(tiny_lm.tokenizer, TEMPLATES)
    )
    lora = LoraConfig(2)
    params = verbalizer.init(tiny_lm.params)
    arguments = tiny_lm.tokenizer, TEMPLATES
    before = os.umask(mask)
    try:
        export_verbalizer(verbalizer, params, *arguments, tmp_path / "av", layer=1)
        export_reconstructor(
            reconstructor,
            init_adapters(lora, reconstructor.init(tiny_lm.params), jax.random.key(0)),
            *arguments,
            tmp_path / "ar",
            tokens=live_tokens(prompt, None),
            adapted=AdapterOrigin(lora, "some/model"),
        )
        Yardstick(np.ones(3), np.ones(3), 1.0, 1.0, 5, "rows").save(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    written = {
        "model.safetensors",
        "adapter_model.safetensors",
        "value_head.safetensors",
        "yardstick.safetensors",
    }
    assert modes.keys() > written | {"injection_affine.safetensors", "config.json", "tokenizer.json"}
    assert modes == dict.fromkeys(modes, mode)


def adapter_directory(tiny_lm, tmp_path, base):
    """An AV whose LM is the tiny one with adapters, made for `base`, and its parameters."""
    prompt = build_verbalizer_prompt(tiny_lm.tokenizer, TEMPLATES)
    verbalizer = Verbalizer(tiny_lm.config, prompt, InjectionConfig(scale=3.0), 3.0)
    lora = LoraConfig(4, alpha=6.0)
    params = init_adapters(lora, verbalizer.init(tiny_lm.params), jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1, params)
    origin = AdapterOrigin(lora, base)
    export_verbalizer(verbalizer, params, tiny_lm.tokenizer, TEMPLATES, tmp_path, layer=1, adapted=origin)
    return tmp_path


def change_adapter_config(directory, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_adapters_without_a_named_base_load_onto_the_one_that_is_given(tiny_lm, tiny_model_dir, tmp_path):
    directory = adapter_directory(tiny_lm, tmp_path, str(tiny_model_dir))
    expected = load_verbalizer(directory).params
    change_adapter_config(directory, base_model_name_or_path=None)
    loaded = load_verbalizer(directory, base=tiny_lm).params
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    nla = load(directory, target=str(tiny_model_dir), scan_blocks=False, quiet=True)
    jax.tree.map(np.testing.assert_array_equal, nla.av_params, expected)
    with pytest.raises(ValueError, match=r"names no base_model_name_or_path; give the model .* --target"):
        load(directory, quiet=True)
    with pytest.raises(ValueError, match=r"names no base_model_name_or_path; give the model .* base=\.\.\."):
        load_verbalizer(directory)
    wide = dataclasses.replace(tiny_lm, config=dataclasses.replace(tiny_lm.config, d_model=48))
    with pytest.raises(
        ValueError, match=r"the model that it adapts, which adapter_config.json does not name"
    ):
        load_verbalizer(directory, base=wide)


def test_an_adapter_with_a_plain_scale_is_the_same_avs(tiny_lm, tiny_model_dir, tmp_path):
    """alpha / r with alpha 12 is alpha / sqrt(r) with alpha 6 where r is 4."""
    directory = adapter_directory(tiny_lm, tmp_path, str(tiny_model_dir))
    expected = load_verbalizer(directory, base=tiny_lm).params
    change_adapter_config(directory, use_rslora=False, lora_alpha=12)
    loaded = load_verbalizer(directory, base=tiny_lm).params
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
