"""The last two stages: figures on held-out documents, and the report."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nla_jax.autoencoder.metrics import normalize
from nla_jax.autoencoder.nla import NLA
from nla_jax.data.dataset import ActivationDataset
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.evaluation.measure import chosen_suites, measure_suites
from nla_jax.evaluation.report import write_report
from nla_jax.evaluation.subject import PLACES, Subject
from nla_jax.files import AnyPath, Place, as_path, write_json, write_text
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.oracle import oracle_is_trained, train_oracle
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.subject import subject_of, subject_of_nla
from nla_jax.pipeline.warm_starts import second_judge, second_judge_is_trained
from nla_jax.process import machine_class
from nla_jax.shipped import git_commit

PROBE_TEXTS = ("A text about arrays that ends in words.", "About nothing. Next words: the, a.")
PROBE_ROWS = 4
"""What the models of an NLA answer to these tells them from others."""


def evaluate(run: Run) -> None:
    """Measure the chosen suites on held-out documents; write evaluation.json, examples.jsonl and evaluation/."""
    config = run.config.evaluation
    run.models.release_target()
    if config.second_judge_steps and not second_judge_is_trained(run):
        second_judge(run)
    if config.oracle_steps and not oracle_is_trained(run):
        train_oracle(run)
    further = {"digest": evaluation_digest(run), "timings": run.timings(), "kept_steps": run.kept_steps()}
    about = _Evaluated(
        run.config.name, run.models.lm.name, run.config.model.layer, run.yardstick.description, config
    )
    _measure(subject_of(run), about, run.directory, _suite_digest(run), further)


def evaluate_nla(nla: NLA, data: ActivationDataset, directory: Place, config: EvaluationConfig) -> None:
    """The same for an NLA that comes without its run, with a report of what was measured.

    Args:
      nla: with its judges; one that came without a training mean is measured against that of half of the documents.
      data: held-out rows; whether the models were trained on them cannot be checked.
      directory: where everything is written; created if need be.
      config: what is measured.

    Raises:
      ValueError: see `subject_of_nla`.
    """
    directory = as_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    subject = subject_of_nla(nla, data, config)
    digest = _nla_digest(nla, subject)
    about = _Evaluated(nla.name, nla.target.name, nla.layer, subject.yardstick.description, config)
    _measure(subject, about, directory, digest, {"digest": digest})
    write_text(directory / "metrics.jsonl", "")
    write_report(directory)


def _nla_digest(nla: NLA, subject: Subject) -> str:
    """Identifies what the figures of an NLA without a run depend on, by what its models answer and not by their paths.

    A directory whose files were exchanged, another AR, judge, target or training mean: each gives another digest.
    """
    config = dataclasses.replace(subject.config, suites=(), chat_model="")
    rebuilt = {name: subject.rebuilt(name, PROBE_TEXTS).tobytes() for name in subject.reconstructors}
    answers = subject.tokens_of(subject.data.activations[:PROBE_ROWS])
    mean = subject.yardstick.normalized_mean_D.tobytes()
    whole = [subject.digest(), answers, rebuilt, mean, nla.target.name, nla.layer, dataclasses.asdict(config)]
    return hashlib.blake2b(repr(whole).encode(), digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Evaluated:
    """What evaluation.json says of the NLA."""

    name: str
    model: str
    layer: int
    measured_against: str
    config: EvaluationConfig


def _measure(
    subject: Subject, about: _Evaluated, directory: AnyPath, digest: str, further: dict[str, Any]
) -> None:
    """Measure the suites and write evaluation.json, which holds the entries of `further` as well."""
    measured = measure_suites(subject, about.config.suites, directory / "evaluation", digest)
    if jax.process_index() == 0:
        _write_examples(subject, directory)
    extraction = subject.data.sidecar.extraction
    description = {
        "name": about.name,
        "model": about.model,
        "layer": about.layer,
        "corpus": extraction.corpus,
        "held-out rows": subject.digest(),
        "config": digest,
        "code": code_version(),
        "machine": machine_class(),
    }
    if extraction.corpus_digest is not None:
        description["corpus documents"] = extraction.corpus_documents
        description["corpus digest"] = extraction.corpus_digest
    result = {
        "run": description,
        "settings": dataclasses.asdict(about.config),
        "mean_is": about.measured_against,
        "suites": measured,
        **further,
    }
    write_json(directory / "evaluation.json", result)


def report(run: Run) -> None:
    """Write report.html."""
    if jax.process_index() == 0:
        write_report(run.directory)


def is_evaluated(run: Run) -> bool:
    """Whether evaluation.json holds the figures of this config and round."""
    path = run.directory / "evaluation.json"
    return path.exists() and json.loads(path.read_text())["digest"] == evaluation_digest(run)


def evaluation_digest(run: Run) -> str:
    """Identifies what evaluation.json was made from."""
    config = run.config.evaluation
    asked = (config.chat_model,) if config.chat_model else ()
    return "-".join([_suite_digest(run), *chosen_suites(config.suites), *asked])


def _suite_digest(run: Run) -> str:
    """Identifies what one suite's figures were made from, whichever others are measured."""
    any_suites = dataclasses.replace(run.config.evaluation, suites=())
    config = dataclasses.replace(run.config, evaluation=any_suites)
    return f"{stage_digest(config, 'evaluate')}-{run.config.rl.loop.steps}"


def _write_examples(subject: Subject, directory: AnyPath) -> None:
    data, texts = subject.data, subject.texts()
    reconstructor = next(iter(subject.reconstructors))
    prediction_ND = subject.rebuilt(reconstructor, texts)
    cosine_N = (normalize(prediction_ND) * normalize(data.activations)).mean(axis=1)
    places = data.extra.get("place", [None] * len(data))
    # Data sets made elsewhere need not hold what is only for reading along.
    nothing = [""] * len(data)
    contexts, continuations = data.contexts or nothing, data.extra.get("true_continuation", nothing)
    lines = [
        json.dumps(
            {
                "doc_id": data.doc_ids[i],
                "place": places[i],
                "context_tail": contexts[i][-240:],
                "next_tokens": continuations[i],
                "explanation": texts[i],
                "explainer_text": (data.explanations or nothing)[i],
                # What could not be read was not rebuilt.
                "cosine": None if texts[i] is None else float(cosine_N[i]),
                "rebuilt_by": reconstructor,
            }
        )
        for i in _example_rows(places, subject.config.examples, subject.seed)
    ]
    write_text(directory / "examples.jsonl", "\n".join(lines) + "\n")


def _example_rows(places: Sequence[str | None], count: int, seed: int) -> list[int]:
    """Rows drawn by a seed, as evenly from all places as these have rows, in the order of `PLACES`."""
    before, drawn = Counter(), []
    for row in np.random.default_rng(seed).permutation(len(places)).tolist():
        drawn.append((before[places[row]], row))
        before[places[row]] += 1
    chosen = [row for _, row in sorted(drawn, key=lambda pair: pair[0])[:count]]
    return sorted(chosen, key=lambda row: (*PLACES, places[row]).index(places[row]))


def code_version() -> str:
    """The version of this library, and its commit where it runs from a checkout."""
    try:
        version = importlib.metadata.version("nla_jax")
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        version = "not installed"
    commit = git_commit()
    return f"{version} ({commit[:12]})" if commit else version
