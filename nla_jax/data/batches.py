"""From rows to batches: rows are tokenized once, then shuffled and batched by Grain, whose iterators can be resumed."""

from collections.abc import Mapping, Sequence

import grain
import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.prompts import VerbalizerPrompt, encode_responses
from nla_jax.data.dataset import ActivationDataset

Rows = Mapping[str, np.ndarray]
"""Columns of equal length by name; every row is an example."""


def verbalizer_rows(
    data: ActivationDataset, tokenizer: PreTrainedTokenizerBase, prompt: VerbalizerPrompt, max_tokens: int
) -> Rows:
    """Columns of a `VerbalizerBatch`."""
    responses_NT, lengths_N = encode_responses(tokenizer, prompt, data.explanations, max_tokens)
    return {"activations_BD": data.activations, "responses_BT": responses_NT, "lengths_B": lengths_N}


def reconstructor_rows(
    autoencoder: Autoencoder, activations_ND: np.ndarray, explanations: Sequence[str | None]
) -> dict[str, np.ndarray]:
    """Columns of a `ReconstructorBatch`; a failed explanation (None) has weight 0."""
    prompts_NT, lengths_N = autoencoder.encode(explanations)
    weights_N = np.array([text is not None for text in explanations], np.float32)
    return {
        "prompts_BT": prompts_NT,
        "lengths_B": lengths_N,
        "activations_BD": activations_ND,
        "weights_B": weights_N,
    }


def training_batches(
    rows: Rows, batch_size: int, seed: int, own: Int[np.ndarray, "B"] | None = None
) -> grain.DatasetIterator:
    """Endless shuffled batches, a new order each epoch; `get_state` and `set_state` keep and restore the place.

    Args:
      rows: rows to draw from.
      batch_size: number of rows of a batch.
      seed: seed of the order, which depends on nothing else.
      own: the rows of every batch that this process makes (`placement.process_row_indices`); all by default.

    Raises:
      ValueError: fewer rows than one batch.
    """
    total = len(next(iter(rows.values())))
    if total < batch_size:
        raise ValueError(
            f"{total} rows do not fill a batch of {batch_size}; "
            "use more documents or positions, or a smaller batch"
        )
    own = np.arange(batch_size) if own is None else own
    order = grain.MapDataset.range(total).seed(seed).shuffle().repeat().batch(batch_size)
    batches = order.map(lambda index_B: {name: column[index_B[own]] for name, column in rows.items()})
    # The rows are in memory: reader threads would only compete with the model for cores.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def evaluation_batches(rows: Rows, batch_size: int) -> list[tuple[dict[str, np.ndarray], int]]:
    """All rows in order, as batches with their numbers of real rows; the last batch is filled up with its last row."""
    total = len(next(iter(rows.values())))
    batches = []
    for start in range(0, total, batch_size):
        index = np.minimum(np.arange(start, start + batch_size), total - 1)
        real = min(batch_size, total - start)
        batches.append(({name: column[index] for name, column in rows.items()}, real))
    return batches
