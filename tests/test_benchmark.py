"""The benchmark command on a tiny model: every row is there, and nothing is timed that does not agree."""

import json
import math
import sys
from pathlib import Path

import jax
import pytest
from tiny_model import write_tiny_model

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import benchmark
from benchmarks import measure, setting, torch_side


@pytest.fixture(autouse=True)
def quick_compilation():
    """Nothing here runs long enough to be worth optimizing."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Its head is its own and small: a tied one would make all samples of a group the same."""
    shape = {"d_model": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "d_ff": 32}
    return write_tiny_model(tmp_path_factory.mktemp("model"), **shape, tie=False)


def run(monkeypatch, capsys, model: Path, *options: str) -> str:
    arguments = ["benchmark.py", "--model", str(model), "--tiny", "--repeats", "2", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark.main()
    return capsys.readouterr().out


def columns(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("|")
    ]


def test_all_rows(model, monkeypatch, capsys, tmp_path):
    out = run(monkeypatch, capsys, model, "--dtypes", "float32", "--json", str(tmp_path / "result.json"))
    found = columns(out)
    assert found[0][:4] == ["ratio", "row", "dtype", "ours"]
    rows = [line[1] for line in found[2 : found.index(next(x for x in found if x[0] == "what"))]]
    limits = ["limits: decode", "limits: ar_step", "limits: av_step"]
    assert rows == ["extraction", "generation", "ar_step", "av_step", "round", *limits]
    result = json.loads((tmp_path / "result.json").read_text())
    for line, record in zip(found[2:], result["comparisons"], strict=False):
        ours, theirs = record["rates"]
        assert len(record["ours"]) == len(record["theirs"]) == 2
        assert float(line[0]) == pytest.approx(ours / theirs, abs=0.006)
        if not record["row"].startswith("limits"):
            assert record["agreement"] and max(record["agreement"].values()) < 1e-3
    assert [(line["what"], line["axis"]) for line in result["growth"]] == [
        *(("generation", "activations"), ("policy update", "activations")),
    ]
    for line in result["growth"]:
        small, large = line["temp_bytes"]
        assert 0 < small < large


def test_exponent():
    assert measure.exponent([1, 2, 4], [5.0, 20.0, 80.0]) == pytest.approx(2)
    assert math.isnan(measure.exponent([1, 2], [0, 1]))


@pytest.mark.parametrize("row", ["extraction", "generation", "ar_step", "av_step", "round"])
def test_planted_disagreement(row, model, monkeypatch, capsys):
    load = torch_side.TorchSide.load

    def wrong(side, *, master):
        loaded = load(side, master=master)
        loaded.model.layers[0].mlp.down_proj.weight.data *= 1.1
        return loaded

    monkeypatch.setattr(torch_side.TorchSide, "load", wrong)
    with pytest.raises(
        SystemExit, match=f"^error: {row}: .* differs from torch's by .*; .* nothing was timed"
    ):
        run(monkeypatch, capsys, model, "--dtypes", "float32", "--rows", row)
    assert "|" not in capsys.readouterr().out


def test_vacuous_agreement():
    with pytest.raises(measure.Disagreement, match="row: loss is zero or not a number in torch"):
        measure.agree("row", {"loss": (0.0, 0.0, 1e-3)})
    with pytest.raises(measure.Disagreement, match="row: loss differs from torch's by nan"):
        measure.agree("row", {"loss": (math.nan, 1.0, 1e-3)})


def test_bfloat16(model, monkeypatch, capsys):
    out = run(monkeypatch, capsys, model, "--dtypes", "bfloat16", "--rows", "extraction", "ar_step")
    assert [line[1:3] for line in columns(out)[2:]] == [["extraction", "bfloat16"], ["ar_step", "bfloat16"]]


def test_without_torch(model, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "torch", None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[parity\]'"):
        run(monkeypatch, capsys, model)


def test_model_that_does_not_fit(model, monkeypatch, capsys):
    monkeypatch.setattr(setting.os, "sysconf", lambda name: 100)
    out = run(monkeypatch, capsys, model, "--dtypes", "float32", "--rows", "round", "limits")
    assert "round, float32: skipped, it takes" in out and "limits, float32: skipped, it takes" in out


def test_with_depth(model):
    lm = setting.load(str(model), 3)
    assert lm.config.num_layers == 3
    assert lm.params["blocks_2"] is lm.params["blocks_0"]
