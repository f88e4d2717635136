"""A trained NLA whose weights and rows are split over devices gives what it gives on one."""

import json
import subprocess
import sys

import numpy as np
from processes import ROOT, environment

import nla_jax

PROGRAM = """
import json, sys
import numpy as np
import nla_jax
from nla_jax.sharding.mesh import MeshConfig, make_mesh

mesh = make_mesh(MeshConfig(data=2, fsdp=2))
nla = nla_jax.load(sys.argv[1], target=sys.argv[2], mesh=mesh, quiet=True)
kernel = nla.av_params["lm"]["blocks"]["mlp"]["up"]["kernel"]
acts = nla.activations(sys.argv[3])
texts = nla.explain(acts)
json.dump(
    {
        "devices": len(kernel.sharding.device_set),
        "part": kernel.addressable_shards[0].data.size / kernel.size,
        "activations": acts.vectors_ND.tolist(),
        "texts": texts.texts,
        "rebuilt": nla.reconstruct(["a text", "another"]).tolist(),
    },
    sys.stdout,
)
"""
TEXT = "The array has a shape and a type."


def test_a_mesh_changes_nothing_but_where_things_are(untrained_export, tiny_model_dir):
    arguments = [sys.executable, "-c", PROGRAM, str(untrained_export), str(tiny_model_dir), TEXT]
    done = subprocess.run(arguments, env=environment(4), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    split = json.loads(done.stdout)
    assert split["devices"] == 4 and split["part"] == 0.5
    nla = nla_jax.load(untrained_export, target=str(tiny_model_dir), quiet=True)
    acts = nla.activations(TEXT)
    np.testing.assert_allclose(split["activations"], acts.vectors_ND, rtol=1e-4, atol=1e-4)
    assert tuple(split["texts"]) == nla.explain(acts).texts
    np.testing.assert_allclose(split["rebuilt"], nla.reconstruct(["a text", "another"]), rtol=1e-3, atol=1e-3)
