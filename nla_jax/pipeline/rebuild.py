"""Vectors of data that were shared without them, computed anew from the corpus and the model and checked row by row."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from nla_jax.config import read_config
from nla_jax.data.dataset import write_shard
from nla_jax.data.manifest import Manifest
from nla_jax.data.shards import shards_of, sidecar_of
from nla_jax.data.sharing import CHECKS, sketches, vector_digests
from nla_jax.data.store import StoredDataset, open_dataset
from nla_jax.data.summary import datasets_at
from nla_jax.data.variance import hashes
from nla_jax.files import AnyPath, Place, as_path, local_copy
from nla_jax.pipeline.extract import extract
from nla_jax.pipeline.run import Run
from nla_jax.process import warn

EXTRACTED = "extracted"
"""The folder of the rebuilt data with the run whose stage extract computes the vectors."""


@dataclasses.dataclass
class RebuildReport:
    """What became of the rows that were shared."""

    rows: Counter[str] = dataclasses.field(default_factory=Counter)
    """Data set -> rows whose vectors agree, and which were written."""
    identical: int = 0
    """Those of them that agree in every bit."""
    disagreeing: list[str] = dataclasses.field(default_factory=list)
    """For each other row its name, and what is wrong."""


def rebuild(place: Place, out: Place, *, tolerance: float) -> RebuildReport:
    """Compute the vectors of shared data anew.

    The rows whose vectors agree are written as data sets; a killed rebuild goes on with the shards that are missing.

    Args:
      place: a folder that `nla data share --without-vectors` wrote.
      out: folder that is written.
      tolerance: how far norms (as a share) and directions (as a distance of unit vectors) may differ.

    Raises:
      FileNotFoundError: no data sets, or no config of the run that made them.
      ValueError: as the stage extract.
    """
    place, out = as_path(place), as_path(out)
    if not (place / "config.json").is_file():
        raise FileNotFoundError(
            f"{place} holds no config.json, which tells how its vectors are computed; give a folder that was shared "
            "without vectors"
        )
    found = datasets_at(place)
    run = Run(read_config(place / "config.json"), out / EXTRACTED)
    extract(run)
    report = RebuildReport()
    for name, folder in found.items():
        shared = sidecar_of(shards_of(folder)[0]).extraction
        layer, own = shared.layer_index, run.config.model.layer
        base = _Base(run.directory / "data" / ("base" if layer == own else f"base_{layer}"))
        if shared.corpus_digest != base.digest:
            warn(
                f"{name} was made of documents with the digest {shared.corpus_digest}, and {shared.corpus} now gives "
                f"some with {base.digest}: rows of documents that differ will not agree"
            )
        for shard in shards_of(folder):
            _rebuild_shard(name, shard, out / name, base, tolerance, report)
        if report.rows[name]:
            Manifest.of(out / name).save(out / name)
    return report


class _Base:
    """The rows that were extracted anew, found by document, position and beginning of the span."""

    def __init__(self, folder: AnyPath):
        self.dataset: StoredDataset = open_dataset(folder)
        self.digest = self.dataset.sidecar.extraction.corpus_digest
        scanned = self.dataset.scan("doc_id", "n_raw_tokens", "span_start")
        key_N = np.concatenate([np.zeros(0, np.uint64), *(_keys(*columns) for columns in scanned)])
        self.order_N = np.argsort(key_N, kind="stable")
        self.key_N = key_N[self.order_N]

    def rows(self, keys: np.ndarray) -> Int64[np.ndarray, "N"]:
        """The row of each key; -1 where there is none."""
        if not len(self.key_N):
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self.key_N, keys), len(self.key_N) - 1)
        return np.where(self.key_N[places] == keys, self.order_N[places], -1)


def _keys(doc_ids: list, positions: list, spans: list) -> np.ndarray:
    return hashes(
        [f"{position} {span} {doc}" for doc, position, span in zip(doc_ids, positions, spans, strict=True)]
    )


def _rebuild_shard(
    name: str, shard: AnyPath, out: AnyPath, base: _Base, tolerance: float, report: RebuildReport
) -> None:
    with local_copy(shard) as file:
        table = pq.read_table(file).to_pydict()
    if missing := [check for check in CHECKS if check not in table]:
        raise ValueError(
            f"{shard} lacks the columns {missing}; give a folder that was shared without vectors"
        )
    spans = table.get("span_start", [None] * len(table["doc_id"]))
    row_N = base.rows(_keys(table["doc_id"], table["n_raw_tokens"], spans))
    vectors_ND = np.zeros((len(row_N), base.dataset.width), np.float32)
    vectors_ND[row_N >= 0] = base.dataset.activations(row_N[row_N >= 0])
    problems = ["its document or position is not there any more" if row < 0 else "" for row in row_N]
    for row, problem in enumerate(disagreements(vectors_ND, table, tolerance)):
        problems[row] = problems[row] or problem
    kept = [row for row, problem in enumerate(problems) if not problem]
    for row, problem in enumerate(problems):
        if problem:
            report.disagreeing.append(
                f"{name}: document {table['doc_id'][row]!r} after {table['n_raw_tokens'][row]} tokens: {problem}"
            )
    digests = vector_digests(vectors_ND)
    report.identical += sum(digests[row] == table["vector_digest"][row] for row in kept)
    report.rows[name] += len(kept)
    if not kept:
        return
    columns = {key: [column[row] for row in kept] for key, column in table.items() if key not in CHECKS}
    sidecar = dataclasses.replace(sidecar_of(shard), row_count=len(kept), file_bytes=None, file_sha256=None)
    out.mkdir(parents=True, exist_ok=True)
    write_shard(out / shard.name, {"activation_vector": vectors_ND[kept], **columns}, sidecar)


def disagreements(
    vectors_ND: Float32[np.ndarray, "N D"], checks: dict[str, Any], tolerance: float
) -> list[str]:
    """What is wrong with each vector; empty where norm and direction are within the tolerance.

    Args:
      vectors_ND: computed anew.
      checks: the shared columns `vector_norm` and `vector_sketch`.
      tolerance: see `rebuild`.
    """
    norm_N, shared_N = np.linalg.norm(vectors_ND, axis=1), np.array(checks["vector_norm"], np.float64)
    norm_error_N = np.abs(norm_N - shared_N) / np.maximum(shared_N, 1e-30)
    difference_NS = sketches(vectors_ND) - np.array(checks["vector_sketch"], np.float32).reshape(
        len(norm_N), -1
    )
    direction_N = np.sqrt((difference_NS**2).mean(axis=1))
    return [
        ""
        if norm_error <= tolerance and direction <= tolerance
        else f"its norm is {norm:.6g} and was {shared:.6g}, and its direction differs by {direction:.3g}"
        for norm, shared, norm_error, direction in zip(
            norm_N, shared_N, norm_error_N, direction_N, strict=True
        )
    ]
