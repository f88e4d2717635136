"""The stages of a run, in order: extract, explain, av_sft, ar_sft, rl, evaluate, report.

Each stage reads what the ones before it left in the run directory, goes on where it was killed, and does nothing
when it is done. The scripts in experiments/ are thin covers of `run_stages`.
"""

import dataclasses
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
import numpy as np
from tqdm import tqdm

from nla_jax.autoencoder.verbalizer import sft_loss
from nla_jax.config import STAGES, WarmStartConfig, save_config, stage_digest
from nla_jax.data.adoption import adopt, sidecars
from nla_jax.data.batches import evaluation_batches, training_batches, verbalizer_rows
from nla_jax.data.corpus import load_corpus
from nla_jax.data.dataset import ActivationDataset, load_dataset, stage_columns, write_shard
from nla_jax.data.explainers.predictive import PredictiveExplainer
from nla_jax.data.extraction import extract as extract_contexts
from nla_jax.data.extraction import tokenize
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar, SidecarTemplates
from nla_jax.data.splits import SPLITS, split_of
from nla_jax.evaluation.report import write_report
from nla_jax.evaluation.round_trip import evaluate_texts, shuffled
from nla_jax.mesh import shard_batch
from nla_jax.run import Run, key_for
from nla_jax.training.loop import run_stage
from nla_jax.training.rl import make_round, optimizers
from nla_jax.training.state import TrainState
from nla_jax.training.supervised import (
    ReconstructorBatch,
    VerbalizerBatch,
    ar_mse_step,
    av_sft_step,
    jit_step,
)


def extract(run: Run) -> None:
    """Write activations of all documents to data/base; data sets made elsewhere are only checked."""
    if run.config.data.is_given:
        for path in filter(None, run.config.data.paths.values()):
            for sidecar in sidecars(path):
                run.check(sidecar)
        return
    folder, config = run.directory / "data" / "base", run.config.extraction
    _ = run.prompts  # bad templates fail here, before anything is computed
    documents = load_corpus(
        run.config.corpus.source, max_documents=run.config.corpus.max_documents, seed=run.config.seed
    )
    run.lm_config.check_layer(run.config.model.layer)
    contexts = tokenize(documents, run.lm.tokenizer, config, run.config.seed)
    _check_splits(run, [context.document.id for context in contexts])
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(contexts), config.shard_documents)
    digest = stage_digest(run.config, "extract")
    with tqdm(total=len(contexts), desc="extract", unit="doc", dynamic_ncols=True) as bar:
        for start in starts:
            chunk = contexts[start : start + config.shard_documents]
            path = folder / f"base-{start // config.shard_documents:05d}.parquet"
            if run.is_written(path, digest):
                bar.update(len(chunk))
                continue
            columns: dict[str, list] = defaultdict(list)
            for part in extract_contexts(
                chunk,
                run.target.params,
                run.lm.tokenizer,
                run.lm_config,
                run.config.model.layer,
                config,
                run.mesh,
            ):
                for name, values in part.items():
                    columns[name] += values
                bar.update(len(set(part["doc_id"])))
            extraction = Extraction(
                base_model=run.lm.name,
                d_model=run.lm_config.d_model,
                layer_index=run.config.model.layer,
                corpus=run.config.corpus.source,
                corpus_slice=CorpusSlice(start, len(chunk)),
                positions_per_doc=config.positions_per_document,
            )
            rows = len(columns["doc_id"])
            write_shard(path, columns, Sidecar(digest, "base", rows, extraction, git_commit=_git_commit()))


def explain(run: Run) -> None:
    """Write explainer texts and divide the rows by document into data/{av_sft,ar_sft,rl,held_out}.

    Data sets made elsewhere come with both, and are copied there.
    """
    config, seed = run.config, run.config.seed
    if config.data.is_given:
        splits = adopt(config.data.paths, held_out_share=config.corpus.held_out, seed=seed)
        for part in splits.values():
            run.check(part.sidecar)
    else:
        base = load_dataset(run.directory / "data" / "base")
        explainer = PredictiveExplainer(config.explainer, seed=seed, background=base.contexts)
        explained = dataclasses.replace(base, explanations=explainer.explain(base))
        split_N = np.array([split_of(doc_id, config.corpus.fractions, seed) for doc_id in base.doc_ids])
        splits = {split: explained.take(split_N == split) for split in SPLITS}
    for split, part in tqdm(splits.items(), desc="explain", unit="split", dynamic_ncols=True):
        _write_split(run, split, part)


def _write_split(run: Run, split: str, part: ActivationDataset) -> None:
    columns = {
        "activation_vector": part.activations,
        "n_raw_tokens": part.n_raw_tokens,
        "activation_layer": [run.config.model.layer] * len(part),
        "doc_id": part.doc_ids,
        "detokenized_text_truncated": part.contexts,
        "api_explanation": part.explanations,
        **part.extra,
    }
    columns = {name: column for name, column in columns.items() if column is not None}
    stage, path = "av_sft" if split == "held_out" else split, run.split_paths()[split]
    templates = SidecarTemplates(run.config.templates.verbalizer, run.config.templates.reconstructor)
    path.parent.mkdir(parents=True, exist_ok=True)
    sidecar = dataclasses.replace(
        part.sidecar,
        dataset_id=stage_digest(run.config, "explain"),
        stage=stage,
        tokens=run.tokens,
        prompt_templates=templates,
        parent_datasets=(part.sidecar.dataset_id,),
    )
    write_shard(path, stage_columns(stage, columns, templates), sidecar)


def av_sft(run: Run) -> None:
    """Warm-start the AV on explainer texts; its last checkpoint is RL's reference."""
    config, codec = run.config.av_sft, run.codec
    verbalizer, optimizer = codec.verbalizer, config.optimizer.build()
    data, held_out = run.data("av_sft"), run.held_out(run.config.evaluation.monitor_rows)

    def rows(part: ActivationDataset):
        return verbalizer_rows(part, codec.tokenizer, verbalizer.prompt, codec.max_explanation_tokens)

    step = jit_step(
        av_sft_step, verbalizer=verbalizer, optimizer=optimizer, micro_batches=config.micro_batches
    )
    loss = jax.jit(lambda params, batch: sft_loss(verbalizer, params, *jax.tree.leaves(batch)))
    true_rows = rows(held_out)
    order = shuffled(range(len(held_out)), held_out.doc_ids, run.config.seed)

    def mean_loss(params, columns):
        sums = np.zeros(2)
        for batch, real in evaluation_batches(columns, run.config.evaluation.batch_size):
            batch["lengths_B"][real:] = 0  # the rows that fill up the last batch
            sums += np.array(loss(params, shard_batch(VerbalizerBatch(**batch), run.mesh)))
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

    _supervised(
        run,
        "av_sft",
        config,
        "av",
        lambda: TrainState.create(verbalizer.init(run.target.params), optimizer),
        lambda state, batch: step(state, shard_batch(VerbalizerBatch(**batch), run.mesh)),
        rows(data),
        evaluate,
        ("loss", "gap"),
    )


def ar_sft(run: Run) -> None:
    """Warm-start the AR on explainer texts and on the warm-start AV's; its last checkpoint is the frozen judge."""
    config, codec = run.config.ar_sft, run.codec
    optimizer = config.optimizer.build()
    data = run.data("ar_sft")
    texts = _partly_verbalized(run, data, config.verbalized)
    held_out = run.held_out(run.config.evaluation.monitor_rows)
    step = jit_step(
        ar_mse_step,
        reconstructor=codec.reconstructor,
        optimizer=optimizer,
        micro_batches=config.micro_batches,
    )

    def evaluate(states):
        params = states["ar"].params
        texts, activations = held_out.explanations, held_out.activations
        return {"held_out_fve_nrm": run.round_trip.fve_nrm(params, texts, activations, run.moments)}

    _supervised(
        run,
        "ar_sft",
        config,
        "ar",
        lambda: TrainState.create(codec.reconstructor.init(run.target.params), optimizer),
        lambda state, batch: step(state, shard_batch(ReconstructorBatch(**batch), run.mesh)),
        codec.encode(data.activations, texts),
        evaluate,
        ("loss", "held_out_fve_nrm"),
    )


def _partly_verbalized(run: Run, data: ActivationDataset, share: float) -> list[str]:
    """The rows' explainer texts, a share of them replaced by what the warm-start AV writes at temperature 1.

    The AV's texts are kept in data/verbalized. Where it failed, the explainer's text stays.
    """
    texts, path = list(data.explanations), run.directory / "data" / "verbalized" / "verbalized.parquet"
    digest = stage_digest(run.config, "ar_sft")
    chosen = np.random.default_rng(run.config.seed).permutation(len(data))[: round(share * len(data))]
    if not len(chosen):
        return texts
    if not run.is_written(path, digest):
        run.release_target()
        part, key = data.take(chosen), key_for(run.config.seed, "verbalize")
        written = run.round_trip.verbalize(
            run.warm_start_params("av"), part.activations, key, 1.0, desc="verbalize"
        )
        templates = part.sidecar.prompt_templates
        columns = {
            "activation_vector": part.activations,
            "n_raw_tokens": part.n_raw_tokens,
            "activation_layer": [run.config.model.layer] * len(part),
            "doc_id": part.doc_ids,
            "api_explanation": [
                own or explained for own, explained in zip(written, part.explanations, strict=True)
            ],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        sidecar = dataclasses.replace(part.sidecar, dataset_id=digest, stage="ar_sft")
        write_shard(path, stage_columns("ar_sft", columns, templates), sidecar)
    for row, text in zip(chosen, load_dataset(path).explanations, strict=True):
        texts[row] = text
    return texts


def _supervised(
    run: Run,
    stage: str,
    config: WarmStartConfig,
    model: str,
    initial: Callable[[], TrainState],
    step: Callable,
    rows: dict[str, np.ndarray],
    evaluate: Callable,
    shown: tuple[str, ...],
) -> None:
    def first_states():
        states = {model: initial()}
        run.release_target()
        return states

    def one_step(states, batch, index):
        state, metrics = step(states[model], batch)
        return {model: state}, metrics

    run_stage(
        stage,
        config.loop,
        initial=first_states,
        step=one_step,
        batches=training_batches(rows, config.batch_size, run.config.seed),
        evaluate=evaluate,
        checkpoints=run.checkpoints(stage),
        log=run.log,
        mesh=run.mesh,
        shown=shown,
    )


def rl(run: Run) -> None:
    """Joint training from both warm starts; the best checkpoint by the frozen judge is kept."""
    config, codec = run.config.rl, run.codec
    monitor = run.held_out(run.config.evaluation.monitor_rows)
    run.release_target()
    reference, seed = run.warm_start_params("av"), run.config.seed
    first = {"av": reference, "ar": run.warm_start_params("ar")}

    def initial():
        # Called once. Nothing here holds on to the AR's first parameters after that.
        return {
            name: TrainState.create(first.pop(name), optimizer)
            for name, optimizer in optimizers(config).items()
        }

    def evaluate(states):
        key = key_for(seed, "monitor")
        temperature = run.config.evaluation.temperature
        texts = run.round_trip.verbalize(states["av"].params, monitor.activations, key, temperature)
        # The judge is read anew each time: held all along, it would cost as much memory as the AR itself.
        return {
            f"{name}_fve_nrm": run.round_trip.fve_nrm(params(), texts, monitor.activations, run.moments)
            for name, params in (
                ("own", lambda: states["ar"].params),
                ("judge", lambda: run.warm_start_params("ar")),
            )
        }

    rows = {"activations_BD": run.data("rl").activations}
    run_stage(
        "rl",
        config.loop,
        initial=initial,
        step=make_round(config, codec, reference, run.mesh, key_for(seed, "rollouts")),
        batches=training_batches(rows, config.activations, seed),
        evaluate=evaluate,
        checkpoints=run.checkpoints("rl"),
        log=run.log,
        mesh=run.mesh,
        shown=("reward_mean", "kl", "judge_fve_nrm", "own_fve_nrm"),
        best="judge_fve_nrm",
    )


def evaluate(run: Run) -> None:
    """Measure warm start and best RL step on held-out documents; write evaluation.json and examples.jsonl."""
    config = run.config.evaluation
    run.release_target()
    data = run.held_out(config.rows)
    checkpoints = run.checkpoints("rl")
    best = checkpoints.pinned() or checkpoints.latest()
    key = key_for(run.config.seed, "evaluate")
    texts = {}
    for name, stage, step in (("warm start", "av_sft", None), ("after RL", "rl", best)):
        params = run.trained_params(stage, "av", step)
        texts[name] = run.round_trip.verbalize(params, data.activations, key, config.temperature)
        del params
        gc.collect()
    judges = {
        "own": run.trained_params("rl", "ar", best),
        "judge": run.warm_start_params("ar"),
    }
    fit = run.data("ar_sft").take(slice(0, config.rows))
    systems, predictions = evaluate_texts(
        run.round_trip, texts, judges, fit, data, run.moments, config, run.config.seed
    )
    result = {
        "digest": _evaluation_digest(run),
        "run": {
            "name": run.config.name,
            "model": run.lm.name,
            "layer": run.config.model.layer,
            "corpus": data.sidecar.extraction.corpus,
            "machine": machine_class(),
        },
        "settings": dataclasses.asdict(config),
        "mean_is": f"mean of {len(run.training_activations)} training activations",
        "systems": systems,
        "timings": run.timings(),
        "best_step": best,
    }
    _write_examples(run, data, texts["after RL"], predictions["own"])
    _write_json(run.directory / "evaluation.json", result)


def report(run: Run) -> Path:
    """Write report.html."""
    return write_report(run.directory)


def run_stages(run: Run, stages: tuple[str, ...] = tuple(STAGES)) -> None:
    """Run stages in order, skipping what is done and noting how long each took.

    Raises:
      ValueError: the directory holds results of another config; nothing in it is touched then.
    """
    for stage in STAGES:
        is_done(run, stage)
    run.directory.mkdir(parents=True, exist_ok=True)
    save_config(run.config, run.directory / "config.json")
    for stage in stages:
        if is_done(run, stage):
            continue
        started = time.perf_counter()
        _FUNCTIONS[stage](run)
        timings = run.timings()
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - started
        _write_json(run.directory / "timings.json", timings)


_FUNCTIONS = {
    function.__name__: function for function in (extract, explain, av_sft, ar_sft, rl, evaluate, report)
}


def is_done(run: Run, stage: str) -> bool:
    """Whether a stage's result is there.

    Raises:
      ValueError: it is there, but of another config.
    """
    if stage in ("extract", "explain"):
        digest = stage_digest(run.config, "explain")
        return all([run.is_written(path, digest) for path in run.split_paths().values()])
    if stage in ("ar_sft", "av_sft", "rl"):
        return (run.checkpoints(stage).latest() or 0) >= getattr(run.config, stage).loop.steps
    path = run.directory / "evaluation.json"
    if stage == "evaluate" and path.exists():
        return json.loads(path.read_text())["digest"] == _evaluation_digest(run)
    return False


def _evaluation_digest(run: Run) -> str:
    return f"{stage_digest(run.config, 'evaluate')}-{run.config.rl.loop.steps}"


def _check_splits(run: Run, doc_ids: list[str]) -> None:
    counts = dict.fromkeys(SPLITS, 0)
    for doc_id in doc_ids:
        counts[split_of(doc_id, run.config.corpus.fractions, run.config.seed)] += 1
    if empty := [split for split, count in counts.items() if count < 2]:
        raise ValueError(
            f"{len(doc_ids)} documents leave fewer than 2 for the splits {empty}; "
            "use more documents or larger shares (corpus.held_out and its neighbors)"
        )


def _write_examples(run: Run, data: ActivationDataset, texts: list, prediction_ND: np.ndarray) -> None:
    unit_pred = prediction_ND / np.linalg.norm(prediction_ND, axis=1, keepdims=True)
    unit_true = data.activations / np.linalg.norm(data.activations, axis=1, keepdims=True)
    cosine_N = (unit_pred * unit_true).sum(axis=1)
    order = np.random.default_rng(run.config.seed).permutation(len(data))
    chosen = order[: run.config.evaluation.examples]
    # Data sets made elsewhere need not hold what is only for reading along.
    nothing = [""] * len(data)
    contexts, continuations = data.contexts or nothing, data.extra.get("true_continuation", nothing)
    lines = [
        json.dumps(
            {
                "doc_id": data.doc_ids[i],
                "context_tail": contexts[i][-240:],
                "next_tokens": continuations[i],
                "explanation": texts[i],
                "explainer_text": data.explanations[i],
                "cosine": float(cosine_N[i]),
            }
        )
        for i in chosen
    ]
    (run.directory / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


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
