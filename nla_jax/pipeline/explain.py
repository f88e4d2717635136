"""The second stage: texts that explain the activations, and the splits.

Each shard of data/base becomes a shard of each split, by itself, and what is known of its texts is noted when all four
are there. So no process holds more than one shard, and a run that was killed goes on with the next.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from nla_jax.data.dataset import ActivationDataset, base_columns, load_dataset, write_shard
from nla_jax.data.manifest import Manifest
from nla_jax.data.shards import shards_of, sidecar_of
from nla_jax.data.sidecar import SidecarTemplates
from nla_jax.data.splits import SPLITS, check_documents, splits_of
from nla_jax.data.stage_texts import stage_columns
from nla_jax.data.store import PART_ROWS, open_dataset
from nla_jax.data.writers.open import Writer, open_writer
from nla_jax.data.writers.reports import joined, since
from nla_jax.data.writers.word_counts import Split, WordCounts
from nla_jax.files import AnyPath, remove_folder, write_json
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.documents import RECORD, check_processes, load_rows, read_record, save_record
from nla_jax.pipeline.run import Run
from nla_jax.sharding.placement import wait_for_all

TEXTS = "data/texts.json"
"""The file that tells how many rows have a text, and why others have none."""


def explain(run: Run) -> None:
    """Write texts and divide the rows by document into data/{av_sft,ar_sft,rl,held_out}.

    Data sets made elsewhere come with both, and are copied there. Rows without a text are in no split that needs one.

    Raises:
      ValueError: a split has too few documents with texts, or the rows were begun to be written with another config.
    """
    (run.directory / "data").mkdir(parents=True, exist_ok=True)
    if run.config.data.is_given:
        _adopt(run)
    else:
        _explain_base(run)
    if jax.process_index() == 0:
        digest = stage_digest(run.config, "explain")
        manifests = {folder: Manifest.of(folder) for folder in run.split_folders().values()}
        for folder, manifest in manifests.items():
            if manifest.dataset_id != digest:
                raise ValueError(
                    f"{folder} holds shards of another config (digest {manifest.dataset_id}, this run has {digest}); "
                    "delete it to write them again"
                )
        # Nothing counts as written before all is there.
        run.reopen()
        run.measured_yardstick().save(run.directory / "data")
        for folder, manifest in manifests.items():
            manifest.save(folder)
        remove_folder(run.directory / "data" / "texts")
    wait_for_all("yardstick")


def _adopt(run: Run) -> None:
    """Copy the data sets that the config names, a few thousand rows at a time."""
    splits, record = load_rows(run)
    for data in splits.values():
        run.check(data.sidecar)
    check_processes(record)
    before = read_record(run.directory)
    if before is not None and before.digest != record.digest:
        raise ValueError(
            f"{run.directory / RECORD} is of other rows than {record.corpus} holds now: their digest was "
            f"{before.digest}, and is {record.digest}; bring the old data sets back, or delete "
            f"{run.directory / 'data'} to copy the new ones"
        )
    save_record(run, record)
    total = sum(-(-len(data) // PART_ROWS) for data in splits.values())
    with _progress("copy", total) as bar:
        for split, data in splits.items():
            for number, part in enumerate(data.parts()):
                path = run.split_folders()[split] / f"{split}-{number:05d}.parquet"
                if not run.is_written(path, stage_digest(run.config, "explain")):
                    write_rows(run, path, part, stage=_stage_of(split), digest_of="explain")
                bar.update()


def _explain_base(run: Run) -> None:
    """Explain the shards of data/base that are not yet explained, one by one.

    Of several processes the first asks a chat model and writes the files; all of them get its texts.

    Raises:
      ValueError: as `explain`.
    """
    paths = shards_of(run.directory / "data" / "base")
    writer: Writer | None = None
    _send_batches(run, paths)
    records = []
    with _progress("explain", len(paths)) as bar:
        for path in paths:
            record = _record_of(run, path)
            if record is None:
                writer = writer or writer_of(run)
                record = _explain_shard(run, path, writer)
            records.append(record)
            wait_for_all(path.name)
            bar.update()
    report = joined([record["texts"] for record in records])
    rows = {split: sum(record["rows"][split] for record in records) for split in SPLITS}
    run.write_json(TEXTS, {**report, "rows_of_splits": rows})
    check_documents({split: sum(record["documents"][split] for record in records) for split in SPLITS})


def _send_batches(run: Run, paths: Sequence[AnyPath]) -> None:
    """Send the prompts of all shards where they go in message batches, which would take a day a shard one by one."""
    writer = run.config.writer
    if writer.name != "chat" or not writer.chat.chat.batch:
        return
    missing = [path for path in paths if _record_of(run, path) is None]
    if not missing:
        return
    sender = writer_of(run)
    for path in missing:
        rows = load_dataset(path)
        split_N = splits_of(rows.doc_ids, run.config.corpus.fractions, run.config.seed)
        sender.send_batches(rows.take(split_N != "rl"))


def writer_of(run: Run) -> Writer:
    """Open the writer that a run's config names, with the word counts of the run's contexts.

    Raises:
      ValueError: see `open_writer`; or it is not what wrote the texts of the run so far.
    """
    config, base = run.config, run.directory / "data" / "base"

    def words(split: Split) -> WordCounts:
        counts = WordCounts(split=split)
        for (contexts,) in open_dataset(base).scan("detokenized_text_truncated"):
            counts.add(context or "" for context in contexts)
        return counts

    writer = open_writer(
        config.writer, seed=config.seed, words=words, cache=run.directory / "data" / "answers.sqlite"
    )
    _check_writer(run, writer)
    return writer


def _check_writer(run: Run, writer: Writer) -> None:
    """Refuse to go on where what the config names is not what wrote the texts so far, before anything is asked.

    Raises:
      ValueError: it differs, as where the file of an instruction was edited.
    """
    folder, now = run.directory / "data" / "texts", writer.about()
    for place in sorted(folder.glob("*.json")) if folder.exists() else ():
        before = json.loads(place.read_bytes())["texts"]
        if changed := [name for name in now if before.get(name) != now[name]]:
            values = "; ".join(f"{name}: {before.get(name)!r} then, {now[name]!r} now" for name in changed)
            raise ValueError(
                f"some of the texts in {run.directory / 'data'} were written in another way ({values}). Bring that "
                f"back, or delete {folder} to have all texts written anew; answers that were paid for are kept"
            )
        return


def _record_path(run: Run, path: AnyPath) -> AnyPath:
    return run.directory / "data" / "texts" / f"{path.stem}.json"


def _record_of(run: Run, path: AnyPath) -> dict[str, Any] | None:
    """What was noted of a shard of data/base when it had been explained; None where it has to be.

    Raises:
      ValueError: it was explained with another config.
    """
    place = _record_path(run, path)
    if not place.exists():
        return None
    record, digest = json.loads(place.read_bytes()), stage_digest(run.config, "explain")
    if record["digest"] != digest:
        raise ValueError(
            f"{path} was explained with another config (digest {record['digest']}, this run has {digest}); use another "
            f"run directory, or delete {place.parent} to have all texts written again"
        )
    # The activations may have been extracted again meanwhile.
    return record if record["sha256"] == sidecar_of(path).file_sha256 else None


def _explain_shard(run: Run, path: AnyPath, writer: Writer) -> dict[str, Any]:
    """Write the rows of a shard of data/base into the splits, and note it. Rows of joint training need no texts."""
    rows, before = load_dataset(path), writer.report()
    split_N = splits_of(rows.doc_ids, run.config.corpus.fractions, run.config.seed)
    texts_N = np.full(len(rows), None, dtype=object)
    if (is_supervised_N := split_N != "rl").any():
        texts_N[is_supervised_N] = writer.explain(rows.take(is_supervised_N))
    report = since(writer.report(), before)
    written_by = dataclasses.replace(rows.sidecar, texts=writer.about())
    has_text_N = np.array([text is not None for text in texts_N], bool)
    explained = dataclasses.replace(rows, explanations=[text or "" for text in texts_N], sidecar=written_by)
    counts, documents, number = {}, {}, path.stem.rsplit("-", 1)[-1]
    for split, folder in run.split_folders().items():
        part = explained.take((split_N == split) & (has_text_N | (split == "rl")))
        target = folder / f"{split}-{number}.parquet"
        write_rows(run, target, part, stage=_stage_of(split), digest_of="explain")
        counts[split], documents[split] = len(part), len(set(part.doc_ids))
    record = {
        "digest": stage_digest(run.config, "explain"),
        "sha256": sidecar_of(path).file_sha256,
        "texts": report,
        "rows": counts,
        "documents": documents,
    }
    place = _record_path(run, path)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place, record)
    return record


def data_is_written(run: Run) -> bool:
    """Whether the data of all splits are there.

    Raises:
      ValueError: they are there, but of another config.
    """
    digest = stage_digest(run.config, "explain")
    return all([run.is_complete(folder, digest) for folder in run.split_folders().values()])


def write_rows(run: Run, path: AnyPath, part: ActivationDataset, *, stage: str, digest_of: str) -> None:
    """Write rows with their texts as a shard of a data set of this run's prompts; see `data/sidecar.py` for `stage`.

    Of several processes the first writes, and all return when it has. `digest_of` is the stage of the pipeline that
    writes it.
    """
    if jax.process_index() == 0:
        _write_rows(run, path, part, stage, stage_digest(run.config, digest_of))
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
        texts=None if stage == "rl" else part.sidecar.texts,
    )
    write_shard(path, stage_columns(stage, base_columns(part), templates), sidecar)


def _stage_of(split: str) -> str:
    return "av_sft" if split == "held_out" else split


def _progress(desc: str, total: int) -> tqdm:
    quiet = jax.process_index() > 0
    return tqdm(desc=desc, total=total, unit="shard", dynamic_ncols=True, disable=quiet)
