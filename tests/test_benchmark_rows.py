"""What goes over all rows of a data set holds one copy of the activations, and of most of them no further one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "experiments" / "benchmark_rows.py"
MOST_MEMORY = {
    # The rows that are returned are one copy; their texts take half as much here.
    "load_dataset": 2.2,
    "splits": 1.3,
    # A few thousand rows at a time, of three splits one after another.
    "adopt": 1.0,
    # Compressed pages of one row group at a time; another copy of the activations would be 1.
    "write_shard": 0.9,
    "yardstick": 0.5,
    "nearest activation": 0.7,
    # A covariance of 2048 x 2048 in float64 is a fifth of these activations, and its eigenvectors take several.
    "PCA code": 2.0,
}
"""Piece -> bound of the memory that it adds at its peak, as a multiple of the activations."""


@pytest.fixture(scope="module")
def lines():
    """Of 20,000 rows of width 2048, 164 MB."""
    command = [
        sys.executable,
        str(SCRIPT),
        "--one",
        "--rows",
        "20000",
        "--width",
        "2048",
        "--pieces",
        *MOST_MEMORY,
    ]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return {name: memory for name, _, memory in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("piece", MOST_MEMORY)
def test_no_piece_copies_all_activations_beside_what_it_returns(lines, piece):
    assert lines[piece] < MOST_MEMORY[piece]
