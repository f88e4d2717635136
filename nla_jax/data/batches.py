"""From rows to batches, shuffled and batched by Grain, whose iterators can be resumed.

Rows in memory are drawn in an order that mixes all of them. Rows on disk are mixed within windows of a hundred thousand
and more: the row groups of all files are shuffled, a window holds as many of them as have that many rows together, and
within it rows are drawn in any order. So a disk reads whole row groups, and each of them once an epoch.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.prompts import VerbalizerPrompt, encode_responses
from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.store import WINDOW_ROWS, StoredDataset

Rows = Mapping[str, np.ndarray]
"""Columns of equal length by name; every row is an example."""


@runtime_checkable
class RowSource(Protocol):
    """Rows that are made up when they are drawn."""

    def __len__(self) -> int:
        """The number of rows."""

    def chunk_sizes(self) -> Int[np.ndarray, "G"]:
        """How many consecutive rows each part holds that is best read together."""

    def batch(self, index_B: Int[np.ndarray, "B"]) -> Rows:
        """The columns of some rows, by their numbers."""


def verbalizer_rows(
    data: ActivationDataset, tokenizer: PreTrainedTokenizerBase, prompt: VerbalizerPrompt, max_tokens: int
) -> Rows:
    """Columns of a `VerbalizerBatch`."""
    responses_NT, lengths_N = encode_responses(tokenizer, prompt, data.explanations, max_tokens)
    return {"activations_BD": data.activations, "responses_BT": responses_NT, "lengths_B": lengths_N}


def reconstructor_rows(
    autoencoder: Autoencoder,
    activations_ND: np.ndarray,
    explanations: Sequence[str | None],
    weights_N: Float[np.ndarray, "N"] | None = None,
) -> dict[str, np.ndarray]:
    """Columns of a `ReconstructorBatch`; a failed explanation (None) has weight 0, the others `weights_N` or 1."""
    prompts_NT, lengths_N = autoencoder.encode(explanations)
    is_text_N = np.array([text is not None for text in explanations], np.float32)
    return {
        "prompts_BT": prompts_NT,
        "lengths_B": lengths_N,
        "activations_BD": activations_ND,
        "weights_B": is_text_N if weights_N is None else is_text_N * weights_N.astype(np.float32),
    }


def place_weights(data: StoredDataset, yardstick: Yardstick) -> Float[np.ndarray, "N"]:
    """Weights of rows under which an error counts by the share of its place's spread: mean 1, and positive.

    A row's weight is the spread of all activations over the spread at its place. Otherwise places where activations are
    close to each other, such as the start of an answer, would hardly count in a mean of errors.
    """
    of_place: dict[str | None, float] = {}
    weights = []
    for (places,) in data.scan("place"):
        for place in places:
            if place not in of_place:
                # A place whose activations are all the same has no spread to measure an error by.
                of_place[place] = yardstick.spread / (yardstick.at(place).spread or yardstick.spread)
            weights.append(of_place[place])
    weights_N = np.array(weights, np.float32)
    return weights_N / weights_N.mean()


def check_cut(name: str, cut: tuple[int, int] | None) -> None:
    """Refuse bounds of a cut that leave nothing to draw from; `name` is the config's field.

    Raises:
      ValueError: the fewest tokens are less than one, or more than the most.
    """
    if cut is not None and not 1 <= cut[0] <= cut[1]:
        raise ValueError(
            f"{name}={cut}: expected the fewest and the most tokens that are left of a text, 1 <= fewest <= most, for "
            f"instance --{name.replace('_', '-')} 4 24"
        )


def cut_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | None], tokens_N: Int[np.ndarray, "N"]
) -> list[str | None]:
    """The beginnings of texts, of `tokens_N` tokens each; a text that has no more stays whole, a failed one None."""
    encoded = tokenizer(
        [text or "" for text in texts], add_special_tokens=False, return_offsets_mapping=True
    )["offset_mapping"]
    return [
        text if text is None or len(spans) <= tokens else text[: spans[tokens - 1][1]].rstrip()
        for text, spans, tokens in zip(texts, encoded, tokens_N.tolist(), strict=True)
    ]


def training_batches(
    rows: Rows | RowSource, batch_size: int, seed: int, own: Int[np.ndarray, "B"] | None = None
) -> grain.DatasetIterator:
    """Endless shuffled batches, a new order each epoch; `get_state` and `set_state` keep and restore the place.

    Args:
      rows: rows to draw from, in memory or on disk.
      batch_size: number of rows of a batch.
      seed: seed of the order, which depends on nothing else but the number of rows, and on disk on the sizes of the row
        groups where there are more than `WINDOW_ROWS` rows.
      own: the rows of every batch that this process makes (`placement.process_row_indices`); all by default.

    Raises:
      ValueError: fewer rows than one batch.
    """
    if isinstance(rows, Mapping):
        total = len(next(iter(rows.values())))
        sizes = np.array([total])
    else:
        sizes = rows.chunk_sizes()
        total = int(sizes.sum())
    if total < batch_size:
        raise ValueError(
            f"{total} rows do not fill a batch of {batch_size}; "
            "use more documents or positions, or a smaller batch"
        )
    own = np.arange(batch_size) if own is None else own
    if total <= WINDOW_ROWS or len(sizes) == 1:
        order = grain.MapDataset.range(total).seed(seed).shuffle().repeat().batch(batch_size)
    else:
        order = grain.MapDataset.source(_WindowedOrder(sizes, WINDOW_ROWS, batch_size, seed))

    def batch(index_B: np.ndarray) -> Rows:
        if isinstance(rows, Mapping):
            return {name: column[index_B[own]] for name, column in rows.items()}
        return rows.batch(index_B[own])

    batches = order.map(batch)
    # Reader threads would only compete with the model for cores; what is mapped is read ahead by the system.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


class _WindowedOrder:
    """The rows of each batch without end, in a new order each epoch; computed from the batch's number alone.

    It gives whole batches because Grain takes longer for an element than a row takes to read.
    """

    def __init__(self, sizes_G: Int[np.ndarray, "G"], window: int, batch_size: int, seed: int):
        self.sizes_G, self.window, self.batch_size, self.seed = np.asarray(sizes_G), window, batch_size, seed
        self.first_G = np.cumsum(self.sizes_G) - self.sizes_G
        self.total = int(self.sizes_G.sum())
        self._epoch = functools.lru_cache(maxsize=2)(self._windows_of)
        self._window = functools.lru_cache(maxsize=2)(self._rows_of)

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, index: int) -> np.ndarray:
        parts, start, end = [], index * self.batch_size, (index + 1) * self.batch_size
        while start < end:
            epoch, place = divmod(start, self.total)
            starts_W = self._epoch(epoch)[1]
            window = int(np.searchsorted(starts_W, place, side="right")) - 1
            inside = place - starts_W[window]
            parts.append(self._window(epoch, window)[inside : inside + end - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _windows_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The chunks in the order of an epoch, the first place of each window, and the window of each chunk."""
        order_G = np.random.default_rng((self.seed, epoch)).permutation(len(self.sizes_G))
        sizes_G = self.sizes_G[order_G]
        places_G = np.cumsum(sizes_G) - sizes_G
        # A chunk belongs to the window that its first row falls into.
        windows_G = np.unique(places_G // self.window, return_inverse=True)[1]
        first_W = np.flatnonzero(np.diff(windows_G, prepend=-1))
        return order_G, places_G[first_W], windows_G

    def _rows_of(self, epoch: int, window: int) -> np.ndarray:
        order_G, _, windows_G = self._epoch(epoch)
        chunks = order_G[windows_G == window]
        spans = [
            np.arange(self.first_G[chunk], self.first_G[chunk] + self.sizes_G[chunk]) for chunk in chunks
        ]
        return np.random.default_rng((self.seed, epoch, window)).permutation(np.concatenate(spans))


@dataclasses.dataclass(frozen=True)
class StoredActivations:
    """A `RowSource` of the activations of a data set."""

    data: StoredDataset
    weights_N: Float[np.ndarray, "N"] | None = None
    """How much each row counts, see `place_weights`; None for all alike."""

    def __len__(self) -> int:
        return len(self.data)

    def chunk_sizes(self) -> Int[np.ndarray, "G"]:
        """See `RowSource`."""
        return self.data.chunk_sizes()

    def batch(self, index_B: Int[np.ndarray, "B"]) -> Rows:
        """Activations, the numbers of their rows, and their weights where there are some."""
        rows = {"activations_BD": self.data.activations(index_B), "rows_B": index_B.astype(np.int32)}
        return rows if self.weights_N is None else rows | {"weights_B": self.weights_N[index_B]}


def evaluation_batches(rows: Rows, batch_size: int) -> list[tuple[dict[str, np.ndarray], int]]:
    """All rows in order, as batches with their numbers of real rows; the last batch is filled up with its last row."""
    total = len(next(iter(rows.values())))
    batches = []
    for start in range(0, total, batch_size):
        index = np.minimum(np.arange(start, start + batch_size), total - 1)
        real = min(batch_size, total - start)
        batches.append(({name: column[index] for name, column in rows.items()}, real))
    return batches
