"""What the warm-start texts of a run will cost and how long they take, told before any is asked for.

The target LM is not run: documents are chosen and tokenized, positions are sampled, and the writer says what it would
ask.
"""

import dataclasses

import numpy as np

from nla_jax.chat.estimates import Estimate, estimate
from nla_jax.chat.prices import guessed_tokens
from nla_jax.data.corpora.document_store import DocumentStore
from nla_jax.data.corpora.documents import Document
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.extraction import Rows, columns_of
from nla_jax.data.positions import Context, Tally, choose_positions
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.data.splits import splits_of
from nla_jax.data.writers.chat import ChatWriter
from nla_jax.data.writers.open import Writer, open_writer
from nla_jax.data.writers.word_counts import WordCounts
from nla_jax.pipeline.documents import prepare_documents
from nla_jax.pipeline.run import Run

SAMPLED_DOCUMENTS = 500
"""Documents whose prompts are made and counted; the others are taken to be like them."""


@dataclasses.dataclass(frozen=True)
class TextsEstimate:
    """The tokens, money and time that the texts of a run will take."""

    writer: str
    documents: int
    sampled: int
    """Documents whose prompts were made; all figures but `documents` are scaled from theirs."""
    rows: int
    """Of all splits; those of `rl` are not asked about."""
    asked: Estimate | None
    """What the prompts take; None for a writer that asks no chat model that is known here."""
    prompts: int
    """Prompts that the writer would send; 0 where it sends none."""
    prompt_tokens: int
    """About how many tokens they have, without the instruction, by their number of characters."""


def estimate_texts(run: Run, documents: int = SAMPLED_DOCUMENTS) -> TextsEstimate:
    """Estimate the texts of a run from some of its documents, which are spread over all of them.

    The documents are chosen and stored in the run directory, where the stage extract finds them.

    Args:
      run: whose texts; its stage extract need not have begun.
      documents: how many are looked at.

    Raises:
      ValueError: the run takes data sets that bring their texts; or as `prepare_documents` and `choose_positions`.
      FileNotFoundError, ModuleNotFoundError: as `prepare_documents`.
    """
    config = run.config
    if config.data.is_given:
        raise ValueError(
            f"the config takes data sets that bring their texts (data.av_sft={config.data.av_sft}); none are written"
        )
    if documents < 1:
        raise ValueError(f"{documents} documents are to be looked at; expected 1 at least")
    writer = open_writer(
        config.writer,
        seed=config.seed,
        words=lambda split: WordCounts(split=split),  # No text is written.
        cache=run.directory / "data" / "answers.sqlite",
    )
    store = prepare_documents(run)
    some = _spread(store, documents)
    tokenizer, tally = run.models.lm.tokenizer, Tally()
    contexts = choose_positions(some, tokenizer, config.extraction, config.seed, tally)
    tally.check(config.extraction)
    rows = _rows_without_vectors(run, contexts)
    # Rows of joint training need no texts.
    split_N = splits_of(rows.doc_ids, config.corpus.fractions, config.seed)
    prompts = writer.prompts(rows.take(split_N != "rl"))
    scale = len(store) / len(some)
    return TextsEstimate(
        writer=config.writer.name,
        documents=len(store),
        sampled=len(some),
        rows=round(scale * len(rows)),
        asked=_asked(run, writer, prompts, scale),
        prompts=round(scale * len(prompts or ())),
        prompt_tokens=round(scale * guessed_tokens(prompts or ())),
    )


def _spread(store: DocumentStore, count: int) -> list[Document]:
    """At most `count` documents at even distances: those at the beginning may have their answers already."""
    chosen = np.unique(np.linspace(0, len(store) - 1, min(count, len(store))).round().astype(int))
    return [document for place in chosen.tolist() for document in store.read(place, place + 1)]


def _rows_without_vectors(run: Run, contexts: list[Context]) -> ActivationDataset:
    """The rows that the stage extract would make of contexts, with zeros for vectors and any words as expected ones."""
    config, layer = run.config.extraction, run.config.model.layer
    count = sum(len(context.readings) for context in contexts)
    tokens = np.resize(np.array(contexts[0].tokens), (count, 4 * config.next_words))
    expected = (tokens, np.zeros(tokens.shape, np.float32)) if config.next_words else (None, None)
    rows = Rows({layer: np.zeros((count, 1), np.float32)}, *expected)
    columns = columns_of(contexts, rows, layer, run.models.lm.tokenizer, config)
    about = Extraction(run.models.lm.name, 1, layer, run.config.corpus.name, CorpusSlice(0, 0), 0)
    kept = ("activation_vector", "n_raw_tokens", "activation_layer", "doc_id", "detokenized_text_truncated")
    return ActivationDataset(
        activations=columns["activation_vector"],
        explanations=None,
        doc_ids=columns["doc_id"],
        n_raw_tokens=np.array(columns["n_raw_tokens"], np.int64),
        contexts=columns["detokenized_text_truncated"],
        extra={name: column for name, column in columns.items() if name not in kept},
        sidecar=Sidecar("estimate", "base", count, about),
    )


def _asked(run: Run, writer: Writer, prompts: list[str] | None, scale: float) -> Estimate | None:
    """What a chat model's prompts take, scaled from those of some documents to all."""
    if prompts is None or not isinstance(writer, ChatWriter):
        return None
    config = writer.config
    found = estimate(
        config.chat,
        prompts,
        instruction=writer.instruction.system_prompt,
        max_tokens=config.answer_tokens,
        temperature=config.temperature,
        cache=run.directory / "data" / "answers.sqlite",
    )
    counts = {
        name: round(scale * getattr(found, name))
        for name in ("prompts", "cached", "input_tokens", "output_tokens_at_most")
    }
    amounts = {name: getattr(found, name) for name in ("dollars", "usual_dollars", "seconds")}
    return dataclasses.replace(
        found,
        **counts,
        **{name: None if value is None else scale * value for name, value in amounts.items()},
    )
