"""Loading onto 8 simulated devices, in one process of its own: the number of devices is fixed at start-up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys, tempfile
import jax, numpy as np
from family_models import CONFIGS
from flax.traverse_util import flatten_dict
from nla_jax.lm.files.configs import config_from_hf
from nla_jax.lm.files.safetensors_files import SafetensorsFiles, open_safetensors
from nla_jax.lm.transformer import init_params, parameter_shapes
from nla_jax.lm.files.weights import export_hf, load_params
from nla_jax.sharding.mesh import MeshConfig, make_mesh, tree_shardings

report, read, plain = {}, [], SafetensorsFiles.read

def counted(self, name, index=()):
    value = plain(self, name, index)
    read.append(value.size)
    return value

SafetensorsFiles.read = counted
for family in sys.argv[1:]:
    model_type, settings = CONFIGS[family]
    config = config_from_hf({"model_type": model_type, **settings})
    keys = iter(jax.random.split(jax.random.key(0), 999))
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), shapes)
    for sizes in [(1, 8, 1), (2, 2, 2), (1, 1, 8)]:
        mesh = make_mesh(MeshConfig(*sizes))
        with tempfile.TemporaryDirectory() as folder:
            export_hf(params, config, folder)
            read.clear()
            loaded = load_params(open_safetensors(folder), config, mesh=mesh)
        wanted = flatten_dict(tree_shardings(params, mesh))
        flat, expected = flatten_dict(loaded), flatten_dict(params)
        report[f"{family} {sizes}"] = {
            "wrong": ["/".join(path) for path in expected if not np.array_equal(flat[path], expected[path])],
            "misplaced": ["/".join(path) for path in expected if flat[path].sharding != wanted[path]],
            "read": sum(read) / sum(leaf.size for leaf in expected.values()),
        }
print(json.dumps(report))
"""
FAMILIES = ["llama", "phi3", "gpt_neox", "gpt2", "mixtral"]


@pytest.fixture(scope="module")
def report():
    root = Path(__file__).parents[3]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", PROGRAM, *FAMILIES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("sizes", ["(1, 8, 1)", "(2, 2, 2)", "(1, 1, 8)"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_device_gets_its_part_and_every_number_is_read_once(report, family, sizes):
    found = report[f"{family} {sizes}"]
    assert found["wrong"] == []
    assert found["misplaced"] == []
    assert found["read"] == 1
