"""Natural Language Autoencoders: explain a language model's activations in plain text, and check the text.

The names below are imported when they are first used, so that importing the package alone is fast and touches no
device.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

# transformers says at its import that without PyTorch it has no models; only its tokenizers and configs are used here.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())

_PLACES = {
    "load": "pipeline.load",
    "NLA": "autoencoder.nla",
    "Explanations": "autoencoder.results",
    "Scores": "autoencoder.results",
    "Yardstick": "autoencoder.yardstick",
    "Autoencoder": "autoencoder.autoencoder",
    "InjectionConfig": "autoencoder.verbalizer",
    "PromptTemplates": "autoencoder.prompts",
    "Reconstructor": "autoencoder.reconstructor",
    "Verbalizer": "autoencoder.verbalizer",
    "build_reconstructor_prompt": "autoencoder.prompts",
    "build_verbalizer_prompt": "autoencoder.prompts",
    "encode_responses": "autoencoder.prompts",
    "Activations": "lm.activations",
    "Injection": "lm.transformer",
    "LanguageModel": "lm.language_model",
    "Transformer": "lm.transformer",
    "load_language_model": "lm.files.weights",
    "Rollouts": "training.grpo",
    "PolicyLossConfig": "training.grpo",
    "grpo_step": "training.grpo",
    "OptimizerConfig": "training.state",
    "TrainState": "training.state",
    "ReconstructorBatch": "training.supervised",
    "VerbalizerBatch": "training.supervised",
    "ar_mse_step": "training.supervised",
    "av_sft_step": "training.supervised",
    "jit_step": "training.supervised",
    "open_dataset": "data.store",
    "training_batches": "data.batches",
    "reconstructor_rows": "data.batches",
    "verbalizer_rows": "data.batches",
    "load_config": "config",
    "Run": "pipeline.run",
}
"""The public names, and the modules of the package that they live in."""
_MODULES = {"metrics": "autoencoder.metrics"}
"""Public modules of functions."""
__all__ = ["__version__", "load_lm", *_MODULES, *_PLACES]

if TYPE_CHECKING:
    from nla_jax.autoencoder.nla import NLA as NLA
    from nla_jax.lm.files.weights import load_language_model as load_lm
    from nla_jax.lm.transformer import Injection as Injection
    from nla_jax.pipeline.load import load as load


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name == "__version__":
        return importlib.import_module("nla_jax.shipped").version()
    if name == "load_lm":
        return importlib.import_module("nla_jax.lm.files.weights").load_language_model
    if name in _MODULES:
        return importlib.import_module(f"nla_jax.{_MODULES[name]}")
    if name in _PLACES:
        return getattr(importlib.import_module(f"nla_jax.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'nla_jax' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
