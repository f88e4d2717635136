"""The same updates on one device, on eight, and in two processes of four devices, over real process boundaries."""

import sys
from pathlib import Path

import numpy as np
import pytest
from processes import finish_all
from tiny_model import write_tiny_model

PROGRAM = str(Path(__file__).parent / "recorded_rounds.py")


def recorded(
    model: Path, out: Path, sizes: str, rank: int, devices: int, processes: int = 1
) -> dict[str, np.ndarray]:
    finish_all([sys.executable, PROGRAM, str(model), str(out), sizes, str(rank)], devices, processes)
    return dict(np.load(out))


@pytest.mark.parametrize(
    ("rank", "layouts"),
    [
        (0, [("1,8,1", 8, 1), ("2,2,2", 4, 2)]),
        (4, [("1,8,1", 4, 2)]),
    ],
    ids=["all parameters", "adapters"],
)
def test_twenty_rounds_from_recorded_rollouts(rank, layouts, tmp_path):
    model = write_tiny_model(tmp_path / "model", num_layers=2)
    expected = recorded(model, tmp_path / "one.npz", "1,1,1", rank, devices=1)
    for sizes, devices, processes in layouts:
        found = recorded(model, tmp_path / "found.npz", sizes, rank, devices, processes)
        assert found.keys() == expected.keys() and len(found["losses"]) == 20
        assert all("lora" in name for name in found if "query" in name) == bool(rank)
        for name, value in expected.items():
            error = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
            # B begins at zero, and is still small beside its own rounding.
            assert error < (1e-4 if "lora_b" in name else 1e-5), (
                f"{name} on {sizes}: relative error {error:.1e}"
            )
