"""What a run's own writer says of other texts than the run's, for evaluations of planted ones."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from nla_jax.data.corpora.documents import Document
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.extraction import columns_of, read_rows
from nla_jax.data.positions import Context, Reading
from nla_jax.data.sidecar import Sidecar
from nla_jax.evaluation.target_lm import TargetLM
from nla_jax.lm.places import places
from nla_jax.lm.tokenized import tokenize_chat, tokenize_text
from nla_jax.pipeline.explain import writer_of
from nla_jax.pipeline.run import Run

ASK_NOBODY = ("predictive", "descriptive")
"""Writers that cost nothing and need nothing but what the target gives."""
PADDED_TOKENS = 64
"""Texts are padded to a multiple of this, so that few programs are compiled."""


def writer_of_documents(
    run: Run, load_target: Callable[[], TargetLM], sidecar: Sidecar
) -> Callable[[Sequence[Document]], list[str | None]] | None:
    """A function that has the run's writer write about the last token of each document.

    Args:
      run: with its activations extracted.
      load_target: loads the target LM, which reads the documents.
      sidecar: of the run's rows.

    Returns:
      None where the run took its rows from elsewhere, or where its writer asks a model or reads a column.
    """
    if run.config.data.is_given or run.config.writer.name not in ASK_NOBODY:
        return None
    open_writer = functools.cache(lambda: writer_of(run))

    def write(documents: Sequence[Document]) -> list[str | None]:
        return open_writer().explain(_rows(run, load_target(), documents, sidecar))

    return write


def _rows(run: Run, target: TargetLM, documents: Sequence[Document], sidecar: Sidecar) -> ActivationDataset:
    """Rows as extraction makes them, one for the last token of each document."""
    contexts = [_read_at_end(document, target.tokenizer) for document in documents]
    buckets = -(-max(context.length for context in contexts) // PADDED_TOKENS)
    config = dataclasses.replace(
        run.config.extraction,
        max_tokens=buckets * PADDED_TOKENS,
        length_buckets=buckets,
        min_position=0,
        positions_per_document=1,
        spans=0,
    )
    layer = run.config.model.layer
    rows = read_rows(contexts, target.lm.params, target.config, (layer,), config, run.mesh)
    columns = columns_of(contexts, rows, layer, target.tokenizer, config)
    del columns["activation_layer"]
    return ActivationDataset(
        activations=columns.pop("activation_vector"),
        explanations=None,
        doc_ids=columns.pop("doc_id"),
        n_raw_tokens=np.array(columns.pop("n_raw_tokens"), np.int64),
        contexts=columns.pop("detokenized_text_truncated"),
        extra=columns,
        sidecar=dataclasses.replace(sidecar, row_count=len(contexts)),
    )


def _read_at_end(document: Document, tokenizer: PreTrainedTokenizerBase) -> Context:
    """A document with its last token as its only reading."""
    if document.messages is None:
        source = tokenize_text(tokenizer, document.text)
    else:
        source = tokenize_chat(tokenizer, document.messages)
    last = len(source) - 1
    reading = Reading(
        last, last + 1, places(source)[last] or "inside", source.roles[last], source.turns[last]
    )
    return Context(document, source.ids, (), (reading,))
