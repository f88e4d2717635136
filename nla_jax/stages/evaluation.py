"""The last two stages: figures on held-out documents, and the report."""

import dataclasses
import json
import os
import platform

import jax
import numpy as np

from nla_jax.config import stage_digest
from nla_jax.data.dataset import ActivationDataset
from nla_jax.evaluation.report import write_report
from nla_jax.evaluation.round_trip import evaluate_texts
from nla_jax.run import Run, key_for
from nla_jax.training.loop import return_freed_memory


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
        return_freed_memory()
    judges = {
        "own": run.trained_params("rl", "ar", best),
        "judge": run.warm_start_params("ar"),
    }
    fit = run.data("ar_sft").take(slice(0, config.rows))
    systems, gains, predictions = evaluate_texts(
        run.round_trip, texts, judges, fit, data, run.moments, config, run.config.seed
    )
    result = {
        "digest": evaluation_digest(run),
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
        "gains": gains,
        "timings": run.timings(),
        "best_step": best,
    }
    if jax.process_index() == 0:
        _write_examples(run, data, texts["after RL"], predictions["own"])
    run.write_json("evaluation.json", result)


def report(run: Run) -> None:
    """Write report.html."""
    if jax.process_index() == 0:
        write_report(run.directory)


def evaluation_digest(run: Run) -> str:
    """Identifies what evaluation.json was made from."""
    return f"{stage_digest(run.config, 'evaluate')}-{run.config.rl.loop.steps}"


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
