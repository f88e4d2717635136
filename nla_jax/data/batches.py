"""Rows to batches: tokenized once, then shuffled and batched by Grain, whose iterators checkpoint their place."""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from nla_jax.autoencoder.prompts import (
    ReconstructorPrompt,
    VerbalizerPrompt,
    encode_reconstructor,
    encode_responses,
)
from nla_jax.data.dataset import ActivationDataset

Rows = Mapping[str, np.ndarray]
"""Columns of equal length, one row an example."""


def verbalizer_rows(
    data: ActivationDataset, tokenizer: PreTrainedTokenizerBase, prompt: VerbalizerPrompt, max_tokens: int
) -> Rows:
    """Columns of a `VerbalizerBatch`."""
    responses_NT, lengths_N = encode_responses(tokenizer, prompt, data.explanations, max_tokens)
    return {"activations_BD": data.activations, "responses_BT": responses_NT, "lengths_B": lengths_N}


def reconstructor_rows(
    activations_ND: np.ndarray,
    explanations: Sequence[str | None],
    tokenizer: PreTrainedTokenizerBase,
    prompt: ReconstructorPrompt,
    max_tokens: int,
) -> Rows:
    """Columns of a `ReconstructorBatch`; a failed explanation (None) has weight 0."""
    prompts_NT, lengths_N = encode_reconstructor(tokenizer, prompt, explanations, max_tokens)
    weights_N = np.array([text is not None for text in explanations], np.float32)
    return {
        "prompts_BT": prompts_NT,
        "lengths_B": lengths_N,
        "activations_BD": activations_ND,
        "weights_B": weights_N,
    }


class _RowSource:
    """Random access to rows, as Grain wants it."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.rows.items()}


def training_batches(rows: Rows, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Endless shuffled batches, a new order each epoch; `get_state` and `set_state` keep and restore the place.

    Raises:
      ValueError: fewer rows than one batch.
    """
    source = _RowSource(rows)
    if len(source) < batch_size:
        raise ValueError(
            f"{len(source)} rows do not fill a batch of {batch_size}; "
            "use more documents or positions, or a smaller batch"
        )
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat().batch(batch_size)
    # The rows are in memory: reader threads would only compete with the model for cores.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def evaluation_batches(rows: Rows, batch_size: int) -> list[tuple[dict[str, np.ndarray], int]]:
    """All rows in order, the last batch filled up by repeating its last row; each with its number of real rows."""
    total = len(next(iter(rows.values())))
    batches = []
    for start in range(0, total, batch_size):
        index = np.minimum(np.arange(start, start + batch_size), total - 1)
        real = min(batch_size, total - start)
        batches.append(({name: column[index] for name, column in rows.items()}, real))
    return batches
