"""Abstract runs over meshes that have no devices at all."""

import dataclasses

import pytest
from jax.sharding import AbstractMesh

from nla_jax.config import ExperimentConfig, ModelConfig
from nla_jax.lm.config import LMConfig
from nla_jax.planning.steps import AbstractRun, bytes_per_device, check_divisions

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
