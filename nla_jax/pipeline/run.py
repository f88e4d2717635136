"""A run directory: its config, its data, its checkpoints and the files that its stages write."""

import functools
import json
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nla_jax.autoencoder.yardstick import Part, Yardstick
from nla_jax.config import ExperimentConfig, plain
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.manifest import Manifest
from nla_jax.data.sidecar import Sidecar, sidecar_path_for
from nla_jax.data.splits import SPLITS, monitor_documents, some_rows
from nla_jax.data.store import StoredDataset, open_dataset
from nla_jax.files import AnyPath, Place, as_path, write_json
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.models import Models
from nla_jax.sharding.mesh import make_mesh
from nla_jax.training.checkpoint import Checkpoints
from nla_jax.training.metrics_log import MetricsLog
from nla_jax.training.trackers import Tracker, open_tracker


class Run:
    """Where a run lives, and its config; `models` holds what it trains."""

    def __init__(self, config: ExperimentConfig, directory: Place, *, mesh: Mesh | None = None):
        """Describe a run; nothing is read or written yet.

        Args:
          config: what it does.
          directory: where it lives, here or in a bucket (`gs://`); created by the first stage.
          mesh: where weights go, in place of the mesh of the config, which may be for another machine.
        """
        directory = as_path(directory)
        self.config, self.directory = config, directory
        self.mesh = mesh or make_mesh(config.mesh)
        self.log = MetricsLog(directory / "metrics.jsonl", open_tracker=self._tracker)
        self.models = Models(config, self.mesh, lambda: self.yardstick, self.checkpoints)
        self._opened = functools.cache(self._open)

    def _tracker(self) -> Tracker | None:
        return open_tracker(self.config.tracker, self.directory, self.config.name, plain(self.config))

    def open(self, split: str) -> StoredDataset:
        """A split, checked against the live model and tokenizer; its rows are read when they are asked for."""
        return self._opened(split)

    def _open(self, split: str) -> StoredDataset:
        data = open_dataset(self.directory / "data" / split)
        self.check(data.sidecar)
        return data

    def reopen(self) -> None:
        """Forget the splits that are open, because other files are there now."""
        self._opened.cache_clear()

    def data(self, split: str) -> ActivationDataset:
        """All rows of a split in memory, for analysis of data that are not too large for that."""
        return self.open(split).read()

    def check(self, sidecar: Sidecar) -> None:
        """Raise ValueError where a data set contradicts the live model or tokenizer."""
        sidecar.check(
            base_model=self.models.lm.name,
            layer_index=self.config.model.layer,
            d_model=self.models.lm_config.d_model,
            tokens=self.models.prompt_ids,
        )

    @functools.cached_property
    def yardstick(self) -> Yardstick:
        """What FVE is measured against: stored with the data, or computed from it in runs that stored none."""
        stored = Yardstick.load(self.directory / "data")
        return self.measured_yardstick() if stored is None else stored

    def measured_yardstick(self) -> Yardstick:
        """The yardstick of all activations but the held-out ones."""
        parts = (part for split in SPLITS if split != "held_out" for part in self.open(split).parts())
        return Yardstick.of_parts(
            Part(part.activations, part.extra.get("place"), part.doc_ids) for part in parts
        )

    def held_out(self, rows: int) -> ActivationDataset:
        """Rows of the held-out documents that figures are reported on.

        The first `rows` of them in an order that mixes documents, or all where there are fewer.
        """
        return self._of_held_out(rows, monitored=False)

    def monitored(self, rows: int) -> ActivationDataset:
        """The same of the other held-out documents: training is watched on them, and they choose the steps kept."""
        return self._of_held_out(rows, monitored=True)

    def _of_held_out(self, rows: int, *, monitored: bool) -> ActivationDataset:
        data = self.open("held_out")
        doc_ids = data.doc_ids
        documents = monitor_documents(doc_ids, self.config.seed)
        data = data.take(np.array([(doc_id in documents) == monitored for doc_id in doc_ids]))
        return some_rows(data, rows, self.config.seed).read()

    def checkpoints(self, stage: str) -> Checkpoints:
        """Checkpoints of a training stage."""
        configured, folder = stage, stage
        if stage == "second_judge":
            # A second warm start of the AR, of a length of its own: judges of other lengths lie beside it.
            configured, folder = "ar_sft", f"second_judge_{self.config.evaluation.second_judge_steps}"
        if stage == "oracle":
            # Of a config in which the oracle stands in the AV's place.
            configured, folder = "av_sft", f"oracle_{self.config.evaluation.oracle_steps}"
        return Checkpoints(
            self.directory / "checkpoints" / folder,
            digest=stage_digest(self.config, configured),
            keep=getattr(self.config, configured).loop.keep_checkpoints,
            # Cores that write would be missing where they compute.
            background=jax.default_backend() != "cpu",
        )

    def best_step(self) -> int | None:
        """The round of joint training that counts: the best by the judge, else the latest; None if none is saved.

        Round 0 is the warm start itself, which no later round was better than.
        """
        return self.checkpoints("rl").best()

    def kept_steps(self) -> dict[str, int]:
        """The step that counts of each training stage that has one; the stages say by which metric (`Best`)."""
        stages = ["av_sft", "ar_sft", *(["distill"] if self.config.distill.loop.steps else []), "rl"]
        if self.config.evaluation.second_judge_steps:
            stages.append("second_judge")
        steps = {stage: self.checkpoints(stage).best() for stage in stages}
        return {stage: step for stage, step in steps.items() if step is not None}

    def timings(self) -> dict[str, float]:
        """Seconds that each finished stage took."""
        path = self.directory / "timings.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write_json(self, name: str, value: Any) -> None:
        """Write a file of the run directory, atomically; of several processes the first does."""
        write_json(self.directory / name, value)

    def split_folders(self) -> dict[str, AnyPath]:
        """The folder of each split, which holds its shards."""
        return {split: self.directory / "data" / split for split in SPLITS}

    def is_written(self, path: AnyPath, digest: str) -> bool:
        """Whether a shard is there, with its sidecar.

        Raises:
          ValueError: it was written with another config.
        """
        sidecar = sidecar_path_for(path)
        if not (path.exists() and sidecar.exists()):
            return False
        _check_digest(path, Sidecar.load(sidecar).dataset_id, digest)
        return True

    def is_complete(self, folder: AnyPath, digest: str) -> bool:
        """Whether a data set is there, with its manifest; one of earlier versions is a single file with its sidecar.

        Raises:
          ValueError: it was written with another config.
        """
        manifest = Manifest.load(folder)
        if manifest is None:
            return self.is_written(folder / f"{folder.name}.parquet", digest)
        _check_digest(folder, manifest.dataset_id, digest)
        return True


def _check_digest(path: AnyPath, recorded: str, digest: str) -> None:
    if recorded != digest:
        raise ValueError(
            f"{path} was written with another config (digest {recorded}, this run has {digest}); "
            "use another run directory, or delete this one's data/ to make it again"
        )
