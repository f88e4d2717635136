"""The second stage: texts that explain the activations, and the splits."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from tqdm import tqdm

from nla_jax.data.dataset import ActivationDataset, base_columns, load_dataset, write_shard
from nla_jax.data.sidecar import SidecarTemplates
from nla_jax.data.splits import SPLITS, split_of
from nla_jax.data.stage_texts import stage_columns
from nla_jax.data.writers.predictive import PredictiveWriter, WordCounts
from nla_jax.files import AnyPath
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.documents import check_processes, load_rows, save_record
from nla_jax.pipeline.run import Run
from nla_jax.sharding.placement import wait_for_all


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
    writer = PredictiveWriter(config.writer.predictive, seed=seed, words=WordCounts(base.contexts))
    explained = dataclasses.replace(base, explanations=writer.explain(base))
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
