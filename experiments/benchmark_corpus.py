"""How fast a corpus is made ready for extraction, and in how much memory, as the number of its documents grows.

Writes a synthetic corpus of 200 words a document (Zipf-distributed), in which one document in twenty repeats an earlier
one in capital letters, and one in ten repeats it with four words changed. Then, in a fresh process for every size, the
library reads it, orders it, removes exact and near duplicates, stores what is left, divides it among splits, and
chooses positions, for which a tokenizer at white space stands in for a model's. Prints seconds, documents a second and
the peak of memory up to the end of each step, and the share of the planted duplicates that were found.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benchmarks.measure import markdown
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nla_jax.data.corpora.config import CorpusConfig
from nla_jax.data.corpora.corpus import corpus_documents
from nla_jax.data.corpora.document_store import CorpusRecord, DocumentStore, write_documents
from nla_jax.data.extraction import ExtractionConfig
from nla_jax.data.positions import Tally, choose_positions
from nla_jax.data.splits import split_of
from nla_jax.process import machine_class

WORDS, AT_ONCE = 200, 10_000


def write_corpus(path: Path, documents: int) -> int:
    """Write a parquet file of documents; returns how many of them repeat an earlier one."""
    rng, vocabulary = np.random.default_rng(0), np.array([f"word{number}" for number in range(50_000)])
    repeats = 0
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        for start in range(0, documents, AT_ONCE):
            size = min(AT_ONCE, documents - start)
            words = vocabulary[np.minimum(rng.zipf(1.2, (size, WORDS)), 50_000) - 1]
            texts = [" ".join(row) for row in words]
            for place in range(1, size):
                kind, original = rng.random(), int(rng.integers(place))
                if kind < 0.05:
                    texts[place] = texts[original].upper()
                elif kind < 0.15:
                    changed = texts[original].split(" ")
                    for index in rng.integers(WORDS, size=4):
                        changed[index] = "changed"
                    texts[place] = " ".join(changed)
                repeats += kind < 0.15
            writer.write_table(pa.table({"text": texts}))
    return repeats


def measure(source: Path, folder: Path) -> list[dict]:
    """Make the corpus in a file ready; a row with seconds, documents and peak memory for each step."""
    rows, config = [], CorpusConfig(str(source), duplicates="near")
    started = time.perf_counter()

    def finish(step: str, documents: int) -> None:
        nonlocal started
        seconds = time.perf_counter() - started
        status = Path("/proc/self/status").read_text().split()
        peak = int(status[status.index("VmHWM:") + 1]) / 1024
        row = {
            "step": step,
            "documents": documents,
            "seconds": seconds,
            "documents a second": documents / seconds,
        }
        rows.append({**row, "peak MiB": peak})
        started = time.perf_counter()

    words = [f"word{number}" for number in range(50_000)]
    words_only = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate([*words, "?"])}, unk_token="?")
    )
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_only, unk_token="?")
    finish("start", 0)
    read = pq.ParquetFile(source).metadata.num_rows
    count, digest = write_documents(folder / "store", corpus_documents(config, seed=0, folder=folder))
    finish("read, order, remove duplicates, store", read)
    store = DocumentStore(folder / "store", CorpusRecord(str(source), count, digest, {}))
    splits = Counter(split_of(document.id, config.fractions, 0) for document in store)
    finish("split", splits.total())
    extraction, tally = ExtractionConfig(), Tally()
    for start in range(0, count, 256):
        choose_positions(store.read(start, min(start + 256, count)), tokenizer, extraction, 0, tally)
    finish("choose positions", tally.documents)
    return rows


def main() -> None:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument(
        "--folder", type=Path, help="where corpora and stores lie; a temporary folder by default"
    )
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder)))
        return
    figures = []
    for documents in args.documents:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            repeats = write_corpus(source := Path(folder) / "documents.parquet", documents)
            command = [sys.executable, __file__, "--measure", str(source), "--folder", folder]
            rows = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        found = (documents - rows[-1]["documents"]) / repeats
        figures += [{"size": documents, **row, "planted duplicates found": found} for row in rows]
    print(f"{machine_class()}\n")
    print(
        markdown(
            list(figures[0]),
            [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in figures],
        )
    )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine_class(), "rows": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
