"""The stages of a run, in order: extract, explain, ar_sft, av_sft, rl, evaluate, report.

Each stage reads what the ones before it left in the run directory, goes on where it was killed, and does nothing
when it is done. The scripts in experiments/ are thin covers of `Run`.
"""

import dataclasses
import functools
import gc
import json
import os
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from nla_jax.autoencoder.prompts import build_reconstructor_prompt, build_verbalizer_prompt
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import Verbalizer, resolve_scale, sft_loss
from nla_jax.config import STAGES, ExperimentConfig, WarmStartConfig, save_config, stage_digest
from nla_jax.data.batches import evaluation_batches, training_batches, verbalizer_rows
from nla_jax.data.corpus import load_corpus
from nla_jax.data.dataset import ActivationDataset, load_dataset, stage_columns, write_shard
from nla_jax.data.explainers.predictive import PredictiveExplainer
from nla_jax.data.extraction import extract, tokenize
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar, SidecarTemplates, Tokens, sidecar_path_for
from nla_jax.data.splits import SPLITS, split_of
from nla_jax.evaluation.report import write_report
from nla_jax.evaluation.round_trip import Moments, RoundTrip, evaluate_texts, shuffled
from nla_jax.lm.config import LMConfig
from nla_jax.lm.weights import LanguageModel, load_language_model
from nla_jax.mesh import make_mesh, parameter_spec, shard_batch
from nla_jax.training.checkpoint import Checkpoints, restore_params
from nla_jax.training.loop import run_stage
from nla_jax.training.metrics_log import MetricsLog
from nla_jax.training.rl import TextCodec, make_round, optimizers
from nla_jax.training.state import TrainState
from nla_jax.training.supervised import (
    ReconstructorBatch,
    VerbalizerBatch,
    ar_mse_step,
    av_sft_step,
    jit_step,
)


def key_for(seed: int, purpose: str) -> jax.Array:
    """One random key a purpose: nothing depends on the order in which keys are asked for."""
    number = int.from_bytes(purpose.encode()[:4].ljust(4, b"\0"), "little") & 0x7FFFFFFF
    return jax.random.fold_in(jax.random.key(seed), number)


class Run:
    """A run directory and its config; every stage is a method."""

    def __init__(self, config: ExperimentConfig, directory: Path):
        self.config, self.directory = config, directory
        directory.mkdir(parents=True, exist_ok=True)
        save_config(config, directory / "config.json")
        self.mesh = make_mesh(config.mesh)
        events = directory / "tensorboard" if config.tensorboard else None
        self.log = MetricsLog(directory / "metrics.jsonl", tensorboard=events)

    # What the stages share.

    @functools.cached_property
    def lm(self) -> LanguageModel:
        """The target LM, its weights placed on the mesh as they are read."""

        def place(path: str, value: np.ndarray) -> jax.Array:
            spec = parameter_spec(path, value.shape, self.mesh)
            return jax.device_put(value, jax.sharding.NamedSharding(self.mesh, spec))

        return load_language_model(self.config.model.path, place=place)

    @functools.cached_property
    def lm_config(self) -> LMConfig:
        """The LM's config with this run's dtypes."""
        model = self.config.model
        config = dataclasses.replace(self.lm.config, dtype=model.dtype, attention_dtype=model.attention_dtype)
        config.check_layer(model.layer)
        return config

    @functools.cached_property
    def prompts(self):
        """AV and AR prompts."""
        tokenizer, templates = self.lm.tokenizer, self.config.templates
        return build_verbalizer_prompt(tokenizer, templates), build_reconstructor_prompt(tokenizer, templates)

    @functools.cached_property
    def codec(self) -> TextCodec:
        """AV and AR with everything that turns texts into tokens and back."""
        av_prompt, ar_prompt = self.prompts
        config, remat = self.config, self.config.model.remat
        scale = resolve_scale(config.injection.scale, self.training_activations)
        return TextCodec(
            self.lm.tokenizer,
            Verbalizer(self.lm_config, av_prompt, config.injection, scale, remat),
            Reconstructor(self.lm_config.truncated(config.model.layer), ar_prompt, remat),
            config.max_explanation_tokens,
            config.max_reconstructor_tokens,
        )

    @functools.cached_property
    def tokens(self) -> Tokens:
        """The token ids that bind data to this tokenizer and these templates."""
        av, ar = self.prompts
        return Tokens(
            injection_char=self.config.templates.marker,
            injection_token_id=av.marker,
            injection_left_neighbor_id=av.prefix[-1],
            injection_right_neighbor_id=av.tail[0],
            critic_suffix_ids=ar.suffix,
        )

    def data(self, split: str) -> ActivationDataset:
        """Rows of a split, checked against the live model and tokenizer."""
        return self._splits[split]

    @functools.cached_property
    def _splits(self) -> dict[str, ActivationDataset]:
        loaded = {split: load_dataset(self.directory / "data" / split) for split in SPLITS}
        for data in loaded.values():
            data.sidecar.check(
                base_model=self.lm.name,
                layer_index=self.config.model.layer,
                d_model=self.lm_config.d_model,
                tokens=self.tokens,
            )
        return loaded

    @functools.cached_property
    def training_activations(self) -> np.ndarray:
        """All activations but the held-out ones."""
        return np.concatenate([self.data(split).activations for split in SPLITS if split != "held_out"])

    @functools.cached_property
    def moments(self) -> Moments:
        """Means of the training activations."""
        return Moments.of(self.training_activations)

    @functools.cached_property
    def round_trip(self) -> RoundTrip:
        """Compiled evaluation."""
        return RoundTrip(self.codec, self.mesh, self.config.evaluation.batch_size)

    def held_out(self, rows: int) -> ActivationDataset:
        """The first `rows` held-out rows in an order that mixes documents."""
        data = self.data("held_out")
        order = np.random.default_rng(self.config.seed).permutation(len(data))
        return data.take(np.sort(order[:rows]))

    def checkpoints(self, stage: str) -> Checkpoints:
        """Checkpoints of a training stage."""
        return Checkpoints(
            self.directory / "checkpoints" / stage, digest=stage_digest(self.config, stage), keep=1
        )

    def fresh_copy(self, params: Any) -> Any:
        """Copy parameters, so that a step may donate its state and the originals stay."""
        return jax.tree.map(jnp.copy, params)

    # The stages.

    def extract(self) -> None:
        """Write activations of all documents to data/base."""
        folder, config = self.directory / "data" / "base", self.config.extraction
        documents = load_corpus(
            self.config.corpus.source, max_documents=self.config.corpus.max_documents, seed=self.config.seed
        )
        self.lm_config.check_layer(self.config.model.layer)
        contexts = tokenize(documents, self.lm.tokenizer, config, self.config.seed)
        self._check_splits([context.document.id for context in contexts])
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(contexts), config.shard_documents)
        digest = stage_digest(self.config, "extract")
        with tqdm(total=len(contexts), desc="extract", unit="doc", dynamic_ncols=True) as bar:
            for start in starts:
                chunk = contexts[start : start + config.shard_documents]
                path = folder / f"base-{start // config.shard_documents:05d}.parquet"
                if self._is_written(path, digest):
                    bar.update(len(chunk))
                    continue
                columns: dict[str, list] = defaultdict(list)
                for part in extract(
                    chunk,
                    self.lm.params,
                    self.lm.tokenizer,
                    self.lm_config,
                    self.config.model.layer,
                    config,
                    self.mesh,
                ):
                    for name, values in part.items():
                        columns[name] += values
                    bar.update(len(set(part["doc_id"])))
                extraction = Extraction(
                    base_model=self.lm.name,
                    d_model=self.lm_config.d_model,
                    layer_index=self.config.model.layer,
                    corpus=self.config.corpus.source,
                    corpus_slice=CorpusSlice(start, len(chunk)),
                    positions_per_doc=config.positions_per_document,
                )
                rows = len(columns["doc_id"])
                write_shard(
                    path, columns, Sidecar(digest, "base", rows, extraction, git_commit=_git_commit())
                )

    def explain(self) -> None:
        """Write explainer texts and divide the rows by document into data/{av_sft,ar_sft,rl,held_out}."""
        digest = stage_digest(self.config, "explain")
        paths = {split: self.directory / "data" / split / f"{split}.parquet" for split in SPLITS}
        if all(self._is_written(path, digest) for path in paths.values()):
            return
        base = load_dataset(self.directory / "data" / "base")
        explainer = PredictiveExplainer(
            self.config.explainer, seed=self.config.seed, background=base.contexts
        )
        texts = explainer.explain(base)
        fractions, seed = self.config.corpus.fractions, self.config.seed
        split_N = np.array([split_of(doc_id, fractions, seed) for doc_id in base.doc_ids])
        templates = SidecarTemplates(self.config.templates.verbalizer, self.config.templates.reconstructor)
        for split, path in tqdm(paths.items(), desc="explain", unit="split", dynamic_ncols=True):
            part = dataclasses.replace(base, explanations=texts).take(split_N == split)
            columns = {
                "activation_vector": part.activations,
                "n_raw_tokens": part.n_raw_tokens,
                "activation_layer": [self.config.model.layer] * len(part),
                "doc_id": part.doc_ids,
                "detokenized_text_truncated": part.contexts,
                "api_explanation": part.explanations,
                **part.extra,
            }
            stage = "av_sft" if split == "held_out" else split
            path.parent.mkdir(parents=True, exist_ok=True)
            sidecar = dataclasses.replace(
                part.sidecar,
                dataset_id=digest,
                stage=stage,
                tokens=self.tokens,
                prompt_templates=templates,
                parent_datasets=(base.sidecar.dataset_id,),
            )
            write_shard(path, stage_columns(stage, columns, templates), sidecar)

    def ar_sft(self) -> None:
        """Warm-start the AR on explainer texts; its last checkpoint is the frozen judge."""
        config, codec = self.config.ar_sft, self.codec
        optimizer = config.optimizer.build()
        data = self.data("ar_sft")
        held_out = self.held_out(self.config.evaluation.monitor_rows)
        step = jit_step(
            ar_mse_step,
            reconstructor=codec.reconstructor,
            optimizer=optimizer,
            micro_batches=config.micro_batches,
        )

        def evaluate(states):
            params = states["ar"].params
            texts, activations = held_out.explanations, held_out.activations
            return {"held_out_fve_nrm": self.round_trip.fve_nrm(params, texts, activations, self.moments)}

        self._supervised(
            "ar_sft",
            config,
            "ar",
            lambda: TrainState.create(self.fresh_copy(codec.reconstructor.init(self.lm.params)), optimizer),
            lambda state, batch: step(state, shard_batch(ReconstructorBatch(**batch), self.mesh)),
            codec.encode(data.activations, data.explanations),
            evaluate,
            ("loss", "held_out_fve_nrm"),
        )

    def av_sft(self) -> None:
        """Warm-start the AV on explainer texts; its last checkpoint is RL's reference."""
        config, codec = self.config.av_sft, self.codec
        verbalizer, optimizer = codec.verbalizer, config.optimizer.build()
        data, held_out = self.data("av_sft"), self.held_out(self.config.evaluation.monitor_rows)

        def rows(part: ActivationDataset):
            return verbalizer_rows(part, codec.tokenizer, verbalizer.prompt, codec.max_explanation_tokens)

        step = jit_step(
            av_sft_step, verbalizer=verbalizer, optimizer=optimizer, micro_batches=config.micro_batches
        )
        loss = jax.jit(lambda params, batch: sft_loss(verbalizer, params, *jax.tree.leaves(batch)))
        true_rows = rows(held_out)
        order = shuffled(range(len(held_out)), held_out.doc_ids, self.config.seed)
        batch_size = self.config.evaluation.batch_size
        usable = len(held_out) // batch_size * batch_size or len(held_out)

        def mean_loss(params, columns):
            sums = np.zeros(2)
            columns = {name: column[:usable] for name, column in columns.items()}
            for batch, _ in evaluation_batches(columns, min(batch_size, usable)):
                sums += np.array(loss(params, shard_batch(VerbalizerBatch(**batch), self.mesh)))
            return float(sums[0] / sums[1])

        def evaluate(states):
            params = states["av"].params
            wrong = {**true_rows, "activations_BD": true_rows["activations_BD"][order]}
            real_loss, shuffled_loss = mean_loss(params, true_rows), mean_loss(params, wrong)
            return {
                "real_loss": real_loss,
                "shuffled_loss": shuffled_loss,
                "gap": shuffled_loss - real_loss,
            }

        self._supervised(
            "av_sft",
            config,
            "av",
            lambda: TrainState.create(self.fresh_copy(verbalizer.init(self.lm.params)), optimizer),
            lambda state, batch: step(state, shard_batch(VerbalizerBatch(**batch), self.mesh)),
            rows(data),
            evaluate,
            ("loss", "gap"),
        )

    def _supervised(
        self,
        stage: str,
        config: WarmStartConfig,
        model: str,
        initial: Callable[[], TrainState],
        step: Callable,
        rows: dict[str, np.ndarray],
        evaluate: Callable,
        shown: tuple[str, ...],
    ) -> None:
        def one_step(states, batch, index):
            state, metrics = step(states[model], batch)
            return {model: state}, metrics

        run_stage(
            stage,
            config.loop,
            initial=lambda: {model: initial()},
            step=one_step,
            batches=training_batches(rows, config.batch_size, self.config.seed),
            evaluate=evaluate,
            checkpoints=self.checkpoints(stage),
            log=self.log,
            mesh=self.mesh,
            shown=shown,
        )

    def warm_start_params(self, model: str) -> Any:
        """Parameters of the warm-start "av" (RL's reference) or "ar" (the judge)."""
        return self.trained_params(f"{model}_sft", model)

    def trained_params(self, stage: str, model: str, step: int | None = None) -> Any:
        """Parameters of "av" or "ar" from a checkpoint of a stage, the latest by default."""
        checkpoints = self.checkpoints(stage)
        return restore_params(checkpoints.directory, model, step or checkpoints.latest(), self.mesh)

    def rl(self) -> None:
        """Joint training from both warm starts; the best checkpoint by the frozen judge is kept."""
        config, codec = self.config.rl, self.codec
        monitor = self.held_out(self.config.evaluation.monitor_rows)
        if (self.checkpoints("rl").latest() or 0) >= config.loop.steps:
            return
        reference, judge = self.warm_start_params("av"), self.warm_start_params("ar")
        seed = self.config.seed

        def initial():
            params = {"av": reference, "ar": judge}
            return {
                name: TrainState.create(self.fresh_copy(params[name]), optimizer)
                for name, optimizer in optimizers(config).items()
            }

        def evaluate(states):
            key = key_for(seed, "monitor")
            temperature = self.config.evaluation.temperature
            texts = self.round_trip.verbalize(states["av"].params, monitor.activations, key, temperature)
            return {
                f"{name}_fve_nrm": self.round_trip.fve_nrm(params, texts, monitor.activations, self.moments)
                for name, params in (("own", states["ar"].params), ("judge", judge))
            }

        rows = {"activations_BD": self.data("rl").activations}
        run_stage(
            "rl",
            config.loop,
            initial=initial,
            step=make_round(config, codec, reference, self.mesh, key_for(seed, "rollouts")),
            batches=training_batches(rows, config.activations, seed),
            evaluate=evaluate,
            checkpoints=self.checkpoints("rl"),
            log=self.log,
            mesh=self.mesh,
            shown=("reward_mean", "kl", "judge_fve_nrm", "own_fve_nrm"),
            best="judge_fve_nrm",
        )

    def evaluate(self) -> None:
        """Measure warm start and best RL step on held-out documents; write evaluation.json and examples.jsonl."""
        config, path = self.config.evaluation, self.directory / "evaluation.json"
        digest = stage_digest(self.config, "evaluate") + f"-{self.config.rl.loop.steps}"
        if path.exists() and json.loads(path.read_text())["digest"] == digest:
            return
        data = self.held_out(config.rows)
        checkpoints = self.checkpoints("rl")
        best = checkpoints.pinned() or checkpoints.latest()
        key = key_for(self.config.seed, "evaluate")
        texts = {}
        for name, stage, step in (("warm start", "av_sft", None), ("after RL", "rl", best)):
            params = self.trained_params(stage, "av", step)
            texts[name] = self.round_trip.verbalize(params, data.activations, key, config.temperature)
            del params
            gc.collect()
        judges = {
            "own": self.trained_params("rl", "ar", best),
            "judge": self.warm_start_params("ar"),
        }
        fit = self.data("ar_sft").take(slice(0, config.rows))
        systems, predictions = evaluate_texts(
            self.round_trip, texts, judges, fit, data, self.moments, config, self.config.seed
        )
        result = {
            "digest": digest,
            "run": {
                "name": self.config.name,
                "model": self.lm.name,
                "layer": self.config.model.layer,
                "corpus": self.config.corpus.source,
                "machine": machine_class(),
            },
            "settings": dataclasses.asdict(config),
            "mean_is": f"mean of {len(self.training_activations)} training activations",
            "systems": systems,
            "timings": self._timings(),
            "best_step": best,
        }
        self._write_examples(data, texts["after RL"], predictions["own"])
        _write_json(path, result)

    def report(self) -> Path:
        """Write report.html."""
        return write_report(self.directory)

    def run(self, stages: tuple[str, ...] = tuple(STAGES)) -> None:
        """Run stages in order, noting how long each took."""
        for stage in stages:
            started = time.perf_counter()
            getattr(self, stage)()
            timings = self._timings()
            timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - started
            _write_json(self.directory / "timings.json", timings)

    # Small helpers.

    def _timings(self) -> dict[str, float]:
        path = self.directory / "timings.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _check_splits(self, doc_ids: list[str]) -> None:
        counts = dict.fromkeys(SPLITS, 0)
        for doc_id in doc_ids:
            counts[split_of(doc_id, self.config.corpus.fractions, self.config.seed)] += 1
        if empty := [split for split, count in counts.items() if count < 2]:
            raise ValueError(
                f"{len(doc_ids)} documents leave fewer than 2 for the splits {empty}; "
                "use more documents or larger shares (corpus.held_out and its neighbors)"
            )

    def _is_written(self, path: Path, digest: str) -> bool:
        sidecar = sidecar_path_for(path)
        if not (path.exists() and sidecar.exists()):
            return False
        found = Sidecar.load(sidecar).dataset_id
        if found != digest:
            raise ValueError(
                f"{path} was written with another config (digest {found}, this run has {digest}); "
                "use another run directory, or delete this one's data/ to make it again"
            )
        return True

    def _write_examples(self, data: ActivationDataset, texts: list, prediction_ND: np.ndarray) -> None:
        unit_pred = prediction_ND / np.linalg.norm(prediction_ND, axis=1, keepdims=True)
        unit_true = data.activations / np.linalg.norm(data.activations, axis=1, keepdims=True)
        cosine_N = (unit_pred * unit_true).sum(axis=1)
        order = np.random.default_rng(self.config.seed).permutation(len(data))
        chosen = order[: self.config.evaluation.examples]
        lines = [
            json.dumps(
                {
                    "doc_id": data.doc_ids[i],
                    "context_tail": data.contexts[i][-240:],
                    "next_tokens": data.extra["true_continuation"][i],
                    "explanation": texts[i],
                    "explainer_text": data.explanations[i],
                    "cosine": float(cosine_N[i]),
                }
            )
            for i in chosen
        ]
        (self.directory / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def machine_class() -> str:
    """The kind of machine that a figure was measured on."""
    devices = jax.devices()
    kind = f"{len(devices)} x {devices[0].device_kind}" if devices[0].platform != "cpu" else "CPU"
    return f"{kind}, {os.cpu_count()} cores, {platform.machine()}"


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(temporary, path)
