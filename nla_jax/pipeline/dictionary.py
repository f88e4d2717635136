"""A sparse dictionary of a run's own activations: trained on its training rows, and looked at on held-out ones."""

import dataclasses
import time

import numpy as np
from jaxtyping import Float32

from nla_jax.autoencoder import metrics
from nla_jax.data.splits import SPLITS, some_rows
from nla_jax.evaluation.dictionaries import SparseDictionary, StrengthCode, code_bits
from nla_jax.evaluation.dictionary_baseline import STRENGTH_BITS
from nla_jax.evaluation.dictionary_files import save_dictionary
from nla_jax.evaluation.dictionary_training import DictionaryConfig, train_dictionary
from nla_jax.files import AnyPath
from nla_jax.pipeline.run import Run
from nla_jax.process import warn

FILE_NAME = "dictionary.safetensors"
TRAINING_ROWS = 131_072
"""Most training rows that are held in memory, taken from all splits by their sizes."""


@dataclasses.dataclass(frozen=True)
class DictionaryReport:
    """What a trained dictionary is worth on held-out rows."""

    rows: int
    """Training rows."""
    features: int
    dead: float
    """Share of the features that were not active for long when training ended."""
    held_out_rows: int
    active: float
    """Mean number of active features of a held-out row."""
    bits: float
    """Mean bits of the code, see `dictionaries.code_bits`."""
    fve_nrm: float
    """Of what is rebuilt from the strengths as they are."""
    code_fve_nrm: float
    """Of what is rebuilt from strengths in `STRENGTH_BITS` bits."""
    seconds: float
    """What training took."""


def train_run_dictionary(run: Run, config: DictionaryConfig, path: AnyPath) -> DictionaryReport:
    """Train a dictionary on all training rows of a run, and write it.

    Args:
      run: a run whose rows are there.
      config: the recipe.
      path: safetensors file that is written.

    Raises:
      FileNotFoundError: the run has no data yet.
      ValueError: a path that does not end in .safetensors, or as `train_dictionary`.
    """
    if path.suffix != ".safetensors":
        raise ValueError(
            f"a dictionary is written as safetensors, not as {path.name}; end its name in .safetensors"
        )
    training_ND, held_out_ND = training_rows(run), run.held_out(run.config.evaluation.rows).activations
    if (features := config.width * training_ND.shape[1]) > len(training_ND):
        warn(
            f"a dictionary of {features} features learns {len(training_ND)} rows by heart; lower width={config.width}, "
            "or extract more rows"
        )
    started, layer = time.perf_counter(), run.config.model.layer
    source = f"trained on {len(training_ND):,} training rows of {run.config.name}"
    dictionary, last = train_dictionary(training_ND, config, seed=run.config.seed, source=source)
    seconds = time.perf_counter() - started
    recipe = {**dataclasses.asdict(config), "seed": run.config.seed, "rows": len(training_ND), **last}
    save_dictionary(dictionary, path, layer=layer, recipe=recipe | {"model": run.models.lm.name})
    return _report(dictionary, training_ND, held_out_ND, run, dead=last["dead"], seconds=seconds)


def training_rows(run: Run) -> Float32[np.ndarray, "N D"]:
    """The activations of all rows that are not held out, or a share of each split where there are very many."""
    splits = [run.open(split) for split in SPLITS if split != "held_out"]
    share = min(TRAINING_ROWS / sum(map(len, splits)), 1.0)
    parts = [some_rows(rows, max(round(share * len(rows)), 1), run.config.seed).read() for rows in splits]
    return np.concatenate([part.activations for part in parts])


def _report(
    dictionary: SparseDictionary,
    training_ND: np.ndarray,
    held_out_ND: np.ndarray,
    run: Run,
    *,
    dead: float,
    seconds: float,
) -> DictionaryReport:
    strength_NF = dictionary.strengths(held_out_ND)
    of_training = dictionary.strengths(training_ND[: len(held_out_ND)])
    code = StrengthCode.fit(of_training[of_training > 0], STRENGTH_BITS)
    active_N, mean_D = (strength_NF > 0).sum(axis=1), run.yardstick.normalized_mean_D

    def explained(strength_NF: np.ndarray) -> float:
        return float(metrics.fve_nrm(dictionary.decode(strength_NF, held_out_ND), held_out_ND, mean_D))

    return DictionaryReport(
        rows=len(training_ND),
        features=dictionary.features,
        dead=dead,
        held_out_rows=len(held_out_ND),
        active=float(active_N.mean()),
        bits=float(code_bits(active_N, dictionary.features, STRENGTH_BITS).mean()),
        fve_nrm=explained(strength_NF),
        code_fve_nrm=explained(code(strength_NF)),
        seconds=seconds,
    )
