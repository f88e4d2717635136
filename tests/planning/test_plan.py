"""Plans for real TPU slices, compiled in processes of their own: libtpu and the number of devices are per process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.experimental import topologies

from nla_jax.planning.chips import stand_in_devices, tpu_devices
from nla_jax.sharding.mesh import MeshConfig, make_mesh

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import dataclasses, json, sys
from nla_jax.config import ExperimentConfig, ModelConfig
from nla_jax.lm.config import LMConfig
from nla_jax.planning.chips import tpu_devices
from nla_jax.planning.plan import make_plan
from nla_jax.planning.report import render
from nla_jax.planning.steps import LENGTHS, STEPS
from nla_jax.sharding.mesh import MeshConfig

topology, sizes, steps, blocks, depth, width = json.loads(sys.argv[1])
lm = LMConfig("llama", 640, width, depth, 8, 4, 16, 2 * width, tie_embeddings=False)
model = ModelConfig(layer=1, dtype="bfloat16", attention_dtype="bfloat16", attention="splash", remat=True)
config = ExperimentConfig("x", model=model, max_explanation_tokens=24, mesh=MeshConfig(*sizes))
config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, activations=16))
chip, devices = tpu_devices(topology)
programs = {}

def compiled(name, depth, cost, text):
    programs.setdefault(name, text)

plan = make_plan(config, lm, chip, devices, steps=steps or STEPS, blocks=tuple(blocks), compiled=compiled)
report = {
    name: {
        "kernels": programs[name].count("tpu_custom_call"),
        "shapes": [shape for c in step.cost.collectives for shape in c.shapes],
        **{k: getattr(step.cost, k) for k in ("flops", "redundancy", "memory_traffic")},
        **{k: getattr(step.cost, k) for k in ("arguments", "outputs", "temporaries")},
        "held": sum(step.held.values()),
        "peak": step.peak,
    }
    for name, step in plan.steps.items()
}
print(json.dumps({"steps": report, "fits": plan.fits, "seconds": plan.round_seconds, "text": render(plan)}))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def plan(topology, sizes, steps=(), blocks=(), depth=2, width=128):
    pytest.importorskip("libtpu", reason="compiling for TPUs needs the extra `parity`")
    arguments = json.dumps([topology, sizes, steps, blocks, depth, width])
    command = [sys.executable, "-c", PROGRAM, arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "full rematerialization" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def slice_of_eight():
    return plan("v5e:2x4", (1, 4, 2))


def test_every_step_of_a_run_compiles_and_fits(slice_of_eight):
    assert slice_of_eight["fits"]
    assert slice_of_eight["seconds"] > 0
    assert "It fits on data=1, fsdp=4, tensor=2" in slice_of_eight["text"]
    for name, step in slice_of_eight["steps"].items():
        assert step["peak"] >= step["held"] > 0
        # Copying weights takes no product.
        assert (step["flops"] > 0) == (name != "copy")


def test_extraction_uses_the_kernel_and_shared_prompts_use_it_for_the_prefix(slice_of_eight):
    assert slice_of_eight["steps"]["extract"]["kernels"] > 0
    assert slice_of_eight["steps"]["av_update"]["kernels"] > 0


def test_no_collective_moves_the_logits_or_activations_of_the_whole_batch(slice_of_eight):
    vocabulary, width, tokens = {640, 320}, {128, 64, 32}, {23, 24}
    for name, step in slice_of_eight["steps"].items():
        for shape in step["shapes"]:
            # What has the vocabulary's size, or what is left of it on a device, is a weight or its gradient. Extraction
            # asks for the likeliest tokens, at a few positions of each document.
            moved = vocabulary & set(shape) and not set(shape) <= vocabulary | width
            assert not moved or name == "extract", (name, shape)
            # B = 64 rollouts are 16 on each of four devices, which never see the streams of others. A quarter of
            # them, from the lookup in an embedding that is split over features, is no stream.
            assert not (shape[:1] == [64] and tokens & set(shape[1:2]) and shape[-1] == 128), (name, shape)


def test_sampling_leaves_the_head_split(slice_of_eight):
    assert [128, 640] not in slice_of_eight["steps"]["decode"]["shapes"]


def test_weights_to_sample_with_are_not_there_twice():
    copy = plan("v5p:2x2x2", (1, 4, 2), ("copy",), depth=8, width=4096)["steps"]["copy"]
    assert copy["temporaries"] < 0.2 * copy["outputs"]


def test_work_is_not_repeated_on_devices(slice_of_eight):
    for name in ("decode", "av_sft", "ar_sft", "ar_update", "av_update"):
        assert slice_of_eight["steps"][name]["redundancy"] < 1.25, name


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_other_slices_compile(topology):
    steps = plan(topology, (1, 4, 1), ("extract", "ar_sft"))["steps"]
    assert steps["extract"]["kernels"] > 0
    assert steps["ar_sft"]["arguments"] <= steps["ar_sft"]["held"] * 1.2


def test_costs_follow_from_two_depths():
    whole = plan("v5e:1x1", (1, 1, 1), ("prefill",), depth=4)["steps"]["prefill"]
    line = plan("v5e:1x1", (1, 1, 1), ("prefill",), (1, 2), depth=4)["steps"]["prefill"]
    assert line["flops"] == pytest.approx(whole["flops"])
    assert line["held"] == whole["held"]
    assert line["memory_traffic"] == pytest.approx(whole["memory_traffic"], rel=0.2)


def script(*arguments):
    command = [
        sys.executable,
        str(ROOT / "experiments" / "plan.py"),
        str(ROOT / "configs" / "tiny.py"),
        *arguments,
    ]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def test_a_mesh_may_split_the_sides_of_a_slice(tiny_model_dir):
    pytest.importorskip("libtpu", reason="describing TPU slices needs the extra `parity`")
    mesh = ("--mesh.fsdp", "32", "--mesh.tensor", "2", "--rl.activations", "64")
    sizes = ("--extraction.batch-size", "32", "--av-sft.batch-size", "32", "--ar-sft.batch-size", "32")
    done = script("--model.path", str(tiny_model_dir), "--topology", "v6e:8x8", "--held", *mesh, *sizes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "GiB a device are held" in done.stdout


def test_slices_are_apart_along_data_alone():
    pytest.importorskip("libtpu", reason="describing TPU slices needs the extra `parity`")
    tpu_devices("v5e:2x4")  # sets what libtpu needs to be told
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=2).devices
    mesh = make_mesh(MeshConfig(data=4, tensor=2), devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 2}
    found = [{device.slice_index for device in part.flat} for part in mesh.devices]
    assert found == [{0}, {0}, {1}, {1}]
    with pytest.raises(
        ValueError, match=r"data=1 is no multiple of the 2 TPU slices.*set --mesh.data 2 and let"
    ):
        make_mesh(MeshConfig(), devices)


def test_the_script_plans_for_gpus_without_any(tiny_model_dir):
    done = script(
        *("--model.path", str(tiny_model_dir), "--devices", "8", "--hbm", "0.0000001", "--steps", "prefill"),
        *("--mesh.fsdp", "8", "--model.remat"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "It does not fit on data=1, fsdp=8, tensor=1: at most" in done.stdout
    assert "temporaries of updates are far too high without --model.scan-blocks" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--topology", "v9:2x2"),
            "error: topology 'v9:2x2' is unknown; give a kind (v5e, v5p, v6e) and a shape",
        ),
        (("--devices", "3"), "data * fsdp = 3 devices do not divide extraction.batch_size=8 (the nearest"),
        (("--devices", "8", "--mesh.fsdp", "3"), "fsdp=3, tensor=1 does not multiply to the 8 devices"),
        (("--devices", "8", "--chip", "b9"), "error: chip 'b9' is unknown; known: v5e, v5p, v6e, a100"),
    ],
)
def test_what_cannot_be_planned_is_an_error(tiny_model_dir, arguments, message):
    done = script("--model.path", str(tiny_model_dir), *arguments)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_missing_libtpu_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"libtpu is not installed.*pip install 'jax\[tpu\]=="):
        tpu_devices("v5e:2x4")


def test_a_shape_that_there_is_not():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs the extra `parity`")
    with pytest.raises(ValueError, match="there is no topology 'v5e:3x5'.*v5e:4x4"):
        tpu_devices("v5e:3x5")


def test_devices_that_exist_already_keep_their_number():
    import jax

    jax.devices()
    with pytest.raises(ValueError, match=f"JAX already runs with {jax.device_count()} devices, not 77"):
        stand_in_devices(77, 80e9, "h100")
