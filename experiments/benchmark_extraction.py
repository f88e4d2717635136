"""Speed of the stage extract, with its tokenization, decoding and writing, against its forwards alone.

Both run the target over the same documents, in turn and in one process: the stage as `nla stage extract` runs it on
documents that are stored already, and the forwards over batches that are made already, with results that are dropped.
Two thirds of the documents are long texts, and the others short ones, so that batches differ in length.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax

from nla_jax.config import CorpusConfig, load_config
from nla_jax.data.corpora.corpus import load_corpus
from nla_jax.data.extraction import batches, forward
from nla_jax.data.positions import Tally, choose_positions
from nla_jax.pipeline.documents import prepare_documents
from nla_jax.pipeline.extract import extract
from nla_jax.pipeline.run import Run
from nla_jax.process import machine_class, use_compilation_cache
from nla_jax.shipped import find_config


def main() -> None:
    """Read the arguments, write the documents and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="smollm2_135m_cpu")
    parser.add_argument("--model", help="in place of the config's")
    parser.add_argument("--documents", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    use_compilation_cache()
    config = load_config(find_config(arguments.config))
    if arguments.model:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=arguments.model))
    with tempfile.TemporaryDirectory() as folder:
        corpus = CorpusConfig(source=str(write_documents(Path(folder), arguments.documents)))
        measure(Run(dataclasses.replace(config, corpus=corpus), f"{folder}/run"), arguments.repeats)


def write_documents(folder: Path, count: int) -> Path:
    """Texts of the built-in corpus; of every third, a beginning of a length of its own."""
    documents = load_corpus("docstrings", max_documents=count)
    path = folder / "texts.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i, document in enumerate(documents):
            text = document.text if i % 3 else document.text[: 300 + i % 200]
            file.write(json.dumps({"id": document.id, "text": text}) + "\n")
    return path


def measure(run: Run, repeats: int) -> None:
    """Time the two in turn, after one round of each in which programs are compiled, and print a table."""
    config, layers, models = run.config, (run.config.model.layer,), run.models
    store, size = prepare_documents(run), config.extraction.shard_documents
    parts, tokens = [], 0
    for start in range(0, len(store), size):
        documents = store.read(start, min(start + size, len(store)))
        contexts = choose_positions(
            documents, run.models.lm.tokenizer, config.extraction, config.seed, Tally()
        )
        parts += [arrays for _, arrays in batches(contexts, config.extraction)]
        tokens += sum(context.length for context in contexts)

    def forwards() -> None:
        for arrays in parts:
            out = forward(arrays, models.target.params, models.lm_config, layers, config.extraction, run.mesh)
            jax.block_until_ready(out)

    times = {"forwards alone": [], "stage extract": []}
    for _ in range(repeats + 1):
        shutil.rmtree(run.directory / "data" / "base", ignore_errors=True)
        for name, action in (("forwards alone", forwards), ("stage extract", lambda: extract(run))):
            started = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - started)
    best = {name: seconds[1:] for name, seconds in times.items()}
    padded = sum(arrays[0].size for arrays in parts)
    print(
        f"{config.model.path}, {len(store)} documents, {tokens} tokens ({tokens / padded:.0%} of what is computed), "
        f"{machine_class()}"
    )
    print("| | tokens/s, median (range) | of the forwards |\n| --- | --- | --- |")
    base = statistics.median(best["forwards alone"])
    for name, seconds in best.items():
        median = statistics.median(seconds)
        span = f"{tokens / max(seconds):.0f} to {tokens / min(seconds):.0f}"
        print(f"| {name} | {tokens / median:.0f} ({span}) | {base / median:.1%} |")


if __name__ == "__main__":
    main()
