import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from nla_jax.evaluation.dictionaries import SparseDictionary
from nla_jax.evaluation.dictionary_files import read_dictionary, save_dictionary

D, F, LAYER = 2, 4, 20
H = np.float32([[3, 4]])
ENCODE = np.float32([[1, 0, -1, 1], [0, 1, 0, 1]])
LINEAR = {
    "W_enc": ENCODE,
    "W_dec": ENCODE.T.copy(),
    "b_enc": np.float32([0, 1, 0, -5]),
    "b_dec": np.float32([1, 0]),
}


def read(path, layer=LAYER, d_model=D):
    return read_dictionary(path, layer=layer, d_model=d_model)


def saelens(folder, arrays=LINEAR, **config):
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "sae_weights.safetensors")
    common = {
        "architecture": "standard",
        "hook_name": "blocks.20.hook_resid_post",
        "apply_b_dec_to_input": False,
    }
    (folder / "cfg.json").write_text(json.dumps(common | config))
    return folder


def strengths(path):
    return read(path).strengths(H)[0].tolist()


def test_a_plain_file_is_a_relu_after_the_bias(tmp_path):
    save_file(LINEAR, tmp_path / "plain.safetensors")
    assert strengths(tmp_path / "plain.safetensors") == [2, 5, 0, 1]
    save_file({name: LINEAR[name] for name in ("W_enc", "W_dec")}, tmp_path / "plain.safetensors")
    assert strengths(tmp_path / "plain.safetensors") == [3, 4, 0, 7]


def test_what_is_saved_is_read(tmp_path):
    path = tmp_path / "own.safetensors"
    own = SparseDictionary(
        ENCODE,
        LINEAR["b_enc"],
        LINEAR["W_dec"],
        LINEAR["b_dec"],
        "of the test",
        k=1,
        normalization="layer_norm",
    )
    save_dictionary(own, path, layer=LAYER, recipe={"steps": 3})
    again = read(path)
    assert (again.k, again.normalization, again.is_centered) == (1, "layer_norm", True)
    assert again.source == "of the test"
    np.testing.assert_array_equal(again.strengths(H), own.strengths(H))
    with pytest.raises(ValueError, match="after block 20, .* after block 19"):
        read(path, layer=19)


def test_architectures_of_saelens(tmp_path):
    assert strengths(saelens(tmp_path / "a")) == [3, 5, 0, 2]
    assert strengths(saelens(tmp_path / "a") / "cfg.json") == [3, 5, 0, 2]
    assert strengths(saelens(tmp_path / "a", apply_b_dec_to_input=True)) == [2, 5, 0, 1]
    assert strengths(saelens(tmp_path / "b", architecture="topk", k=2)) == [3, 5, 0, 0]
    older = saelens(tmp_path / "b", activation_fn_str="topk", activation_fn_kwargs={"k": 1})
    assert strengths(older) == [0, 5, 0, 0]
    jumping = LINEAR | {"threshold": np.float32([3, 4, 0, 1])}
    assert strengths(saelens(tmp_path / "c", jumping, architecture="jumprelu")) == [0, 5, 0, 2]
    gated = {name: LINEAR[name] for name in ("W_enc", "W_dec", "b_dec")} | {
        "b_gate": np.float32([-4, 0, 0, 0]),
        "b_mag": np.float32([0, -1, 0, 0]),
        "r_mag": np.float32([0, 0, 0, np.log(2)]),
    }
    # The first gate is closed; 4 - 1, and 7 times 2.
    found = strengths(saelens(tmp_path / "d", gated, architecture="gated"))
    np.testing.assert_allclose(found, [0, 3, 0, 14], rtol=1e-6)


def test_options_of_saelens_that_change_what_is_computed(tmp_path):
    scaled = LINEAR | {"W_dec": 2 * LINEAR["W_dec"]}
    unit = read(saelens(tmp_path / "a", scaled, architecture="topk", k=1, rescale_acts_by_decoder_norm=True))
    # The directions have norms 2, 2, 2 and √8; times these the strengths are 6, 10, 0 and 2 √8.
    np.testing.assert_allclose(unit.strengths(H), [[0, 10, 0, 0]])
    np.testing.assert_allclose(unit.decode(unit.strengths(H), H), [[1, 10]])
    tuned = LINEAR | {"finetuning_scaling_factor": np.float32([1, 3, 1, 1])}
    tuned = read(saelens(tmp_path / "b", tuned, finetuning_scaling_factor=True))
    np.testing.assert_allclose(tuned.decode(np.float32([[0, 1, 0, 0]]), H), [[1, 3]])
    assert read(saelens(tmp_path / "c", normalize_activations="layer_norm")).normalization == "layer_norm"


def test_where_a_dictionary_of_saelens_was_trained(tmp_path):
    for config in (
        {"hook_name": "blocks.21.hook_resid_pre"},
        {"hook_name": None, "metadata": {"hook_name": "blocks.20.hook_resid_post"}},
        {"hook_name": None, "meta": {"hook_name": "blocks.20.hook_resid_post"}},
        {"hook_name": None, "hook_point": "blocks.20.hook_resid_post"},
    ):
        assert read(saelens(tmp_path / "a", **config)).features == F


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hook_name": "blocks.20.hook_resid_pre"}, "after block 19, .* after block 20"),
        (
            {"hook_name": "blocks.20.hook_mlp_out"},
            "blocks.20.hook_mlp_out; expected .* blocks.20.hook_resid_post",
        ),
        ({"hook_name": None}, "names no hook"),
        ({"normalize_activations": "expected_average_only_in"}, "'expected_average_only_in', whose factor"),
        ({"architecture": "crosscoder"}, "'crosscoder'; those that can be read are standard, gated"),
        ({"activation_fn_str": "tanh-relu"}, "'tanh-relu'; expected relu or topk"),
        ({"architecture": "topk"}, "gives k as None"),
        ({"architecture": "topk", "k": 5}, "keeps k=5 of 4 features"),
        ({"architecture": "jumprelu"}, "lacks threshold"),
    ],
)
def test_dictionaries_of_saelens_that_are_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        read(saelens(tmp_path / "a", **config))


def test_a_file_of_gemma_scope(tmp_path):
    folder = tmp_path / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    arrays = LINEAR | {"threshold": np.float32([3, 4, 0, 1])}
    np.savez(folder / "params.npz", **arrays)
    # JumpReLU, and the bias is not subtracted from the input.
    assert strengths(folder) == strengths(folder / "params.npz") == [0, 5, 0, 2]
    assert read(folder).source == "Gemma Scope, layer_20/width_16k/average_l0_71"
    np.testing.assert_allclose(read(folder).decode(np.float32([[0, 5, 0, 2]]), H), [[3, 7]])
    with pytest.raises(ValueError, match="after block 20, .* after block 12"):
        read(folder, layer=12)
    np.savez(folder / "params.npz", **LINEAR)
    with pytest.raises(ValueError, match="lacks threshold"):
        read(folder)
    np.savez(folder / "params.npz", **arrays | {"b_enc": np.float32([0, np.nan, 0, 0])})
    with pytest.raises(ValueError, match="b_enc holds NaN"):
        read(folder)


def test_a_file_of_gemma_scope_of_another_site(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-mlp" / "layer_20"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **LINEAR)
    with pytest.raises(ValueError, match=r"another site than the residual stream \(mlp\)"):
        read(folder)


def test_places_without_a_dictionary(tmp_path):
    with pytest.raises(FileNotFoundError, match="dictionary .*none does not exist"):
        read(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds neither cfg.json \(SAELens\) nor params.npz"):
        read(tmp_path)
    saelens(tmp_path / "a")
    (tmp_path / "a" / "sae_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks sae_weights.safetensors"):
        read(tmp_path / "a")


def test_arrays_that_do_not_fit(tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file(LINEAR, path)
    with pytest.raises(ValueError, match=r"W_enc has shape \(2, 4\) and W_dec \(4, 2\); expected \(16, F\)"):
        read(path, d_model=16)
    save_file({"W_enc": ENCODE}, path)
    with pytest.raises(ValueError, match=r"lacks W_dec \(it holds W_enc\)"):
        read(path)
    save_file(LINEAR | {"b_enc": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match=r"b_enc has shape \(3,\); expected \(4,\)"):
        read(path)
