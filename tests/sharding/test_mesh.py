"""Placement over 8 simulated devices, in one process of its own: the number of devices is fixed at start-up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.sharding.aliasing import jit_aliasing
from nla_jax.sharding.mesh import MeshConfig, make_mesh

PROGRAM = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np
from nla_jax.autoencoder.prompts import VerbalizerPrompt
from nla_jax.autoencoder.verbalizer import InjectionConfig, Verbalizer
from nla_jax.lm.config import LMConfig
from nla_jax.lm.transformer import init_params
from jax.sharding import NamedSharding
from nla_jax.sharding.mesh import BATCH, MeshConfig, make_mesh, parameter_spec, tree_shardings
from nla_jax.sharding.placement import shard_batch
from nla_jax.planning.hlo import read_traffic
from nla_jax.training.round_programs import sampling_weights
from nla_jax.training.state import OptimizerConfig, TrainState
from nla_jax.training.supervised import VerbalizerBatch, av_sft_step, jit_step

report = {"devices": jax.device_count()}

def message(function):
    try:
        function()
    except ValueError as error:
        return str(error)

config = LMConfig("llama", 64, 16, 2, 4, 2, 4, 32, tie_embeddings=False)
rng = np.random.default_rng(0)
batch = VerbalizerBatch(
    jnp.asarray(rng.standard_normal((8, 16)), jnp.float32),
    jnp.asarray(rng.integers(0, 64, (8, 6))),
    jnp.asarray(rng.integers(2, 7, 8)),
)
verbalizer = Verbalizer(config, VerbalizerPrompt((1, 5, 9), 3, (7, 8), (2,), 2, "x"), InjectionConfig(), 3.0)
optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0).build()
params = verbalizer.init(init_params(config, jax.random.key(0)))
step = jit_step(av_sft_step, verbalizer=verbalizer, optimizer=optimizer)

apart_av = dataclasses.replace(verbalizer, pack=False)
apart = jit_step(av_sft_step, verbalizer=apart_av, optimizer=optimizer)

def run(place, step=step):
    state, metrics = place(TrainState.create(params, optimizer), batch)
    state, metrics = step(state, metrics)
    flat = {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    return state, float(metrics["loss"]), float(metrics["grad_norm"]), flat

_, loss, norm, expected = run(lambda state, batch: (state, batch))
report["single"] = [loss, norm]
report["sharded"], report["kept_apart"] = {}, {}
for sizes in [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 2, 4)]:
    mesh = make_mesh(MeshConfig(*sizes))
    state, loss, norm, flat = run(
        lambda state, batch: (jax.device_put(state, tree_shardings(state, mesh)), shard_batch(batch, mesh))
    )
    error = max(float(np.abs(flat[k] - expected[k]).max()) for k in expected)
    kernel = state.params["lm"]["blocks_0"]["mlp"]["up"]["kernel"]
    report["sharded"][str(sizes)] = [loss, norm, error, list(kernel.addressable_shards[0].data.shape)]
    with jax.set_mesh(mesh):
        state, loss, norm, flat = run(
            lambda state, batch: (jax.device_put(state, tree_shardings(state, mesh)), shard_batch(batch, mesh)),
            apart,
        )
    error = max(float(np.abs(flat[k] - expected[k]).max()) for k in expected)
    report["kept_apart"][str(sizes)] = [loss, norm, error]

report["decode"] = {}
for sizes in [(1, 8, 1), (1, 4, 2)]:
    mesh = make_mesh(MeshConfig(*sizes))
    rows = NamedSharding(mesh, BATCH)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(params, mesh))
        activations = shard_batch(np.ones((8, 16), np.float32), mesh)
        for gather in (True, False):
            weights = jax.jit(lambda p: sampling_weights(apart_av, p, mesh, gather=gather))(placed)
            write = jax.jit(
                lambda w, past, final: apart_av.write(w, past, final, jax.random.key(0), group=1, max_tokens=5),
                out_shardings=rows,
            )
            prompt = jax.jit(apart_av.read)(weights, activations)
            text = write.lower(weights, *prompt).compile().as_text()
            found = read_traffic(text).collectives
            sizes_of = [c.size for c in found if c.times > 1]
            tokens = write(weights, *prompt).tokens_BT
            report["decode"][f"{sizes} {gather}"] = [
                max(sizes_of, default=0),
                np.asarray(tokens).tolist(),
                [shape for c in found for shape in c.shapes],
            ]

mesh = make_mesh(MeshConfig(2, 2, 2))
paths = {
    "lm/embed/embedding": (64, 16),
    "lm/lm_head/kernel": (16, 64),
    "blocks_0/attention/query/kernel": (16, 16),
    "blocks_0/attention/value/kernel": (16, 8),
    "blocks_0/attention/out/kernel": (16, 16),
    "blocks_1/mlp/gate/kernel": (16, 32),
    "blocks_1/mlp/down/kernel": (32, 16),
    "blocks_1/mlp_norm/scale": (16,),
    "blocks_1/mlp/gate": (4, 16, 32),
    "blocks_1/mlp/down": (4, 32, 16),
    "blocks_1/mlp/router": (16, 4),
    "av/params/lm/blocks/mlp/down/kernel": (2, 32, 16),
    "opt_state/0/mu/blocks/mlp/gate": (2, 4, 16, 32),
    "blocks/mlp_norm/scale": (2, 16),
    "blocks_1/mlp/up/bias": (32,),
    "head/kernel": (16, 16),
    "affine/kernel": (16, 16),
    "blocks_0/mlp/up/kernel": (16, 33),
}
report["specs"] = {path: str(tuple(parameter_spec(path, shape, mesh))) for path, shape in paths.items()}
adam = tree_shardings(TrainState.create(params, optimizer), mesh).opt_state[1][0]
report["moments"] = str(tuple(adam.mu["lm"]["blocks_0"]["mlp"]["down"]["kernel"].spec))
report["axes"] = [dict(make_mesh(MeshConfig(*sizes)).shape) for sizes in [(1, -1, 1), (-1, 2, 2), (2, 1, -1)]]
report["bad_mesh"] = message(lambda: make_mesh(MeshConfig(3, 1, 1)))
report["bad_fill"] = message(lambda: make_mesh(MeshConfig(3, -1, 1)))
report["two_fills"] = message(lambda: make_mesh(MeshConfig(-1, -1, 1)))
report["bad_batch"] = message(lambda: shard_batch({"x": np.zeros((6, 2))}, mesh))
placed = shard_batch({"x": np.arange(16).reshape(8, 2)}, mesh)["x"]
report["rows"] = sorted({tuple(shard.data[:, 0].tolist()) for shard in placed.addressable_shards})
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report():
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "full rematerialization" not in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["devices"] == 8
    return result


@pytest.mark.parametrize(
    ("sizes", "shard"),
    [
        ("(8, 1, 1)", [16, 32]),
        ("(1, 8, 1)", [2, 32]),
        ("(2, 2, 2)", [8, 16]),
        ("(1, 4, 2)", [4, 16]),
        ("(1, 2, 4)", [8, 8]),
    ],
)
def test_a_sharded_step_equals_the_single_device_step(report, sizes, shard):
    loss, norm, error, shape = report["sharded"][sizes]
    np.testing.assert_allclose([loss, norm], report["single"], rtol=1e-5)
    # Adam's moments after one step are the gradient and its square, scaled.
    assert error < 1e-6
    assert shape == shard


@pytest.mark.parametrize("sizes", ["(8, 1, 1)", "(1, 8, 1)", "(2, 2, 2)", "(1, 4, 2)", "(1, 2, 4)"])
def test_a_step_whose_rows_are_kept_apart_equals_the_single_device_step(report, sizes):
    loss, norm, error = report["kept_apart"][sizes]
    np.testing.assert_allclose([loss, norm], report["single"], rtol=1e-5)
    assert error < 1e-6


def test_no_weight_moves_while_tokens_are_sampled_once_it_was_gathered(report):
    # Bytes: the vectors of eight new tokens, of which a device looks up 2 of 16 features.
    largest, tokens, _ = report["decode"]["(1, 8, 1) True"]
    assert largest == 8 * 2 * 4
    _, same, _ = report["decode"]["(1, 8, 1) False"]
    # Along the tensor axis what moves are the tokens' own vectors and the bins they are drawn from, 2 rows a device.
    largest, along_tensor, shapes = report["decode"]["(1, 4, 2) True"]
    assert largest == 2 * 256 * 4
    assert [16, 64] not in shapes, "the head was gathered"
    assert tokens == same == along_tensor


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("lm/embed/embedding", (None, "fsdp")),
        ("lm/lm_head/kernel", ("fsdp", "tensor")),
        ("blocks_0/attention/query/kernel", ("fsdp", "tensor")),
        ("blocks_0/attention/value/kernel", ("fsdp", "tensor")),
        ("blocks_0/attention/out/kernel", ("tensor", "fsdp")),
        ("blocks_1/mlp/gate/kernel", ("fsdp", "tensor")),
        ("blocks_1/mlp/down/kernel", ("tensor", "fsdp")),
        ("blocks_1/mlp_norm/scale", ()),
        ("blocks_1/mlp/gate", (None, "fsdp", "tensor")),
        ("blocks_1/mlp/down", (None, "tensor", "fsdp")),
        ("blocks_1/mlp/router", ()),
        ("av/params/lm/blocks/mlp/down/kernel", (None, "tensor", "fsdp")),
        ("opt_state/0/mu/blocks/mlp/gate", (None, None, "fsdp", "tensor")),
        ("blocks/mlp_norm/scale", (None,)),
        ("blocks_1/mlp/up/bias", ()),
        ("head/kernel", ()),
        ("affine/kernel", ()),
        # 33 columns do not divide: that axis stays whole.
        ("blocks_0/mlp/up/kernel", ("fsdp", None)),
    ],
)
def test_partition_of_parameters(report, path, spec):
    assert report["specs"][path] == str(spec)


def test_optimizer_moments_follow_their_weights(report):
    assert report["moments"] == str(("tensor", "fsdp"))


def test_minus_one_takes_the_devices_left(report):
    assert [tuple(axes.values()) for axes in report["axes"]] == [(1, 8, 1), (2, 2, 2), (2, 1, 4)]


@pytest.mark.parametrize(
    ("case", "axes"),
    [
        ("bad_mesh", "data=3, fsdp=1, tensor=1"),
        ("bad_fill", "data=3, fsdp=-1, tensor=1"),
        ("two_fills", "data=-1, fsdp=-1, tensor=1"),
    ],
)
def test_axes_that_do_not_fit_the_devices_are_an_error(report, case, axes):
    expected = f"mesh {axes} does not multiply to the 8 devices present; set one axis to -1"
    assert report[case].startswith(expected)


def test_rows_that_do_not_divide_are_an_error(report):
    assert report["bad_batch"] == (
        "a batch of 6 rows does not divide over data * fsdp = 4 devices; use a multiple of 4"
    )


def test_rows_are_split_over_data_and_fsdp(report):
    assert report["rows"] == [[0, 2], [4, 6], [8, 10], [12, 14]]


def test_what_a_compiled_function_does_not_change_is_not_copied():
    given = {"x": jnp.arange(3.0), "y": jnp.ones(2)}

    @jit_aliasing
    def change(tree, scale):
        return {"same": tree["x"], "scaled": tree["y"] * scale, "list": [tree["x"].astype(jnp.float32)]}

    for scale in (2.0, 3.0):
        result = change(given, scale)
        assert result["same"] is given["x"] and result["list"][0] is given["x"]
        np.testing.assert_array_equal(result["scaled"], [scale, scale])
    assert jit_aliasing(lambda x: x)(given) == given


def test_one_device_needs_no_configuration():
    if jax.device_count() != 1:
        pytest.skip("several devices")
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert MeshConfig() == MeshConfig(data=1, fsdp=-1, tensor=1)
