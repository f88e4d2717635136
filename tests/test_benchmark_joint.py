"""The benchmark of joint training: what its settings share, and what its table says."""

import dataclasses
import sys
from pathlib import Path

import pytest
from untrained_nla import write_untrained_run

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import benchmark_joint

from nla_jax.commands.experiment import parse
from nla_jax.pipeline.digests import stage_digest

POINT = {"repeated": 0.1, "copied": 0.05, "own_fve_nrm": 0.4}


@pytest.fixture(scope="module")
def base(tiny_model_dir, tmp_path_factory):
    run = write_untrained_run(tiny_model_dir, tmp_path_factory.mktemp("base"))
    for stage in ("av_sft", "ar_sft"):
        (run.directory / "checkpoints" / stage).mkdir()
    (run.directory / "data" / "verbalized").mkdir()
    return run


def links(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.glob("*/*") if path.is_symlink()}


def test_a_setting_shares_what_it_leaves_as_it_is(base, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_joint, "STAGES", ())
    data = {f"data/{name}" for name in ("av_sft", "ar_sft", "rl", "held_out")}
    run = benchmark_joint.prepared(base, tmp_path / "rl", ["--rl.ar-updates", "2"])
    of_ar = {"data/verbalized", "checkpoints/ar_sft"}
    assert links(run.directory) == data | of_ar | {"checkpoints/av_sft"}
    assert run.config.rl.ar_updates == 2 and parse([str(run.directory)], "x")[0] == run.config
    assert (run.directory / "data" / "rl" / "rl.parquet").is_file()
    run = benchmark_joint.prepared(base, tmp_path / "ar", ["--ar-sft.verbalized-samples", "2"])
    assert links(run.directory) == data | {"checkpoints/av_sft"}
    # The same again finds everything as it left it.
    assert (
        benchmark_joint.prepared(base, tmp_path / "ar", ["--ar-sft.verbalized-samples", "2"]).config
        == run.config
    )
    with pytest.raises(ValueError, match="--av-sft.batch-size 8 changes the data or the AV's warm start"):
        benchmark_joint.prepared(base, tmp_path / "av", ["--av-sft.batch-size", "8"])


@pytest.mark.parametrize("name", benchmark_joint.SETTINGS)
def test_every_setting_can_be_given_to_the_cpu_recipe(name, tmp_path):
    recipe, _ = parse(["smollm2_135m_cpu"], "nla train")
    config, _ = parse(["smollm2_135m_cpu", *benchmark_joint.SETTINGS[name].split()], "nla train")
    assert stage_digest(config, "av_sft") == stage_digest(recipe, "av_sft")
    assert (config == recipe) == (name == "as_it_is")


def test_a_curve_counts_rollouts_and_seconds_without_the_time_to_compile():
    config = dataclasses.replace(
        parse(["tiny"], "x")[0], rl=dataclasses.replace(parse(["tiny"], "x")[0].rl, activations=4, group=3)
    )
    rows = [
        {"stage": "av_sft", "step": 1, "speed/seconds": 99.0},
        {"stage": "rl", "step": 0, "judge_fve_nrm": 0.2},
    ]
    rows += [
        {"stage": "rl", "step": step, "speed/seconds": float(s)}
        for step, s in ((1, 50), (2, 2), (3, 4), (4, 2))
    ]
    rows[-1]["judge_fve_nrm"] = 0.3
    first, last = benchmark_joint.curve(rows, config)
    assert (first["rollouts"], first["seconds"], first["judge_fve_nrm"]) == (0, 0, 0.2)
    # The first round counts as the median of 50, 2, 4 and 2.
    assert (last["rollouts"], last["seconds"], last["judge_fve_nrm"]) == (48, 3 + 2 + 4 + 2, 0.3)


def test_the_table_ranks_by_the_last_evaluations_and_has_places_where_they_are_known(tmp_path):
    def points(*judge, **more):
        return [
            POINT | {"rollouts": 8 * i, "seconds": i, "judge_fve_nrm": value, **more}
            for i, value in enumerate(judge)
        ]

    curves = {
        "peaked": points(0.2, 0.5, 0.1, 0.1),
        "steady": points(0.2, 0.3, 0.3, 0.36, judge_fve_nrm_span=0.25),
    }
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in benchmark_joint.table(curves).splitlines()
    ]
    assert lines[0] == [
        "setting",
        "rollouts",
        "seconds",
        "judge at 0",
        "best",
        "mean of last 3",
        *benchmark_joint.SHOWN,
        "span",
    ]
    assert lines[2] == [
        "steady",
        "24",
        "3",
        "0.200",
        "0.360",
        "0.320",
        "0.360",
        "0.400",
        "0.100",
        "0.050",
        "0.250",
    ]
    assert lines[3][:6] == ["peaked", "24", "3", "0.200", "0.500", "0.233"] and lines[3][-1] == ""
    benchmark_joint.write(tmp_path, curves, {"rounds": 3})
    assert (tmp_path / "curves.png").stat().st_size > 5000 and (tmp_path / "table.md").is_file()
