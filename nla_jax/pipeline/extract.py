"""The first stage: activations of documents."""

from collections import defaultdict

import jax
from tqdm import tqdm

from nla_jax.autoencoder.prompts import build_verbalizer_prompt
from nla_jax.data.adoption import sidecars
from nla_jax.data.dataset import write_shard
from nla_jax.data.extraction import extract as extract_contexts
from nla_jax.data.extraction import tokenize
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.data.splits import SPLITS, check_documents, split_of
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.documents import check_processes, check_shards, load_documents, save_record
from nla_jax.pipeline.run import Run
from nla_jax.shipped import git_commit


def extract(run: Run) -> None:
    """Write activations of all documents to data/base; data sets made elsewhere are only checked."""
    if run.config.data.is_given:
        for path in filter(None, run.config.data.paths.values()):
            for sidecar in sidecars(path):
                run.check(sidecar)
        return
    folder, config = run.directory / "data" / "base", run.config.extraction
    # Templates that do not fit the tokenizer fail here, before anything is computed.
    build_verbalizer_prompt(run.models.lm.tokenizer, run.config.templates)
    documents, record = load_documents(run)
    check_processes(record)
    check_shards(run, folder, record)
    run.models.lm_config.check_layer(run.config.model.layer)
    contexts = tokenize(documents, run.models.lm.tokenizer, config, run.config.seed)
    _check_splits(run, [context.document.id for context in contexts])
    folder.mkdir(parents=True, exist_ok=True)
    save_record(run, record)
    starts = range(0, len(contexts), config.shard_documents)
    digest = stage_digest(run.config, "extract")
    quiet = jax.process_index() > 0
    with tqdm(total=len(contexts), desc="extract", unit="doc", dynamic_ncols=True, disable=quiet) as bar:
        for start in starts:
            chunk = contexts[start : start + config.shard_documents]
            path = folder / f"base-{start // config.shard_documents:05d}.parquet"
            if run.is_written(path, digest):
                bar.update(len(chunk))
                continue
            columns: dict[str, list] = defaultdict(list)
            for part in extract_contexts(
                chunk,
                run.models.target.params,
                run.models.lm.tokenizer,
                run.models.lm_config,
                run.config.model.layer,
                config,
                run.mesh,
            ):
                for name, values in part.items():
                    columns[name] += values
                bar.update(len(set(part["doc_id"])))
            extraction = Extraction(
                base_model=run.models.lm.name,
                d_model=run.models.lm_config.d_model,
                layer_index=run.config.model.layer,
                corpus=run.config.corpus.source,
                corpus_slice=CorpusSlice(start, len(chunk)),
                positions_per_doc=config.positions_per_document,
                corpus_documents=record.documents,
                corpus_digest=record.digest,
            )
            rows = len(columns["doc_id"])
            if jax.process_index() == 0:
                write_shard(path, columns, Sidecar(digest, "base", rows, extraction, git_commit=git_commit()))


def _check_splits(run: Run, doc_ids: list[str]) -> None:
    counts = dict.fromkeys(SPLITS, 0)
    for doc_id in doc_ids:
        counts[split_of(doc_id, run.config.corpus.fractions, run.config.seed)] += 1
    check_documents(counts)
