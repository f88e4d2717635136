"""Data sets in shards of several row groups: opened, taken from, gone through, and verified."""

import dataclasses
import errno
import json

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest

from nla_jax.data import dataset, shards
from nla_jax.data.dataset import ActivationDataset, load_dataset, write_shard
from nla_jax.data.manifest import Manifest, verify_dataset
from nla_jax.data.sidecar import (
    CorpusSlice,
    Extraction,
    PromptIds,
    Sidecar,
    SidecarTemplates,
    sidecar_path_for,
)
from nla_jax.data.stage_texts import stage_columns
from nla_jax.data.store import open_dataset

WIDTH = 5
TEMPLATES = SidecarTemplates("Explain {injection_char}.", "<text>{explanation}</text>")
SIDECAR = Sidecar(
    "set",
    "av_sft",
    0,
    Extraction("model", WIDTH, 1, "corpus", CorpusSlice(0, 9), 3),
    PromptIds("<m>", 1, 2, 3),
    TEMPLATES,
)
SIZES = (1100, 0, 7, 513)
"""Rows of the shards: three row groups, none, one, and two."""


def columns_of(start: int, rows: int) -> dict:
    """Rows whose columns all tell their number."""
    numbers = np.arange(start, start + rows)
    return {
        "activation_vector": (numbers[:, None] + np.arange(WIDTH) / 8 + 1).astype(np.float32),
        "n_raw_tokens": numbers.tolist(),
        "activation_layer": [1] * rows,
        "doc_id": [f"d{number // 3}" for number in numbers],
        "detokenized_text_truncated": [f"context {number}" for number in numbers],
        "api_explanation": [f"Text {number}." for number in numbers],
        "genre": [f"genre {number % 4}" for number in numbers],
        "next_words": [["a"] * (number % 3) for number in numbers],
    }


@pytest.fixture(params=["float32", "bfloat16"])
def folder(request, tmp_path):
    start = 0
    for number, rows in enumerate(SIZES):
        columns = stage_columns("av_sft", columns_of(start, rows), TEMPLATES)
        about = dataclasses.replace(SIDECAR, row_count=rows, storage=request.param)
        write_shard(tmp_path / f"av_sft-{number:05d}.parquet", columns, about)
        start += rows
    Manifest.of(tmp_path).save(tmp_path)
    return tmp_path


def assert_rows(data: ActivationDataset, numbers: np.ndarray, storage: str) -> None:
    expected = columns_of(0, sum(SIZES))
    vectors = expected["activation_vector"].astype(shards.DTYPES[storage]).astype(np.float32)
    np.testing.assert_array_equal(data.activations, vectors[numbers])
    assert data.activations.dtype == np.float32
    for column, name in (
        (data.doc_ids, "doc_id"),
        (data.n_raw_tokens.tolist(), "n_raw_tokens"),
        (data.contexts, "detokenized_text_truncated"),
        (data.explanations, "api_explanation"),
        (data.extra["genre"], "genre"),
        (data.extra["next_words"], "next_words"),
    ):
        assert column == [expected[name][number] for number in numbers], name
    assert data.sidecar.row_count == len(data) == len(numbers)


def storage_of(folder) -> str:
    return Sidecar.load(sidecar_path_for(folder / "av_sft-00000.parquet")).storage


@pytest.mark.parametrize("has_manifest", [True, False])
def test_rows_are_the_same_however_they_are_read(folder, has_manifest):
    if not has_manifest:
        (folder / "manifest.json").unlink()
    storage, everything = storage_of(folder), np.arange(sum(SIZES))
    stored = open_dataset(folder)
    assert len(stored) == sum(SIZES) and stored.width == WIDTH
    assert_rows(load_dataset(folder), everything, storage)
    assert_rows(stored.read(), everything, storage)
    asked = np.array([1619, 3, 3, 1100, 1106, 511, 512, 0])
    assert_rows(stored.read(asked), asked, storage)
    np.testing.assert_array_equal(stored.activations(asked), stored.read(asked).activations)
    assert stored.explanations(asked) == stored.read(asked).explanations

    chosen = np.arange(5, sum(SIZES), 4)
    taken = stored.take(chosen)
    assert_rows(taken.take(slice(10, 20)).read(), chosen[10:20], storage)
    parts = list(taken.parts(100))
    assert [len(part) for part in parts] == [100] * 4 + [len(chosen) - 400]
    for part, numbers in zip(parts, np.split(chosen, range(100, len(chosen), 100)), strict=True):
        assert_rows(part, numbers, storage)
    columns = zip(*taken.scan("doc_id", "explanation", "no_such"), strict=True)
    doc_ids, texts, nothing = ([value for part in parts for value in part] for parts in columns)
    assert doc_ids == taken.doc_ids == [f"d{number // 3}" for number in chosen]
    assert texts == [f"Text {number}." for number in chosen] and set(nothing) == {None}
    assert stored.chunk_sizes().tolist() == [512, 512, 76, 7, 512, 1]
    assert stored.take([0, 1, 1100]).chunk_sizes().tolist() == [2, 1]
    assert len(stored.take([]).read()) == 0 and list(stored.take([]).parts()) == []
    with pytest.raises(ValueError, match="only in the order of their files"):
        next(stored.take([2, 1]).parts())


def test_vectors_are_mapped_where_they_lie_here_and_decoded_where_others_wrote_them(folder, monkeypatch):
    storage, path = storage_of(folder), folder / "av_sft-00000.parquet"
    (folder / "manifest.json").unlink()
    stored = open_dataset(folder)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "_vectors", lambda *_: pytest.fail("the vectors were decoded"))
        mapped = stored.activations(slice(0, 1100))
    pq.write_table(pq.read_table(path), path, row_group_size=700)
    sidecar = Sidecar.load(sidecar_path_for(path))
    dataclasses.replace(sidecar, file_bytes=None, file_sha256=None).save(sidecar_path_for(path))
    again = open_dataset(folder)
    np.testing.assert_array_equal(again.activations(slice(0, 1100)), mapped)
    assert_rows(again.read(), np.arange(sum(SIZES)), storage)
    assert_rows(load_dataset(folder), np.arange(sum(SIZES)), storage)
    np.testing.assert_array_equal(next(again.parts(1100)).activations, mapped)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_a_data_set_in_a_bucket_is_read_where_it_lies(bucket, storage):
    place = f"{bucket}/set/av_sft-00000.parquet"
    columns = stage_columns("av_sft", columns_of(0, 600), TEMPLATES)
    write_shard(place, columns, dataclasses.replace(SIDECAR, row_count=600, storage=storage))
    Manifest.of(f"{bucket}/set").save(f"{bucket}/set")
    stored = open_dataset(f"{bucket}/set")
    assert_rows(stored.read([599, 0, 512]), np.array([599, 0, 512]), storage)
    assert_rows(load_dataset(f"{bucket}/set"), np.arange(600), storage)
    assert verify_dataset(f"{bucket}/set") == 1


def test_float32_is_what_other_readers_of_parquet_expect_and_bfloat16_is_rounded(folder):
    column = pq.read_table(folder / "av_sft-00000.parquet")["activation_vector"]
    vectors = columns_of(0, SIZES[0])["activation_vector"]
    if storage_of(folder) == "float32":
        assert column.to_pylist() == vectors.tolist()
    else:
        bits = np.frombuffer(column[1000].as_py(), "<u2")
        np.testing.assert_array_equal(bits, vectors[1000].astype(ml_dtypes.bfloat16).view(np.uint16))


def test_activations_that_leave_the_range_of_the_storage_are_refused(tmp_path):
    columns = columns_of(0, 1) | {"activation_vector": np.full((1, WIDTH), 3.4e38, np.float32)}
    about = dataclasses.replace(SIDECAR, row_count=1, stage="base", storage="bfloat16")
    with pytest.raises(ValueError, match="the activation of row 0 is not finite"):
        write_shard(tmp_path / "s.parquet", columns, about)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="unknown storage 'float16'; this version reads float32, bfloat16"):
        dataclasses.replace(SIDECAR, storage="float16")


def test_shards_that_are_missing_or_too_many_are_noticed_when_a_data_set_is_opened(folder):
    path = folder / "av_sft-00002.parquet"
    path.rename(folder / "av_sft-00009.parquet")
    with pytest.raises(
        ValueError,
        match=r"of the 4 shards of .*, 1 are missing, the first is av_sft-00002.parquet and 1 are not in the manifest, "
        r"the first is av_sft-00009.parquet; copy the data set again",
    ):
        open_dataset(folder)
    (folder / "manifest.json").write_text(json.dumps({"kind": "other"}))
    with pytest.raises(
        ValueError, match=r"manifest.json is not the manifest of a data set .*kind is 'other'"
    ):
        open_dataset(folder)


def test_a_changed_bit_is_found_by_verifying_and_a_changed_size_when_rows_are_read(folder):
    assert verify_dataset(folder) == 4
    path = folder / "av_sft-00003.parquet"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(
        ValueError,
        match=r"1 of 4 shards do not have the digest .*: .*00003.parquet; copy them again, or delete",
    ):
        verify_dataset(folder)
    path.write_bytes(whole[:-1])
    stored = open_dataset(folder)
    assert stored.activations([0]).shape == (1, WIDTH)
    with pytest.raises(
        ValueError, match=r"shard .*00003.parquet has \d+ bytes, and had \d+ when it was written"
    ):
        stored.activations([-1])


def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset, "write_table", full)
    about = dataclasses.replace(SIDECAR, row_count=3, stage="base")
    with pytest.raises(
        OSError, match=r"the disk is full and .*new.parquet; free some space .* the same command again"
    ):
        write_shard(folder / "new.parquet", columns_of(0, 3), about)
    assert not list(folder.glob("*new*")) and not list(folder.glob(".*"))
    assert verify_dataset(folder) == 4
