"""Measure what each statement of the descriptive writer is worth: the fve_nrm that an AR loses without it, by place.

The rows are those of a finished run's data. For the whole text, and for each statement left out, texts are written
anew, an AR learns from those of the run's `ar_sft` documents, and rebuilds the activations of held-out documents from
theirs. A figure of one place is measured around the training mean of that place. The command goes on where it was
killed, and a folder of results serves one choice of options.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np

from nla_jax.autoencoder.metrics import fve_nrm_terms
from nla_jax.config import DataConfig, ExperimentConfig, read_config
from nla_jax.data.dataset import ActivationDataset, base_columns, load_dataset, write_shard
from nla_jax.data.writers.config import WriterConfig
from nla_jax.data.writers.descriptive import DescriptiveConfig, DescriptiveWriter, ablations
from nla_jax.data.writers.word_counts import WordCounts
from nla_jax.evaluation.estimates import Ratio
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.stages import run_stages
from nla_jax.process import machine_class
from nla_jax.text_analysis import words

RECONSTRUCTOR_TOKENS = 96
"""Tokens that an AR reads of a text at least."""


def configured(config: ExperimentConfig, args: argparse.Namespace) -> ExperimentConfig:
    """The run's config with an AR warm start of a few steps on the writer's texts alone."""
    loop = dataclasses.replace(
        config.ar_sft.loop, steps=args.steps, evaluate_every=args.steps, checkpoint_every=args.steps
    )
    optimizer = dataclasses.replace(
        config.ar_sft.optimizer,
        decay_steps=args.steps,
        warmup_steps=min(config.ar_sft.optimizer.warmup_steps, args.steps),
    )
    return dataclasses.replace(
        config,
        writer=WriterConfig(),
        ar_sft=dataclasses.replace(config.ar_sft, loop=loop, optimizer=optimizer, verbalized=0.0),
        max_reconstructor_tokens=max(config.max_reconstructor_tokens, RECONSTRUCTOR_TOKENS),
        tracker="",
    )


def rows_of(directory: Path, args: argparse.Namespace) -> tuple[ActivationDataset, ActivationDataset]:
    """The rows that an AR learns from, and those that it rebuilds: of whole documents, as many as are asked for."""
    parts = []
    for split, most in (("ar_sft", args.rows), ("held_out", args.held_out)):
        data = load_dataset(directory / "data" / split)
        if data.contexts is None:
            raise SystemExit(
                f"the rows in {directory / 'data' / split} have no contexts to write about; extract again"
            )
        parts.append(data.take(slice(0, most)))
    return parts[0], parts[1]


def rebuilt(
    config: ExperimentConfig,
    directory: Path,
    training: ActivationDataset,
    held_out: ActivationDataset,
    seed: int,
) -> tuple[Run, np.ndarray]:
    """Train an AR on the training rows' texts; the run, and the held-out activations as it rebuilds them."""
    paths = {name: directory / f"{name}.parquet" for name in ("training", "held_out")}
    directory.mkdir(parents=True, exist_ok=True)
    for path, rows in zip(paths.values(), (training, held_out), strict=True):
        if not path.exists():
            write_shard(path, base_columns(rows), rows.sidecar)
    data = DataConfig(*[str(paths["training"])] * 3, held_out=str(paths["held_out"]))
    run = Run(dataclasses.replace(config, data=data, seed=seed), directory / f"seed_{seed}")
    kept = directory / f"rebuilt_{seed}.npy"
    if kept.exists():
        return run, np.load(kept)
    run_stages(run, ["explain", "ar_sft"])
    rebuilt_ND = run.models.round_trip.reconstruct(run.models.warm_start_params("ar"), held_out.explanations)
    np.save(kept, rebuilt_ND)
    shutil.rmtree(run.directory / "checkpoints")  # Each holds a whole AR.
    return run, rebuilt_ND


def by_place(run: Run, rebuilt_SND: np.ndarray, held_out: ActivationDataset) -> dict[str, Ratio]:
    """The `fve_nrm` of all held-out rows and of those of each place, of the mean error over ARs."""
    place_N = np.array(held_out.extra.get("place") or [None] * len(held_out), object)
    groups = {"all": (np.arange(len(held_out)), run.yardstick.normalized_mean_D)}
    for place in sorted({place for place in place_N if place}):
        groups[place] = np.flatnonzero(place_N == place), run.yardstick.at(place).normalized_mean_D
    ratios = {}
    for name, (rows, mean_D) in groups.items():
        terms = [
            fve_nrm_terms(rebuilt_ND[rows], held_out.activations[rows], mean_D) for rebuilt_ND in rebuilt_SND
        ]
        ratios[name] = Ratio.explained(*np.mean(terms, axis=0), [held_out.doc_ids[row] for row in rows])
    return ratios


def markdown(table: dict) -> str:
    """The table as it stands in the documentation: the whole text's figures, then what each change takes away."""
    lines = [
        f"| texts | words | {' | '.join(table['places'])} |",
        "| --- " * (2 + len(table["places"])) + "|",
    ]
    for name, line in table["texts"].items():
        cells = [
            f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
            for cell in line["fve_nrm"].values()
        ]
        lines.append(f"| {name} | {line['words']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, compare the texts, and write figures.json and figures.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run", type=Path, help="directory of a run whose data/ar_sft and data/held_out are there"
    )
    parser.add_argument("directory", type=Path, help="where everything goes that is computed")
    parser.add_argument("--steps", type=int, default=120, help="updates of each AR")
    parser.add_argument("--rows", type=int, default=2000, help="most rows that an AR learns from")
    parser.add_argument("--held-out", type=int, default=600, help="most rows that it rebuilds")
    parser.add_argument("--seeds", type=int, default=1, help="ARs for each kind of text")
    parser.add_argument("--alone", action="store_true", help="also train on each statement by itself")
    args = parser.parse_args()
    config = read_config(args.run / "config.json")
    training, held_out = rows_of(args.run, args)
    counts = WordCounts(training.contexts, words)
    written = config.writer.descriptive if config.writer.name == "descriptive" else DescriptiveConfig()
    table = {"machine": machine_class(), "steps": args.steps, "rows": len(training), "texts": {}}
    whole: dict[str, Ratio] = {}
    for name, options in ablations(written, alone=args.alone).items():
        writer = DescriptiveWriter(options, seed=config.seed, words=counts)
        parts = []
        for rows in (training, held_out):
            # A row without the one statement that is left has a text that says so.
            texts = [text or "Nothing." for text in writer.explain(rows)]
            parts.append(dataclasses.replace(rows, explanations=texts))
        folder = args.directory / name.replace(" ", "_")
        done = [rebuilt(configured(config, args), folder, *parts, seed) for seed in range(args.seeds)]
        ratios = by_place(done[0][0], np.stack([rebuilt_ND for _, rebuilt_ND in done]), held_out)
        whole = whole or ratios
        table["places"] = [*ratios]
        table["texts"][name] = {
            "fve_nrm": {
                place: dataclasses.asdict(ratio.estimate() if name == "all" else ratio.over(whole[place]))
                for place, ratio in ratios.items()
            },
            "words": float(np.mean([len(words(text)) for text in parts[1].explanations])),
            "example": parts[1].explanations[0],
        }
        (args.directory / "figures.json").write_text(json.dumps(table, indent=1))
        (args.directory / "figures.md").write_text(markdown(table) + "\n")
    print(json.dumps(table, indent=1))
    print(
        f"\n{markdown(table)}\n\nThe first line is the fve_nrm of the whole text, the others what is added to it."
    )


if __name__ == "__main__":
    main()
