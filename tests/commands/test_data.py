import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from nla_jax.commands.data import main
from nla_jax.config import CorpusConfig, DataConfig, ExperimentConfig, ModelConfig, save_config
from nla_jax.data.dataset import load_dataset, write_shard
from nla_jax.data.extraction import ExtractionConfig
from nla_jax.data.sharing import sketches
from nla_jax.data.splits import split_of
from nla_jax.data.summary import datasets_at, summarize
from nla_jax.pipeline.extract import extract
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.stages import run_stages

ROWS, WIDTH = 360, 32


def vectors(rows=ROWS, width=WIDTH):
    return np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)


def rows_of_texts(rows=ROWS):
    return [{"text": f"text {i}", "doc": f"d{i // 3}", "context": f"It says {i}"} for i in range(rows)]


@pytest.fixture(scope="module")
def extracted(tiny_model_dir, tmp_path_factory):
    """A run on 24 short documents whose stage extract is done."""
    directory = tmp_path_factory.mktemp("extracted")
    lines = [
        json.dumps({"id": f"doc {i}", "text": f"Number {i}: " + "many words follow here " * 12, "genre": "g"})
        for i in range(24)
    ]
    (directory / "corpus.jsonl").write_text("\n".join(lines))
    corpus = CorpusConfig(str(directory / "corpus.jsonl"), av_sft=0.25, ar_sft=0.25, rl=0.25, held_out=0.25)
    extraction = ExtractionConfig(
        max_tokens=40, min_position=20, positions_per_document=2, length_buckets=1, shard_documents=16
    )
    model = ModelConfig(str(tiny_model_dir), layer=1)
    config = ExperimentConfig("data", model=model, corpus=corpus, extraction=extraction)
    run = Run(config, directory / "run")
    extract(run)
    save_config(config, directory / "run" / "config.json")
    return run


def import_arrays(tmp_path, model, *more, **arrays):
    np.savez(tmp_path / "rows.npz", **arrays)
    columns = ["--vectors-column", "h", "--layer", "1", "--model", str(model)]
    main(["import", str(tmp_path / "rows.npz"), *columns, "-o", str(tmp_path / "out"), *more])


TEXTS = np.array([row["text"] for row in rows_of_texts()])
DOCS = np.array([row["doc"] for row in rows_of_texts()])


def test_imported_rows_are_divided_by_document_and_train(tmp_path, tiny_model_dir, capsys):
    texts = np.where(np.arange(ROWS) % 10 == 0, "", TEXTS)
    h = vectors()
    named = ["--text-column", "z", "--doc-column", "d"]
    import_arrays(tmp_path, tiny_model_dir, *named, h=h, z=texts, d=DOCS, score=np.arange(ROWS))
    splits = {name: load_dataset(path) for name, path in datasets_at(tmp_path / "out").items()}
    assert list(splits) == ["av_sft", "ar_sft", "rl", "held_out"]
    documents = [set(data.doc_ids) for data in splits.values()]
    assert sum(map(len, documents)) == len(set().union(*documents))
    for name, data in splits.items():
        numbers = data.extra["score"]
        np.testing.assert_array_equal(data.activations, h[numbers])
        assert data.doc_ids == DOCS[numbers].tolist()
        if name != "rl":
            assert data.explanations == texts[numbers].tolist()
    # All rows are there but those without a text, which rl alone has.
    kept = sorted(number for data in splits.values() for number in data.extra["score"])
    missing = set(range(ROWS)) - set(kept)
    assert missing and all(texts[number] == "" for number in missing)
    assert f"{(texts == '').sum()} rows have no text" in capsys.readouterr().out

    given = DataConfig(**{name: str(tmp_path / "out" / name) for name in splits})
    config = ExperimentConfig("given", model=ModelConfig(str(tiny_model_dir), layer=1), data=given)
    run = Run(config, tmp_path / "run")
    run_stages(run, ("extract", "explain"))
    written = load_dataset(tmp_path / "run" / "data" / "av_sft")
    assert written.explanations == splits["av_sft"].explanations
    np.testing.assert_array_equal(written.activations, splits["av_sft"].activations)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_texts_in_a_file_beside_an_array(tmp_path, tiny_model_dir, ending):
    np.save(tmp_path / "h.npy", vectors().astype(np.float16))
    rows, columns = rows_of_texts(), ["--doc-column", "doc", "--context-column", "context"]
    lines = {
        "jsonl": [json.dumps(row) for row in rows],
        "csv": ["text,doc,context", *(",".join(row.values()) for row in rows)],
        "txt": [row["text"] for row in rows],
    }[ending]
    (tmp_path / f"texts.{ending}").write_text("\n".join(lines) + "\n")
    named = columns if ending != "txt" else []
    beside = ["--texts", str(tmp_path / f"texts.{ending}"), "--whole", "-o", str(tmp_path / "out")]
    main(["import", str(tmp_path / "h.npy"), "--model", str(tiny_model_dir), "--layer", "1", *named, *beside])
    data = load_dataset(tmp_path / "out")
    assert data.explanations == [row["text"] for row in rows]
    if ending != "txt":
        assert data.doc_ids == [row["doc"] for row in rows]
        assert data.contexts == [row["context"] for row in rows]
        assert data.n_raw_tokens.tolist() == [1, 2, 3] * (ROWS // 3)


def test_parquet_of_any_columns(tmp_path, tiny_model_dir):
    table = pa.table(
        {"v": vectors().tolist(), "t": TEXTS.tolist(), "d": DOCS.tolist(), "n": list(range(ROWS))}
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    names = ["--vectors-column", "v", "--text-column", "t", "--doc-column", "d", "--position-column", "n"]
    place = ["--model", str(tiny_model_dir), "--layer", "1", "--whole", "-o", str(tmp_path / "out")]
    main(["import", str(tmp_path / "rows.parquet"), *names, *place])
    data = load_dataset(tmp_path / "out")
    np.testing.assert_allclose(data.activations, vectors())
    assert data.n_raw_tokens.tolist() == list(range(ROWS)) and data.explanations == TEXTS.tolist()
    with pytest.raises(SystemExit, match="holds a data set already"):
        main(["import", str(tmp_path / "rows.parquet"), *names, *place])


def with_nan():
    h = vectors()
    h[7, 3] = np.nan
    return h


@pytest.mark.parametrize(
    ("arrays", "more", "message"),
    [
        ({"h": vectors(), "z": TEXTS[:-1]}, ["--text-column", "z"], r"360 vectors.*'z': 359"),
        ({"h": with_nan()}, ["--whole"], "row 7 holds NaN"),
        ({"h": vectors()}, ["--text-column", "z"], "no 'z' for the text; it has nothing else"),
        ({"x": vectors()}, ["--whole"], "no 'h' for the vectors; it has x"),
        ({"h": vectors().astype(np.int32)}, ["--whole"], "dtype int32"),
        ({"h": vectors()[0]}, ["--whole"], r"shape \(32,\)"),
        ({"h": vectors(width=16)}, ["--whole"], "16 wide, and the residual stream of .* is 32"),
        ({"h": np.array([["a"], 1], object)}, ["--whole"], "arrays of Python objects"),
        ({"h": vectors()}, [], "needs texts"),
        (
            {"h": vectors(), "d": DOCS, "n": np.zeros(ROWS, int)},
            ["--whole", "--doc-column", "d", "--position-column", "n"],
            "row 1 is another one of document 'd0' at position 0",
        ),
        (
            {"h": vectors(), "z": np.char.add("<explanation>", TEXTS)},
            ["--text-column", "z"],
            "row 0 holds an explanation tag",
        ),
        ({"h": vectors(3), "z": TEXTS[:3]}, ["--text-column", "z"], "too few documents"),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path, tiny_model_dir, arrays, more, message):
    with pytest.raises(SystemExit, match=message):
        import_arrays(tmp_path, tiny_model_dir, *more, **arrays)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_layer_that_the_model_has_not(tmp_path, tiny_model_dir):
    np.save(tmp_path / "h.npy", vectors())
    place = ["--model", str(tiny_model_dir), "--layer", "9", "--whole", "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="9"):
        main(["import", str(tmp_path / "h.npy"), *place])


def test_a_summary_counts_what_there_is(extracted):
    base = load_dataset(extracted.directory / "data" / "base")
    summary = summarize("base", extracted.directory / "data" / "base", samples=5)
    np.testing.assert_allclose(summary.norms, np.linalg.norm(base.activations, axis=1), rtol=1e-6)
    assert summary.rows == len(base) and len(summary.documents) == len(set(base.doc_ids))
    assert summary.counts["genre"] == {"g": len(base)} and len(summary.samples) == 5
    assert summary.with_text == 0
    by_key = {
        (doc, n): text for doc, n, text in zip(base.doc_ids, base.n_raw_tokens, base.contexts, strict=True)
    }
    assert all(by_key[row.doc_id, row.n_raw_tokens] == row.context for row in summary.samples)


def test_inspect_tells_overlaps_and_repeated_texts(tmp_path, extracted, capsys):
    base = load_dataset(extracted.directory / "data" / "base")
    for name, rows in {"av_sft": slice(0, 6), "held_out": slice(4, 10)}.items():
        part = base.take(rows)
        columns = {
            "activation_vector": part.activations,
            "n_raw_tokens": part.n_raw_tokens,
            "activation_layer": [1] * 6,
            "doc_id": part.doc_ids,
            "detokenized_text_truncated": part.contexts,
            "api_explanation": ["<b>the same</b>"] * 5 + ["another"],
        }
        (tmp_path / "data" / name).mkdir(parents=True)
        write_shard(tmp_path / "data" / name / "part.parquet", columns, part.sidecar)
    report = {"writer": "chat", "model": "local:m", "refused": {"too long": 7}}
    (tmp_path / "data" / "texts.json").write_text(json.dumps(report))
    main(["inspect", str(tmp_path), "--html", str(tmp_path / "page.html"), "--verify"])
    printed = capsys.readouterr().out
    assert "av_sft: 1 shards are as they were written" in printed
    (overlap,) = [line for line in printed.splitlines() if line.startswith("av_sft and held_out")]
    # The two rows that both have are of one document.
    assert overlap.split()[3:] == ["1", "2", "2"]
    # Two rows a document: the documents' share is told as it is, and corrected.
    (share,) = [line for line in printed.splitlines() if line.split()[:2] == ["held_out", "document"]]
    assert share.split()[2:4] == ["3", "6"] and 0 < float(share.split()[4]) < 1
    assert any(line.split()[:5] == ["av_sft", "1", "2", "4", "5"] for line in printed.splitlines())
    assert "refused: too long" in printed
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;the same" in page and "<b>the same" not in page and page.count("<svg") == 3
    assert "refused: too long" in page and "Shares of variance" in page and "<script" not in page

    (shard,) = (tmp_path / "data" / "av_sft").glob("*.parquet")
    damaged = bytearray(shard.read_bytes())
    damaged[40] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(SystemExit, match=r"part\.parquet"):
        main(["inspect", str(tmp_path), "--verify"])


def test_shared_with_vectors_it_is_the_same_data_set(tmp_path, extracted):
    main(["share", str(extracted.directory), "-o", str(tmp_path / "shared"), "--license", "cc-by-4.0"])
    base, shared = (load_dataset(p / "base") for p in (extracted.directory / "data", tmp_path / "shared"))
    np.testing.assert_array_equal(shared.activations, base.activations)
    assert (shared.doc_ids, shared.sidecar) == (base.doc_ids, base.sidecar)
    _, head, body = (tmp_path / "shared" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "cc-by-4.0"
    assert yaml.safe_load(head)["configs"] == [{"config_name": "base", "data_files": "base/*.parquet"}]
    assert base.sidecar.extraction.corpus_digest in body and f"| base | base | {len(base)} |" in body


def test_shared_without_vectors_it_is_rebuilt(tmp_path, extracted, capsys):
    shared, out = tmp_path / "shared", tmp_path / "rebuilt"
    main(["share", str(extracted.directory), "-o", str(shared), "--without-vectors"])
    assert all("activation_vector" not in pq.read_schema(file).names for file in shared.rglob("*.parquet"))
    main(["rebuild", str(shared), "-o", str(out)])
    base = load_dataset(extracted.directory / "data" / "base")
    again = load_dataset(out / "base")
    np.testing.assert_allclose(again.activations, base.activations, rtol=1e-4, atol=1e-5)
    assert (again.doc_ids, again.contexts) == (base.doc_ids, base.contexts)
    assert f"{len(base)} of {len(base)} rows agree" in capsys.readouterr().out

    # Another direction of the same norm, another norm, and a document that is gone, are named.
    file = sorted(shared.rglob("*.parquet"))[0]
    table = pq.read_table(file).to_pydict()
    table["vector_sketch"][0] = [-value for value in table["vector_sketch"][0]]
    table["vector_norm"][1] *= 1.1
    table["doc_id"][2] = "gone"
    types = pq.read_schema(file)
    pq.write_table(pa.table(table, schema=types), file)
    with pytest.raises(SystemExit) as stop:
        main(["rebuild", str(shared), "-o", str(out)])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert f"{len(base) - 3} of {len(base)} rows agree" in printed
    problems = ("its direction differs by", "its norm is", "is not there any more")
    for row, problem in enumerate(problems):
        name = f"base: document {table['doc_id'][row]!r} after {table['n_raw_tokens'][row]} tokens: "
        (line,) = [line for line in printed.splitlines() if line.startswith(name)]
        assert problem in line
    assert len(load_dataset(out / "base")) == len(base) - 3


def test_what_cannot_be_recomputed_is_not_shared_without_vectors(tmp_path, extracted):
    base = str(extracted.directory / "data" / "base")
    with pytest.raises(SystemExit, match="not the directory of a run"):
        main(["share", base, "-o", str(tmp_path / "shared"), "--without-vectors"])
    with pytest.raises(SystemExit, match="not the directory|no config.json"):
        main(["rebuild", base, "-o", str(tmp_path / "out")])


def test_sketches_estimate_the_distance_of_directions():
    h = vectors(500, 64)
    near = h + 0.1 * vectors(500, 64)[::-1]
    unit, unit_near = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (h, near))
    distance = np.linalg.norm(unit - unit_near, axis=1)
    estimated = np.sqrt(((sketches(h) - sketches(near)) ** 2).mean(axis=1))
    assert 0.9 < np.sqrt((estimated**2).mean()) / np.sqrt((distance**2).mean()) < 1.1
    np.testing.assert_allclose(sketches(3 * h), sketches(h), atol=1e-6)


CHAT = ["--writer.name", "chat", "--writer.chat.chat.model", "openai:gpt-4.1-mini"]


def test_an_estimate_counts_the_prompts_of_all_rows_that_need_texts(extracted, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    base = load_dataset(extracted.directory / "data" / "base")
    config, rows = extracted.config, len(base)
    splits = [split_of(doc_id, config.corpus.fractions, config.seed) for doc_id in base.doc_ids]
    assert 0 < splits.count("rl") < rows
    main(["estimate", str(extracted.directory), *CHAT])
    printed = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "24, of which 24 were looked at" in printed["documents"]
    assert printed["rows"].split()[-1] == str(rows)
    assert printed["prompts"].split()[1].rstrip(",") == str(rows - splits.count("rl"))
    assert "at most $" in printed["cost"] and "not known" in printed["time"]
    main(["estimate", str(extracted.directory), "--documents", "6", *CHAT])
    scaled = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "24, of which 6 were looked at" in scaled["documents"] and scaled["rows"] == printed["rows"]


def test_an_estimate_of_a_price_of_ones_own(extracted, tmp_path, capsys):
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"openai:gpt-4.1-mini": {"input": 0, "output": 1e6}}))
    main(
        [
            "estimate",
            str(extracted.directory),
            *CHAT,
            "--writer.chat.chat.prices",
            str(prices),
        ]
    )
    printed = capsys.readouterr().out
    (written,) = [line.split()[-1] for line in printed.splitlines() if line.startswith("output tokens")]
    assert f"at most ${int(written.replace(',', '')):,}.00" in printed


def test_the_built_in_writer_costs_nothing(extracted, capsys):
    main(["estimate", str(extracted.directory)])
    assert "asks no chat model, and nothing is sent or paid" in capsys.readouterr().out


def test_an_action_that_there_is_not(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inspekt"])
    assert stop.value.code == 2 and "there is no action 'inspekt'" in capsys.readouterr().err
