import gzip
import json
import sys
import types
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bucket import Bucket

from nla_jax.data.corpora import keyed_order
from nla_jax.data.corpora.config import CorpusConfig
from nla_jax.data.corpora.corpus import corpus_documents, corpus_state, load_corpus, parse_hub_source
from nla_jax.data.corpora.documents import Document, documents_digest


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def by_id(documents):
    return {document.id: document for document in documents}


def test_text_files_are_named_by_their_path_and_their_folder_is_the_genre(tmp_path):
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "a.txt").write_text("first\n")
    (tmp_path / "news" / "b.txt").write_text("  \n")
    (tmp_path / "notes.md").write_text("not read")
    expected = [Document("news/a.txt", "first", "news")]
    assert load_corpus(str(tmp_path)) == expected
    assert load_corpus(str(tmp_path / "news" / "a.txt")) == [Document("a.txt", "first", "news")]


def test_rows_of_jsonl_and_parquet(tmp_path):
    rows = [{"text": "one\u2028line", "id": "x", "genre": "news"}, {"text": "two"}, {"text": " "}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    pq.write_table(pa.table({"text": ["three"], "id": [5], "other": [0]}), tmp_path / "more.parquet")
    documents = by_id(load_corpus(str(tmp_path)))
    assert documents.pop("x") == Document("x", "one\u2028line", "news")
    assert documents.pop("5") == Document("5", "three", "more")
    ((_, unnamed),) = documents.items()
    assert (unnamed.text, unnamed.genre) == ("two", "rows")


def test_a_cut_keeps_the_same_documents_whatever_the_order_and_file_names(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(40)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    a, b = (load_corpus(str(tmp_path / name), max_documents=10, seed=2) for name in ("a.jsonl", "b.jsonl"))
    assert [d.text for d in a] == [d.text for d in b]
    whole = load_corpus(str(tmp_path / "a.jsonl"), seed=2)
    assert (len(whole), whole[:10]) == (40, a)
    assert {d.text for d in load_corpus(str(tmp_path / "a.jsonl"), max_documents=10, seed=3)} != {
        d.text for d in a
    }


def test_the_choice_is_that_of_earlier_versions(tmp_path):
    """The digest is that of the version before corpora were streams, when they were sorted in memory."""
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(40)])
    documents = load_corpus(str(tmp_path / "a.jsonl"), max_documents=10, seed=2)
    assert [d.text for d in documents[:3]] == ["text 39", "text 28", "text 35"]
    assert documents_digest(documents) == "02eef2abac0541d6"


def test_a_repeated_row_is_kept_once(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "same"}, {"text": "same"}, {"text": "same", "id": "named"}])
    assert sorted(d.text for d in load_corpus(str(tmp_path / "a.jsonl"))) == ["same", "same"]


def compressed(codec, *texts):
    """The texts in a frame each, one after the other, as tools that append write them."""
    return b"".join(pa.Codec(codec).compress(text.encode(), asbytes=True) for text in texts)


def test_files_are_read_compressed_and_however_their_endings_are_written(tmp_path):
    lines = ['{"text": "one"}\n', '{"text": "two"}\n']
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(gzip.compress(line.encode()) for line in lines))
    (tmp_path / "b.jsonl.zst").write_bytes(compressed("zstd", *lines))
    (tmp_path / "c.JSONL").write_text(lines[0])
    (tmp_path / "d.ndjson").write_text(lines[0])
    (tmp_path / "e.json").write_text(' [{"text": "one"},\n {"text": "two"}]')
    (tmp_path / "f.json").write_text("".join(lines))  # Rows a line, as c4 calls them.
    (tmp_path / "g.TXT.GZ").write_bytes(gzip.compress(b"three\r\nfour"))
    expected = {
        "a.jsonl.gz": [("a", "one"), ("a", "two")],
        "b.jsonl.zst": [("b", "one"), ("b", "two")],
        "c.JSONL": [("c", "one")],
        "d.ndjson": [("d", "one")],
        "e.json": [("e", "one"), ("e", "two")],
        "f.json": [("f", "one"), ("f", "two")],
        "g.TXT.GZ": [(tmp_path.name, "three\nfour")],
    }
    for name, documents in expected.items():
        found = load_corpus(str(tmp_path / name))
        assert sorted((d.genre, d.text) for d in found) == documents, name
    assert by_id(load_corpus(str(tmp_path)))["g.TXT.GZ"].text == "three\nfour"


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n', encoding="utf-8-sig")
    (tmp_path / "b.json").write_text('[{"text": "two"}]', encoding="utf-8-sig")
    (tmp_path / "c.txt").write_text("three", encoding="utf-8-sig")
    assert sorted(d.text for d in load_corpus(str(tmp_path))) == ["one", "three", "two"]


def test_what_is_left_out_or_changed_is_counted_in_one_warning(tmp_path, capsys):
    rows = [
        r'{"text": "a"}',
        '{"text": null}',
        '{"text": " "}',
        r'{"text": "b\ud83d c\u0000", "id": "x\udc00"}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("._rows.jsonl", "notes.md", "page.html", "table.csv"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "old.jsonl").write_text('{"text": "hidden"}')
    documents = by_id(load_corpus(str(tmp_path)))
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {tmp_path}: "
        "files in the folder that were not read (._rows.jsonl, .cache/old.jsonl, notes.md, ...): 5; "
        "files without text, left out: 1; rows without text, left out: 2; "
        "texts with halves of surrogate pairs, now U+FFFD: 1"
    ]
    assert sorted(d.text for d in documents.values()) == ["a", "b\ufffd c\0"]
    assert "x\ufffd" in documents
    (tmp_path / "clean.jsonl").write_text('{"text": "a"}')
    load_corpus(str(tmp_path / "clean.jsonl"))
    assert not capsys.readouterr().err


def test_ids_and_genres_that_are_numbers_become_texts(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "id": 7, "genre": 0}, {"text": "b", "genre": ""}])
    documents = {d.text: d for d in load_corpus(str(tmp_path))}
    assert documents["a"] == Document("7", "a", "0")
    assert documents["b"].genre == "rows"


def test_the_text_may_have_another_field(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"content": "a"}])
    pq.write_table(pa.table({"content": ["b"], "title": ["t"]}), tmp_path / "more.parquet")
    assert sorted(d.text for d in load_corpus(str(tmp_path), field="content")) == ["a", "b"]
    with pytest.raises(
        ValueError,
        match=r"more.parquet: there is no field 'text'; found content, title: name .* with corpus.field",
    ):
        load_corpus(str(tmp_path))


def test_a_corpus_in_a_bucket(bucket):
    Bucket.put_object("bucket/texts/news/a.txt", b"first")
    Bucket.put_object("bucket/texts/rows.jsonl.gz", gzip.compress(b'{"text": "second", "id": 1}'))
    pq.write_table(pa.table({"text": ["third"], "id": [2]}), buffer := pa.BufferOutputStream())
    Bucket.put_object("bucket/texts/rows.parquet", buffer.getvalue().to_pybytes())
    documents = by_id(load_corpus(f"{bucket}/texts"))
    assert {name: (d.text, d.genre) for name, d in documents.items()} == {
        "news/a.txt": ("first", "news"),
        "1": ("second", "rows"),
        "2": ("third", "rows"),
    }
    assert set(corpus_state(f"{bucket}/texts")) == {"news/a.txt", "rows.jsonl.gz", "rows.parquet"}


def test_the_digest_tells_ids_texts_genres_and_their_order():
    one, other = Document("a", "bc", "d"), Document("e", "f", "g")
    digest = documents_digest([one, other])
    assert documents_digest([Document("a", "bc", "d"), other]) == digest
    others = [[other, one], [one], [Document("ab", "c", "d"), other], [Document("a", "b", "cd"), other]]
    assert digest not in map(documents_digest, others)


def test_the_state_of_a_corpus_changes_with_its_files(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "notes.md").write_text("not read")
    before = corpus_state(str(tmp_path))
    assert list(before) == ["a.jsonl"] and before == corpus_state(str(tmp_path))
    (tmp_path / "notes.md").write_text("still not read")
    assert corpus_state(str(tmp_path)) == before
    write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}])
    assert corpus_state(str(tmp_path)) != before
    assert corpus_state(str(tmp_path / "moved")) is None and corpus_state("hf:some/set") == {}
    assert "numpy" in corpus_state("docstrings") and "Python" in corpus_state("docstrings")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no documents with text"),
        ([{"text": ""}], "no documents with text"),
        (
            [{"text": "a"}, {"body": "b"}],
            r"rows.jsonl, line 2: there is no field 'text'; found body: name the",
        ),
        ([{"text": 3}], "line 1: the field 'text' holds a value of type int, expected a string"),
        (["bare"], "line 1: this is of type str, expected an object with a field 'text'"),
        (
            [{"text": "a", "id": 1}, {"text": "b", "id": 1}],
            "two different texts have the id '1'; make the ids",
        ),
    ],
)
def test_bad_rows(tmp_path, rows, message):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_corpus(str(tmp_path / "rows.jsonl"))


def test_bad_files(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing more")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "no_text.parquet")
    (tmp_path / "page.html").write_text("<p>")
    (tmp_path / "rows.parquet.gz").write_bytes(b"")
    whole = "".join(f'{{"text": "{i * 7919}"}}\n' for i in range(1000))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(whole.encode())[:-100])
    (tmp_path / "cut.txt.zst").write_bytes(compressed("zstd", whole)[:-100])
    (tmp_path / "one_object.json").write_text('{\n "version": 1\n}')
    (tmp_path / "empty").mkdir()
    for name, message in {
        "bad.jsonl": r"bad.jsonl, line 2: not a JSON object",
        "bad.txt": r"bad.txt: not UTF-8 text .* convert it to UTF-8",
        "bad.parquet": r"bad.parquet: not a readable parquet file .* copy or write it again",
        "no_text.parquet": "no_text.parquet: there is no field 'text'; found body",
        "page.html": r"unknown corpus format '.html'; expected .txt, .jsonl",
        "rows.parquet.gz": r"unknown corpus format '.parquet.gz'",
        "cut.jsonl.gz": r"cut.jsonl.gz: cannot be read .* copy or write it again",
        "cut.txt.zst": r"cut.txt.zst: cannot be read .* copy or write it again",
        "one_object.json": r"one_object.json, line 1: not a JSON object.* Take files that hold no texts out of the",
        "empty": "no documents with text",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_corpus(str(tmp_path / name))
    with pytest.raises(
        FileNotFoundError, match=r"'nowhere' does not exist; give docstrings, packages, requests, hf:"
    ):
        load_corpus("nowhere")
    with pytest.raises(ValueError, match="max_documents=0; expected a positive number"):
        load_corpus("docstrings", max_documents=0)


class FakeRows:
    """A thousand rows, of which it is counted how many are read."""

    def __init__(self, package):
        self.package = package

    def shuffle(self, *, seed, buffer_size):
        self.package.shuffled.append((seed, buffer_size))
        return self

    def __iter__(self):
        for number in range(1000):
            self.package.read += 1
            yield {"text": f"text {number}", "body": f"body {number}", "id": number}


class FakeDatasets(types.SimpleNamespace):
    """Stands in for the package: a data set with configurations `small` and `large` and the splits train and test."""

    def __init__(self):
        super().__init__(asked=[], shuffled=[], read=0)

    def load_dataset(self, path, name=None, *, split, streaming):
        self.asked.append((path, name, split, streaming))
        if split.partition("[")[0] not in ("train", "test"):
            raise ValueError(f'Unknown split "{split}". Should be one of ["train", "test"].')
        return FakeRows(self)

    def get_dataset_config_names(self, path):
        return ["small", "large"]


@pytest.fixture
def datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", fake := FakeDatasets())
    return fake


def test_hugging_face_sources(datasets):
    documents = by_id(load_corpus("hf:some/set"))
    assert len(documents) == 1000 and documents["3"] == Document("3", "text 3", "some/set")
    for rest in (":test", ":large:test", ":train[:1%]", ":large:train[10:20]+test[:5]"):
        load_corpus(f"hf:some/set{rest}")
    assert datasets.asked == [
        ("some/set", None, "train", True),
        ("some/set", None, "test", True),
        ("some/set", "large", "test", True),
        ("some/set", None, "train[:1%]", False),
        ("some/set", "large", "train[10:20]+test[:5]", False),
    ]
    assert load_corpus("hf:some/set", field="body", max_documents=1)[0].text.startswith("body")


def test_a_stream_ends_when_there_are_enough_documents(datasets):
    documents = load_corpus("hf:some/set:large:train", max_documents=5, seed=1)
    assert datasets.asked == [("some/set", "large", "train", True)]
    assert datasets.shuffled == [(1, 10_000)]
    assert datasets.read == 5 and [d.id for d in documents] == ["0", "1", "2", "3", "4"]
    # A part of a split cannot be streamed.
    assert len(load_corpus("hf:some/set:train[:1%]", max_documents=5)) == 5
    assert datasets.asked[-1] == ("some/set", None, "train[:1%]", False)


def test_hugging_face_sources_that_cannot_be_loaded_say_what_to_write(datasets):
    with pytest.raises(
        ValueError,
        match=r"'hf:some/set:large' cannot be loaded: Unknown split .* write hf:some/set:large:SPLIT",
    ):
        load_corpus("hf:some/set:large")
    with pytest.raises(
        ValueError, match=r"Unknown split \"valid\".*; write hf:NAME\[:CONFIG\]\[:SPLIT\] with a"
    ):
        load_corpus("hf:some/set:valid")
    for wrong in ("hf:", "hf:a:b:c:d", "hf:a::train", "hf:a:"):
        with pytest.raises(
            ValueError,
            match=r"is not of the form hf:NAME\[:CONFIG\]\[:SPLIT\] or hf:ORG/NAME/CONFIG\[:SPLIT\]; for",
        ):
            parse_hub_source(wrong)


def test_hugging_face_source_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"'hf:x' needs the optional package `datasets`; run `pip install datasets`",
    ):
        load_corpus("hf:x")


def test_a_configuration_may_follow_the_name_after_a_slash():
    assert parse_hub_source("hf:ORG/NAME/CONFIG") == ("ORG/NAME", "CONFIG", "train")
    assert parse_hub_source("hf:ORG/NAME/CONFIG:test") == ("ORG/NAME", "CONFIG", "test")
    assert parse_hub_source("hf:/a/folder") == ("/a/folder", None, "train")
    with pytest.raises(ValueError, match="is not of the form"):
        parse_hub_source("hf:ORG/NAME/CONFIG:OTHER:test")


@pytest.fixture
def local_data_set(tmp_path):
    """A source that the package `datasets` itself reads, from a folder here; 200 rows in two files."""
    (tmp_path / "set").mkdir()
    for part in range(2):
        rows = [{"text": f"text {100 * part + i}", "id": 100 * part + i} for i in range(100)]
        write_jsonl(tmp_path / "set" / f"{part}.jsonl", rows)
    return f"hf:{tmp_path / 'set'}"


def streamed_ids(source, **fields):
    return [int(d.id) for d in corpus_documents(CorpusConfig(source, **fields), seed=0)]


def test_a_stream_is_shuffled_by_the_seed_and_a_smaller_choice_is_a_prefix(local_data_set):
    config = CorpusConfig(local_data_set, shuffle_buffer=50)
    order, other = ([int(d.id) for d in corpus_documents(config, seed=seed)] for seed in (0, 1))
    assert sorted(order) == sorted(other) == list(range(200)) and order != other
    assert streamed_ids(local_data_set, shuffle_buffer=50) == order
    assert streamed_ids(local_data_set, shuffle_buffer=50, max_documents=30) == order[:30]
    assert streamed_ids(local_data_set, shuffle_buffer=0) == list(range(200))


def test_errors_of_the_package_itself_say_what_to_do(local_data_set):
    for rest, message in (
        (":large:train", r"BuilderConfig 'large' not found.*; write hf:NAME"),
        (":valid", r"valid.*; write hf:NAME\[:CONFIG\]\[:SPLIT\] with a"),
        ("_missing", r"set_missing' cannot be loaded: .*; look whether the name is right and the hub can be"),
    ):
        with pytest.raises(ValueError, match=message):
            load_corpus(local_data_set + rest)


def test_a_stream_that_breaks_off_says_where(datasets, monkeypatch):
    def broken(rows):
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(FakeRows, "__iter__", broken)
    with pytest.raises(
        ValueError, match=r"broke off after 1 rows: reset by peer; run the same command again"
    ):
        load_corpus("hf:some/set")


def write_numbered(path, word, count, **fields):
    write_jsonl(path, [{"text": f"{word} {i}", "id": i, **fields} for i in range(count)])
    return str(path)


def test_sources_are_mixed_by_their_weights_at_every_point(tmp_path):
    a, b = (write_numbered(tmp_path / f"{name}.jsonl", name, 100) for name in "ab")
    config = CorpusConfig(sources=(a, b), weights=(3.0, 1.0), max_documents=80)
    documents = list(corpus_documents(config, seed=0))
    for count in range(1, 81):
        shares = [document.genre for document in documents[:count]]
        assert abs(shares.count("a") - 0.75 * count) < 1
    assert {document.id for document in documents if document.genre == "a"} < {f"{a}/{i}" for i in range(100)}
    shorter = CorpusConfig(sources=(a, b), weights=(3.0, 1.0), max_documents=20)
    assert list(corpus_documents(shorter, seed=0)) == documents[:20]


def test_a_mixture_ends_with_its_first_source(tmp_path, capsys):
    a = write_numbered(tmp_path / "a.jsonl", "a", 5)
    b = write_numbered(tmp_path / "b.jsonl", "b", 100)
    counts = Counter()
    documents = list(
        corpus_documents(CorpusConfig(sources=(a, b), weights=(1.0, 3.0)), seed=0, sources=counts)
    )
    assert counts[a] == 5 and len(documents) == counts.total() <= 22
    assert (
        f"documents taken before {a} ended, and with it the mixture: {len(documents)}"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "a", "sources": ("b",)}, r"corpus.source is 'a' and corpus.sources are given as well"),
        ({"sources": ("a", "a")}, r"names a source twice: a, a"),
        ({"sources": ("a", "b"), "weights": (1.0,)}, r"corpus.weights has 1 values for 2 sources"),
        (
            {"sources": ("a", "b"), "weights": (1.0, 0.0)},
            r"corpus.weights are \(1.0, 0.0\); expected positive",
        ),
        ({"weights": (1.0,)}, r"corpus.weights has 1 values for 0 sources"),
        ({"shuffle_buffer": -1}, r"corpus.shuffle_buffer is -1, expected at least 0"),
        (
            {"min_characters": 5, "max_characters": 4},
            r"corpus.max_characters is 4; expected at least min_char",
        ),
    ],
)
def test_configs_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        CorpusConfig(**fields)


def test_duplicates_are_removed_whatever_the_order_of_files(tmp_path, capsys):
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(1000, size=80))) for _ in range(20)]
    near = [text.replace(text.split()[40], "changed", 1) for text in texts[:8]]
    rows = [{"id": i, "text": text} for i, text in enumerate([*texts, *near, *map(str.upper, texts[:4])])]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    kept = {}
    for duplicates in ("same_id", "exact", "near"):
        kept[duplicates], again = (
            [
                d.id
                for d in corpus_documents(CorpusConfig(str(tmp_path / name), duplicates=duplicates), seed=1)
            ]
            for name in ("a.jsonl", "b.jsonl")
        )
        assert kept[duplicates] == again
        few = CorpusConfig(str(tmp_path / "a.jsonl"), duplicates=duplicates, max_documents=7)
        assert [d.id for d in corpus_documents(few, seed=1)] == again[:7]
    assert {name: len(ids) for name, ids in kept.items()} == {"same_id": 32, "exact": 28, "near": 20}
    assert "near duplicates of other documents, left out: 12" in capsys.readouterr().err


def test_documents_are_filtered_by_length_and_language(tmp_path, capsys):
    english = "The cat sat on the mat and looked at the birds in the garden. "
    german = "Die Katze saß auf der Matte und sah den Vögeln im Garten lange zu. "
    rows = [
        english,
        german,
        english * 9,
        "The cat.",
        "Le chat dort sur le tapis pendant que les oiseaux chantent dehors.",
    ]
    write_jsonl(tmp_path / "a.jsonl", [{"id": i, "text": text} for i, text in enumerate(rows)])
    config = CorpusConfig(
        str(tmp_path / "a.jsonl"), min_characters=20, max_characters=200, languages=("en", "de")
    )
    assert sorted(d.id for d in corpus_documents(config, seed=0)) == ["0", "1"]
    line = capsys.readouterr().err
    for notice in ("fewer than 20 characters", "more than 200 characters", "in other languages"):
        assert f"{notice}, left out: 1" in line
    unknown = CorpusConfig(config.source, languages=("en", "English"))
    with pytest.raises(
        ValueError, match=r"corpus.languages names English; the languages that can be told are .*, en,"
    ):
        list(corpus_documents(unknown, seed=0))


def test_a_language_filter_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    source = write_numbered(tmp_path / "a.jsonl", "a", 2)
    with pytest.raises(ModuleNotFoundError, match=r"`py3langid`; run `pip install py3langid`"):
        list(corpus_documents(CorpusConfig(source, languages=("xx",)), seed=0))


def test_chats_of_the_target_need_a_run():
    with pytest.raises(ValueError, match="'self:builtin': only a run can let its target LM write chats"):
        load_corpus("self:builtin")


def test_a_limited_choice_holds_few_documents_on_disk_and_the_same_as_all(tmp_path, monkeypatch):
    monkeypatch.setattr(keyed_order, "KEYS_AT_ONCE", 10)
    documents = [Document(str(i % 900), f"text {i % 900}", "g") for i in range(1000)]
    whole = list(keyed_order.in_keyed_order(documents, seed=0, folder=tmp_path))
    few = list(keyed_order.in_keyed_order(documents, seed=0, folder=tmp_path, limit=20))
    first, of_few = (list(dict.fromkeys(d.id for d in part))[:20] for part in (whole, few))
    assert len(whole) == 1000 and first == of_few
    assert len(few) < 200
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_on_disk_when_a_reader_stops(tmp_path):
    source = write_numbered(tmp_path / "a.jsonl", "a", 9)
    (folder := tmp_path / "work").mkdir()
    stream = corpus_documents(CorpusConfig(source, duplicates="exact"), seed=0, folder=folder)
    next(stream)
    assert list(folder.iterdir())
    stream.close()
    assert not list(folder.iterdir())
