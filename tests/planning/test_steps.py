"""Abstract runs: over meshes that have no devices at all, and beside a round of a real run on simulated devices."""

import dataclasses
import json
import subprocess
import sys

import pytest
from jax.sharding import AbstractMesh
from processes import ROOT, environment
from tiny_model import write_tiny_model

from nla_jax.config import ExperimentConfig, ModelConfig
from nla_jax.lm.config import LMConfig
from nla_jax.planning.steps import ROUND, AbstractRun, bytes_per_device, check_divisions

V, D, H, K, DH, F = 512, 64, 8, 4, 16, 96
LM = LMConfig("llama", V, D, 3, H, K, DH, F, tie_embeddings=False)
CONFIG = ExperimentConfig("x", model=ModelConfig(layer=1, dtype="bfloat16", attention_dtype="bfloat16"))
KERNELS = D * H * DH + 2 * D * K * DH + H * DH * D + 3 * D * F
NORMS = 2 * D


def mesh(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def with_rows(size, micro_batches=1):
    return dataclasses.replace(
        CONFIG,
        extraction=dataclasses.replace(CONFIG.extraction, batch_size=size),
        av_sft=dataclasses.replace(CONFIG.av_sft, batch_size=size),
        ar_sft=dataclasses.replace(CONFIG.ar_sft, batch_size=size),
        rl=dataclasses.replace(CONFIG.rl, activations=size, micro_batches=micro_batches),
    )


@pytest.mark.parametrize("devices", [1, 8])
def test_bytes_held_are_those_computed_by_hand(devices):
    run = AbstractRun(CONFIG, LM, mesh(fsdp=devices))
    av, ar = run.states["av"], run.states["ar"]
    # Norms and the AR's head are on every device; everything else is split.
    split, whole = 2 * V * D + 3 * KERNELS, 3 * NORMS + D
    assert bytes_per_device(av.params) == 4 * (split / devices + whole)
    # Two moments, and the counts of AdamW and of its schedule.
    assert bytes_per_device(av.opt_state) == 2 * 4 * (split / devices + whole) + 8
    split, whole = V * D + 2 * KERNELS, 2 * NORMS + D * D
    assert bytes_per_device(ar.params) == 4 * (split / devices + whole)
    # The reference: kernels in bfloat16, the embedding and norms in float32.
    half, single = V * D + 3 * KERNELS, V * D
    expected = (2 * half + 4 * single) / devices + 4 * (3 * NORMS + D)
    assert bytes_per_device(run.reference) == expected


@pytest.mark.parametrize(
    ("rows", "micro_batches", "sizes", "message"),
    [
        (16, 1, {"tensor": 8}, "tensor=8 does not divide num_kv_heads=4 (the nearest that does is 4)"),
        (16, 1, {"tensor": 5}, "tensor=5 does not divide num_heads=8 (the nearest that does is 4)"),
        (9, 1, {"data": 2, "fsdp": 2}, "data * fsdp = 4 devices do not divide rl.activations=9 (the nearest"),
        (9, 1, {"fsdp": 4}, "extraction.batch_size=9 (the nearest that they do is 8)"),
        (16, 4, {"fsdp": 8}, "rl.activations=16 in 4 micro-batches (the nearest that they do is 32)"),
    ],
)
def test_sizes_that_a_mesh_does_not_divide(rows, micro_batches, sizes, message):
    with pytest.raises(ValueError) as error:
        check_divisions(with_rows(rows, micro_batches), LM, mesh(**sizes))
    assert message in str(error.value)


def test_sizes_that_a_mesh_divides():
    check_divisions(with_rows(16, 2), LM, mesh(2, 4, 4))


CASES = {
    "one device": {},
    "fsdp and tensor, bfloat16": {"mesh": [1, 2, 2], "dtype": "bfloat16"},
    "one device, a frozen block": {"frozen": 1},
    "data and fsdp, adapters, stacked, micro-batches": {"mesh": [2, 2, 1], "rank": 4, "micro_batches": 2},
}
PROGRAM = """
import dataclasses, json, math, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from nla_jax.autoencoder.verbalizer import InjectionConfig
from nla_jax.config import ExperimentConfig, ModelConfig
from nla_jax.lm.lora import LoraConfig
from nla_jax.pipeline.models import Models
from nla_jax.planning.steps import AbstractRun
from nla_jax.sharding.aliasing import jit_aliasing
from nla_jax.sharding.mesh import MeshConfig, make_mesh
from nla_jax.sharding.placement import place
from nla_jax.training.joint import Round
from nla_jax.training.round_programs import RLConfig, optimizers

PHASES = {
    "copy_weights": "copy",
    "read": "prefill",
    "write": "decode",
    "reference": "reference",
    "update_reconstructor": "ar_update",
    "update_verbalizer": "av_update",
}


def described(tree, mesh):
    # Shapes, dtypes and shardings in place of arrays. An axis of one device splits nothing, so specs leave it out.
    def leaf(x):
        if not isinstance(x, (jax.Array, jax.ShapeDtypeStruct)):
            return x
        spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else P()
        names = [axes if isinstance(axes, tuple) else (axes,) for axes in spec]
        kept = [tuple(name for name in axes if name and mesh.shape[name] > 1) for axes in names]
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, P(*kept)), weak_type=getattr(x, "weak_type", False)
        )

    return jax.tree.map(leaf, tree)


def programs_of_a_round(models, plan):
    # Text of each program that a round calls, lowered for the arguments that it is called with.
    mesh, config = models.mesh, models.config.rl
    states = {
        model: place(models.initial_state(model, optimizer), mesh) for model, optimizer in optimizers(config).items()
    }
    reference = models.with_base("av", jax.tree.map(jax.numpy.copy, states["av"].params))
    if not models.config.lora.rank:
        reference = jit_aliasing(models.autoencoder.verbalizer.frozen)(reference)
    # The plan's prompts are made up, and so is its scale.
    autoencoder = dataclasses.replace(
        models.autoencoder, verbalizer=plan.verbalizer, reconstructor=plan.reconstructor
    )
    one_round = Round(config, autoencoder, reference, mesh, jax.random.key(0), models.bases)
    texts = {}

    def recorded(phase, function):
        program = getattr(function, "program", function)

        def call(*args, **kwargs):
            lowered = program.lower(*described(args, mesh), **described(kwargs, mesh))
            texts[phase] = lowered.as_text()
            return function(*args, **kwargs)

        return call

    for name, phase in PHASES.items():
        setattr(one_round.programs, name, recorded(phase, getattr(one_round.programs, name)))
    shape = config.activations, models.lm_config.d_model
    states, metrics = one_round(states, {"activations_BD": np.ones(shape, np.float32)}, 0)
    jax.block_until_ready(states)
    return texts


def programs_of_a_plan(plan):
    steps = {phase: plan.step(phase) for phase in PHASES.values()}
    return {
        phase: step.function.lower(*described(step.arguments, plan.mesh)).as_text() for phase, step in steps.items()
    }


def compared(case):
    sizes, rank, frozen = case.get("mesh", [1, 1, 1]), case.get("rank", 0), case.get("frozen", 0)
    model = ModelConfig(
        path=sys.argv[1],
        layer=frozen,
        dtype=case.get("dtype", "float32"),
        scan_blocks=rank > 0,
        frozen_blocks=frozen,
    )
    config = ExperimentConfig(
        "x",
        model=model,
        injection=InjectionConfig(scale=2.0),
        max_explanation_tokens=12,
        lora=LoraConfig(rank=rank),
        mesh=MeshConfig(*sizes),
        rl=RLConfig(activations=8, group=2, length_buckets=1, micro_batches=case.get("micro_batches", 1)),
    )
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(sizes)])
    # Nothing is restored, and the injection's scale depends on no data.
    models = Models(config, mesh, yardstick=None, checkpoints=None)
    plan = AbstractRun(config, models.lm.config, mesh)
    ours = models.autoencoder
    av = dataclasses.replace(ours.verbalizer, prompt=plan.verbalizer.prompt, scale=plan.verbalizer.scale)
    ar = dataclasses.replace(ours.reconstructor, prompt=plan.reconstructor.prompt)
    with jax.set_mesh(mesh):
        called, planned = programs_of_a_round(models, plan), programs_of_a_plan(plan)
    differences = {}
    for phase, text in called.items():
        lines = zip(planned[phase].split(", "), text.split(", "), strict=False)
        differences[phase] = [list(pair) for pair in lines if pair[0] != pair[1]][:4]
        if text != planned[phase] and not differences[phase]:
            differences[phase] = ["one is longer"]
    return {"same models": (av, ar) == (plan.verbalizer, plan.reconstructor), "differences": differences}


print(json.dumps({name: compared(case) for name, case in json.loads(sys.argv[2]).items()}))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    model = write_tiny_model(tmp_path_factory.mktemp("two_blocks"), num_layers=2)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), json.dumps(CASES)],
        env=environment(4),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_plan_describes_the_models_of_the_run(report, case):
    assert report[case]["same models"]


@pytest.mark.parametrize("phase", ROUND)
@pytest.mark.parametrize("case", CASES)
def test_a_plan_lowers_the_programs_that_a_round_calls(report, case, phase):
    # Pairs of the plan's and the round's, where their texts differ.
    assert report[case]["differences"][phase] == []
