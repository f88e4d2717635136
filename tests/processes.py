"""The scripts as a user runs them, in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def command(script: str, model: Path, corpus: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "experiments" / script), str(ROOT / "configs" / "tiny.py")),
        *("--model.path", str(model), "--corpus.source", str(corpus), "--run-dir", str(run_dir), *more),
    ]


def environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def finish(arguments: list[str], devices: int = 1) -> subprocess.CompletedProcess:
    done = subprocess.run(arguments, env=environment(devices), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def slurm(index: int, processes: int, job: int) -> dict[str, str]:
    """What SLURM tells a task."""
    return {
        **{"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(processes)},
        **{"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)},
    }


def finish_all(arguments: list[str], devices: int, processes: int = 1, under_slurm: bool = False) -> None:
    """Run a program to its end, in several processes if asked for."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def place(index: int) -> tuple[list[str], dict[str, str]]:
        if processes == 1:
            return [], {}
        if under_slurm:
            return ["--distributed"], slurm(index, processes, port)
        return ["--distributed", f"localhost:{port},{processes},{index}"], {}

    running = [
        subprocess.Popen(
            [*arguments, *more],
            env=environment(devices) | variables,
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
