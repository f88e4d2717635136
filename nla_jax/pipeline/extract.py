"""The first stage: activations of documents.

Each shard holds the rows of a fixed range of documents, and nothing in it depends on the shards before it, so that a
killed run goes on with the shards that are missing and ends with the same rows. While devices compute a shard, one
thread tokenizes the documents of the next, and another writes the one before.
"""

import dataclasses
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax
from tqdm import tqdm

from nla_jax.autoencoder.prompts import build_verbalizer_prompt
from nla_jax.data.adoption import sidecars
from nla_jax.data.dataset import write_shard
from nla_jax.data.extraction import Rows, columns_of, read_rows
from nla_jax.data.manifest import Manifest
from nla_jax.data.positions import Context, Tally, choose_positions
from nla_jax.data.shards import Shard
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar, sidecar_path_for
from nla_jax.data.splits import FEWEST_DOCUMENTS, SPLITS, check_documents, split_of
from nla_jax.files import AnyPath, as_path, local_copy, write_atomically
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.documents import check_processes, check_shards, prepare_documents
from nla_jax.pipeline.run import Run
from nla_jax.shipped import git_commit

Item, Result = TypeVar("Item"), TypeVar("Result")


def extract(run: Run) -> None:
    """Write activations of all documents to data/base; data sets made elsewhere are only checked.

    Those of further layers (`extraction.layers`) go to data/base_LAYER.
    """
    if run.config.data.is_given:
        for path in filter(None, run.config.data.paths.values()):
            for sidecar in sidecars(path):
                run.check(sidecar)
        return
    # Templates that do not fit the tokenizer fail here, before anything is computed.
    build_verbalizer_prompt(run.models.base_lm.tokenizer, run.config.templates)
    _Extraction(run).run_all()


class _Extraction:
    """The extraction of a run's documents, shard by shard."""

    def __init__(self, run: Run):
        self.run, self.config = run, run.config.extraction
        self.store = prepare_documents(run)
        self.record = self.store.record
        check_processes(self.record)
        self.layers = self.config.all_layers(run.config.model.layer)
        for layer in self.layers:
            run.models.lm_config.check_layer(layer)
            check_shards(run, self.folder(layer), self.record)
        size = self.config.shard_documents
        self.ranges = [
            range(start, min(start + size, len(self.store))) for start in range(0, len(self.store), size)
        ]
        self.tally = Tally()

    def folder(self, layer: int) -> AnyPath:
        """Where the activations of a layer go."""
        name = "base" if layer == self.run.config.model.layer else f"base_{layer}"
        return self.run.directory / "data" / name

    def path(self, layer: int, number: int) -> AnyPath:
        """The file of a shard."""
        return self.folder(layer) / f"base-{number:05d}.parquet"

    def digest(self, layer: int) -> str:
        """The digest of a layer's data set: that of a run on this layer, so that such a run can take its shards."""
        config = self.run.config
        model = dataclasses.replace(config.model, layer=layer, frozen_blocks=0)
        return stage_digest(dataclasses.replace(config, model=model), "extract")

    def run_all(self) -> None:
        """Write the shards that are missing, and then the manifests."""
        done = {number for number in range(len(self.ranges)) if self._is_written(number)}
        if len(done) < len(self.ranges):
            self._check_documents()
        for layer in self.layers:
            self.folder(layer).mkdir(parents=True, exist_ok=True)
        done |= self._copy({*range(len(self.ranges))} - done)
        bar = tqdm(
            total=len(self.store),
            desc="extract",
            unit="doc",
            dynamic_ncols=True,
            disable=jax.process_index() > 0,
        )
        missing = [number for number in range(len(self.ranges)) if number not in done]
        if missing:
            self._check_columns(done)
        with bar, ThreadPoolExecutor(1) as writer:
            bar.update(sum(len(self.ranges[number]) for number in done))
            writing: Future | None = None
            for number, contexts in zip(missing, _ahead(self._contexts, missing), strict=True):
                rows = self._read(contexts, bar)
                bar.update(len(self.ranges[number]) - len(contexts))
                if writing is not None:  # At most one shard waits for the disk.
                    writing.result()
                if jax.process_index() == 0:
                    writing = writer.submit(self._write, number, contexts, rows)
            if writing is not None:
                writing.result()
        self.tally.warn(self.config)
        if jax.process_index() == 0:
            if self.tally.rows:
                print(f"extracted {self.tally.describe_rows()}", file=sys.stderr)
            for layer in self.layers:
                Manifest.of(self.folder(layer)).save(self.folder(layer))

    def _is_written(self, number: int) -> bool:
        """Whether a shard of all layers is there.

        Raises:
          ValueError: a shard of another config, or of a version that divided documents among shards in another way.
        """
        written = []
        for layer in self.layers:
            path = self.path(layer, number)
            written.append(self.run.is_written(path, self.digest(layer)))
            if written[-1] and Sidecar.load(sidecar_path_for(path)).file_bytes is None:
                raise ValueError(
                    f"{path} was written by an earlier version, which counted the documents of a shard in another way; "
                    f"delete {self.folder(layer)} to extract again"
                )
        return all(written)

    def _check_columns(self, done: set[int]) -> None:
        """Refuse shards of an earlier version beside those that are going to be written: one data set has one form.

        Raises:
          ValueError: a shard lacks the youngest column.
        """
        for path in (self.path(layer, number) for layer in self.layers for number in sorted(done)):
            if "last_token_ids" not in Shard(path, Sidecar.load(sidecar_path_for(path))).names:
                raise ValueError(
                    f"{path} was written by an earlier version, whose rows have no column last_token_ids, and other "
                    f"shards are missing; delete {path.parent} to extract again"
                )

    def _check_documents(self) -> None:
        """Look through the documents, as far as needed, for enough of each split and for each role that is asked for.

        Raises:
          ValueError: there are not; nothing has been computed then.
        """
        counts, tally = Counter(dict.fromkeys(SPLITS, 0)), Tally()
        config = self.run.config
        for documents in self.ranges:
            for context in self._chosen(documents, tally):
                counts[split_of(context.document.id, config.corpus.fractions, config.seed)] += 1
            enough = all(counts[split] >= fewest for split, fewest in FEWEST_DOCUMENTS.items())
            if enough and tally.roles >= {*self.config.roles}:
                return
        tally.check(self.config)
        check_documents(counts)

    def _chosen(self, documents: range, tally: Tally) -> list[Context]:
        read = self.store.read(documents.start, documents.stop)
        return choose_positions(read, self.run.models.lm.tokenizer, self.config, self.run.config.seed, tally)

    def _contexts(self, number: int) -> list[Context]:
        """The documents of a shard with the readings chosen in them."""
        return self._chosen(self.ranges[number], self.tally)

    def _read(self, contexts: list[Context], bar: tqdm) -> Rows | None:
        """What the target gives for a shard; None where none of its documents is long enough."""
        if not contexts:
            return None
        models = self.run.models
        return read_rows(
            contexts,
            models.target.params,
            models.lm_config,
            self.layers,
            self.config,
            self.run.mesh,
            on_batch=bar.update,
        )

    def _write(self, number: int, contexts: list[Context], rows: Rows | None) -> None:
        """Write a shard, those of further layers first, so that the run's own tells that all are there."""
        documents, models = self.ranges[number], self.run.models
        rows = rows or Rows.empty(self.layers, models.lm_config.d_model)
        for layer in reversed(self.layers):
            columns = columns_of(contexts, rows, layer, models.lm.tokenizer, self.config)
            extraction = Extraction(
                base_model=models.lm.name,
                d_model=models.lm_config.d_model,
                layer_index=layer,
                corpus=self.record.corpus,
                corpus_slice=CorpusSlice(documents.start, len(documents)),
                positions_per_doc=self.config.positions_per_document,
                corpus_documents=self.record.documents,
                corpus_digest=self.record.digest,
            )
            sidecar = Sidecar(
                self.digest(layer),
                "base",
                len(columns["doc_id"]),
                extraction,
                git_commit=git_commit(),
                storage=self.config.storage,
            )
            path = self.path(layer, number)
            try:
                write_shard(path, columns, sidecar)
            except OSError as error:
                raise OSError(
                    f"{path} could not be written ({error}). The shards before it are complete; make room on the disk, "
                    "and the same command goes on with this one"
                ) from error

    def _copy(self, missing: set[int]) -> set[int]:
        """Copy the missing shards that `extraction.copy_from` holds; returns their numbers.

        Raises:
          FileNotFoundError: no such folder.
          ValueError: it holds activations of other documents, or of another config.
        """
        if self.config.copy_from is None or not missing:
            return set()
        source, (layer, *others) = as_path(self.config.copy_from), self.layers
        if others:
            raise ValueError(
                f"extraction.copy_from={source} holds one layer, and extraction.layers asks for {others} too; give one"
            )
        if not source.exists():
            raise FileNotFoundError(
                f"extraction.copy_from={source} does not exist; give data/base or data/base_LAYER of another run"
            )
        digest, copied = self.digest(layer), set()
        for number in sorted(missing):
            path = self.path(layer, number)
            shard = source / path.name
            if not (shard.exists() and sidecar_path_for(shard).exists()):
                continue
            sidecar = Sidecar.load(sidecar_path_for(shard))
            found = sidecar.extraction
            if (sidecar.dataset_id, found.corpus_digest) != (digest, self.record.digest):
                raise ValueError(
                    f"{shard} does not fit this run: it holds layer {found.layer_index} of {found.corpus} (digest "
                    f"{sidecar.dataset_id}, documents {found.corpus_digest}), and this run reads layer {layer} (digest "
                    f"{digest}, documents {self.record.digest}); its config may differ in model.layer, not in seed, "
                    "corpus or extraction"
                )
            if jax.process_index() == 0:
                with local_copy(shard) as file, write_atomically(path) as temporary:
                    shutil.copyfile(file, temporary)
                sidecar.save(sidecar_path_for(path))
            copied.add(number)
        return copied


def _ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield what a function returns for each item; a thread computes the next result while one is used."""
    with ThreadPoolExecutor(1) as pool:
        following: Future | None = None
        for item in items:
            previous, following = following, pool.submit(function, item)
            if previous is not None:
                yield previous.result()
        if following is not None:
            yield following.result()
