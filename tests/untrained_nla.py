"""A run as training leaves it, on the tiny model, with random activations and untrained models."""

from pathlib import Path

import numpy as np
import optax

from nla_jax.autoencoder.prompts import PromptTemplates
from nla_jax.config import ExperimentConfig, ModelConfig, save_config
from nla_jax.data.dataset import write_shard
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar, SidecarTemplates
from nla_jax.data.splits import SPLITS
from nla_jax.data.stage_texts import stage_columns
from nla_jax.pipeline.run import Run
from nla_jax.training.state import TrainState

LAYER = 1
TEMPLATES = PromptTemplates(verbalizer="Vector: {injection_char}. Explain it.", closing="<|im_end|>")


def write_untrained_run(model_dir: Path, directory: Path) -> Run:
    """Write data of four rows a split, and a checkpoint of joint training at step 3."""
    model = ModelConfig(str(model_dir), layer=LAYER)
    run = Run(
        ExperimentConfig("small", model=model, templates=TEMPLATES, max_explanation_tokens=8), directory
    )
    save_config(run.config, directory / "config.json")
    draw = np.random.default_rng(0)
    templates = SidecarTemplates(TEMPLATES.verbalizer, TEMPLATES.reconstructor)
    for split in SPLITS:
        columns = {
            "activation_vector": draw.standard_normal((4, 32)).astype(np.float32),
            "n_raw_tokens": [51] * 4,
            "activation_layer": [LAYER] * 4,
            "doc_id": [f"{split}-{i}" for i in range(4)],
            "api_explanation": ["a text"] * 4,
        }
        stage, folder = "av_sft" if split == "held_out" else split, run.split_folders()[split]
        path = folder / f"{split}.parquet"  # One file a split, as earlier versions wrote it.
        folder.mkdir(parents=True)
        extraction = Extraction(str(model_dir), 32, LAYER, "none", CorpusSlice(0, 4), 1)
        sidecar = Sidecar("set", stage, 4, extraction, run.models.prompt_ids, templates)
        write_shard(path, stage_columns(stage, columns, templates), sidecar)
    autoencoder, target = run.models.autoencoder, run.models.target.params
    models = {"av": autoencoder.verbalizer, "ar": autoencoder.reconstructor}
    states = {name: TrainState.create(model.init(target), optax.sgd(1.0)) for name, model in models.items()}
    run.checkpoints("rl").save(3, states, {})
    return run
