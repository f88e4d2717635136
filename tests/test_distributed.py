"""The same training on one device, on eight, and on two processes of four devices, over real process boundaries."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_end_to_end import ROOT, STAGES, command, corpus, read_metrics  # noqa: F401

PROGRAM = str(Path(__file__).parent / "recorded_rounds.py")


def environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def finish(arguments: list[str], devices: int, processes: int = 1) -> list[str]:
    """Run a program, in several processes if asked for, and return what each wrote to standard error."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    running = [
        subprocess.Popen(
            [
                *arguments,
                *(("--distributed", f"localhost:{port},{processes},{index}") if processes > 1 else ()),
            ],
            env=environment(devices),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for more, variables in map(place, range(processes))
    ]
    errors = [process.communicate(timeout=600)[1] for process in running]
    for process, error in zip(running, errors, strict=True):
        assert process.returncode == 0, error[-3000:]
    return errors


def recorded(
    model: Path, out: Path, sizes: str, rank: int, devices: int, processes: int = 1
) -> dict[str, np.ndarray]:
    finish([sys.executable, PROGRAM, str(model), str(out), sizes, str(rank)], devices, processes)
    return dict(np.load(out))


@pytest.fixture(scope="module", params=[0, 4], ids=["full", "lora"])
def one_device(request, tiny_model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("recorded") / "one.npz"
    return request.param, recorded(tiny_model_dir, out, "1,1,1", request.param, devices=1)


@pytest.mark.parametrize(
    ("sizes", "devices", "processes"),
    [("1,8,1", 8, 1), ("2,2,2", 8, 1), ("1,8,1", 4, 2), ("2,2,2", 4, 2)],
    ids=["fsdp 8", "data 2, fsdp 2, tensor 2", "two processes, fsdp 8", "two processes, 2 x 2 x 2"],
)
def test_twenty_rounds_from_recorded_rollouts(
    one_device, tiny_model_dir, tmp_path, sizes, devices, processes
):
    rank, expected = one_device
    found = recorded(tiny_model_dir, tmp_path / "found.npz", sizes, rank, devices, processes)
    assert found.keys() == expected.keys() and len(found["losses"]) == 20
    assert all("lora" in name for name in found if "query" in name) == bool(rank)
    for name, value in expected.items():
        error = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def test_a_whole_run_in_two_processes(tiny_model_dir, corpus, tmp_path):  # noqa: F811
    runs = {}
    for processes in (1, 2):
        run_dir = tmp_path / str(processes)
        arguments = command("train_nla.py", tiny_model_dir, corpus, run_dir)
        finish(arguments, devices=8 // processes, processes=processes, under_slurm=True)
        runs[processes] = read_metrics(run_dir)
        assert (run_dir / "report.html").exists() and (run_dir / "evaluation.json").exists()
    assert {stage for stage, _ in runs[2]} == set(STAGES)
    assert runs[1].keys() == runs[2].keys()
    for key, row in runs[1].items():
        if key[0] != "rl":  # sampled tokens may part where two candidates lie within rounding
            for name, value in row.items():
                if name != "stage":
                    assert runs[2][key][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (key, name)
