import dataclasses
import json

from nla_jax.evaluation.compare import compare, rendered
from nla_jax.evaluation.suites import reconstruction
from nla_jax.evaluation.tables import write_ratios


def test_runs_are_compared_by_place(subject, tmp_path):
    """Two evaluations of one subject, of which the other was measured before there were places."""
    before = dataclasses.replace(subject, yardstick=dataclasses.replace(subject.yardstick, places={}))
    for name, measured in (("now", subject), ("again", subject), ("before", before)):
        folder = tmp_path / name
        tables = [reconstruction.systems(measured)]
        if measured.places:
            tables.append(reconstruction.systems_by_place(measured))
        (folder / "evaluation").mkdir(parents=True)
        write_ratios(tables, folder / "evaluation" / "reconstruction.parquet")
        suites = {"reconstruction": {"tables": [table.record(50) for table in tables]}}
        (folder / "evaluation.json").write_text(json.dumps({"run": {}, "suites": suites}))
    shared = list(compare(tmp_path / "now", tmp_path / "again", samples=50))
    (found,) = [d for d in shared if d.row == "AV after RL, AR judge, place inside"]
    assert found.figure == "fve_nrm" and found.first == found.other and found.difference.value == 0
    assert found.first.n == 16
    earlier = list(compare(tmp_path / "before", tmp_path / "now", samples=50))
    assert {d.table for d in earlier} == {"systems"} and {d.table for d in shared} == {
        "systems",
        "systems_by_place",
    }
    lines = rendered(shared, ("now", "again")).splitlines()
    assert any(line.startswith("AV after RL, AR judge, place inside: fve_nrm ") for line in lines)
