"""The first two stages: activations of documents, and texts that explain them."""

import dataclasses
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from nla_jax.autoencoder.prompts import build_verbalizer_prompt
from nla_jax.data.adoption import sidecars
from nla_jax.data.dataset import ActivationDataset, base_columns, load_dataset, write_shard
from nla_jax.data.extraction import extract as extract_contexts
from nla_jax.data.extraction import tokenize
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar, SidecarTemplates
from nla_jax.data.splits import SPLITS, check_documents, split_of
from nla_jax.data.stage_texts import stage_columns
from nla_jax.data.writers.predictive import PredictiveWriter
from nla_jax.files import AnyPath
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.documents import check_processes, check_shards, load_documents, load_rows, save_record
from nla_jax.pipeline.run import Run
from nla_jax.sharding.placement import wait_for_all


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


def explain(run: Run) -> None:
    """Write explainer texts and divide the rows by document into data/{av_sft,ar_sft,rl,held_out}.

    Data sets made elsewhere come with both, and are copied there.
    """
    digest = stage_digest(run.config, "explain")
    quiet = jax.process_index() > 0
    parts = tqdm(
        _parts(run), desc="explain", total=len(SPLITS), unit="split", dynamic_ncols=True, disable=quiet
    )
    for split, part in parts:
        stage = "av_sft" if split == "held_out" else split
        write_rows(run, run.split_paths()[split], part, stage=stage, digest=digest)
    if jax.process_index() == 0:
        run.measured_yardstick().save(run.directory / "data")
    wait_for_all("yardstick")


def _parts(run: Run) -> Iterator[tuple[str, ActivationDataset]]:
    """The rows of each split with their texts; beside all rows, only those of one split are held."""
    config, seed = run.config, run.config.seed
    if config.data.is_given:
        splits, record = load_rows(run)
        for part in splits.values():
            run.check(part.sidecar)
        check_processes(record)
        save_record(run, record)
        yield from splits.items()
        return
    base = load_dataset(run.directory / "data" / "base")
    explainer = PredictiveWriter(config.explainer, seed=seed, background=base.contexts)
    explained = dataclasses.replace(base, explanations=explainer.explain(base))
    split_N = np.array([split_of(doc_id, config.corpus.fractions, seed) for doc_id in base.doc_ids])
    for split in SPLITS:
        yield split, explained.take(split_N == split)


def data_is_written(run: Run) -> bool:
    """Whether the data of all splits are there.

    Raises:
      ValueError: they are there, but of another config.
    """
    digest = stage_digest(run.config, "explain")
    return all([run.is_written(path, digest) for path in run.split_paths().values()])


def write_rows(run: Run, path: AnyPath, part: ActivationDataset, *, stage: str, digest: str) -> None:
    """Write rows with their texts as a data set of a stage (see `data/sidecar.py`) of this run's prompts.

    Of several processes the first writes, and all return when it has.
    """
    if jax.process_index() == 0:
        _write_rows(run, path, part, stage, digest)
    wait_for_all(str(path))


def _write_rows(run: Run, path: AnyPath, part: ActivationDataset, stage: str, digest: str) -> None:
    templates = SidecarTemplates(run.config.templates.verbalizer, run.config.templates.reconstructor)
    path.parent.mkdir(parents=True, exist_ok=True)
    sidecar = dataclasses.replace(
        part.sidecar,
        dataset_id=digest,
        stage=stage,
        tokens=run.models.prompt_ids,
        prompt_templates=templates,
        parent_datasets=(part.sidecar.dataset_id,),
    )
    write_shard(path, stage_columns(stage, base_columns(part), templates), sidecar)


def _check_splits(run: Run, doc_ids: list[str]) -> None:
    counts = dict.fromkeys(SPLITS, 0)
    for doc_id in doc_ids:
        counts[split_of(doc_id, run.config.corpus.fractions, run.config.seed)] += 1
    check_documents(counts)


def git_commit() -> str:
    """The commit that the library runs from; empty outside a checkout.

    A repository around an installed copy, such as that of a project with a virtual environment in it, is not the
    library's: only one that tracks this very file answers.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return ""
