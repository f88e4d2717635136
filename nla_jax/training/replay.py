"""The replay: texts of recent rounds and of the writer, from which the AR learns beside each round's own texts."""

import collections
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.data.batches import StoredActivations, reconstructor_rows


class Replay:
    """Batches for further AR updates. Every process of a run holds all of it, and gets the same batches.

    It is kept in checkpoints (`saved`, `restore`), as texts and numbers of rows, so that a run that goes on draws what
    it would have drawn.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        rows: StoredActivations,
        *,
        rounds: int,
        batch_size: int,
        writer: grain.DatasetIterator | None = None,
        writer_rows: int = 0,
    ):
        """Begin with nothing to draw.

        Args:
          autoencoder: what turns texts into the AR's prompts.
          rows: the activations that rounds draw from.
          rounds: how many of the newest rounds are held.
          batch_size: rows of a batch; a round has at least as many texts.
          writer: endless batches of `writer_rows` rows with the writer's texts.
          writer_rows: rows of each batch that are the writer's.
        """
        self._autoencoder, self._rows, self._batch_size = autoencoder, rows, batch_size
        self._writer, self._writer_rows = writer, writer_rows
        self._rounds: collections.deque[tuple[list[int], list[str | None]]] = collections.deque(maxlen=rounds)

    def add(self, rows_N: Int[np.ndarray, "N"], texts: list[str | None]) -> None:
        """Hold a round: the numbers of its activations' rows, and the texts as the AR read them, grouped by them."""
        self._rounds.append((rows_N.tolist(), texts))

    def batch(self, *key: int) -> dict[str, np.ndarray]:
        """Columns of a `ReconstructorBatch`: rows of the rounds held, drawn as `key` says, then the writer's."""
        texts = [text for _, texts in self._rounds for text in texts]
        rows_B = np.concatenate([np.repeat(rows, len(texts) // len(rows)) for rows, texts in self._rounds])
        wanted = self._batch_size - self._writer_rows
        chosen = np.random.default_rng(key).choice(len(texts), wanted, replace=False)
        source = self._rows.batch(rows_B[chosen])
        columns = reconstructor_rows(
            self._autoencoder, source["activations_BD"], [texts[i] for i in chosen], source.get("weights_B")
        )
        if self._writer is None:
            return columns
        written = next(self._writer)
        return {name: np.concatenate([column, written[name]]) for name, column in columns.items()}

    def saved(self) -> dict[str, Any]:
        """Everything that decides later batches, as JSON can hold it."""
        writer = None if self._writer is None else self._writer.get_state()
        return {"rounds": list(self._rounds), "writer": writer}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `saved` gave."""
        self._rounds.clear()
        self._rounds.extend((rows, texts) for rows, texts in saved["rounds"])
        if self._writer is not None:
            self._writer.set_state(saved["writer"])
