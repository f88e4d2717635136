import pytest

from nla_jax.data.writers.reports import Tally, joined


def test_reports_of_parts_are_added():
    first, second = Tally(), Tally()
    first.count(["a", None])
    first.refused["copied words"] += 1
    second.count([None, None, "b"])
    second.refused.update({"copied words": 1, "no answer": 1, "no tag": 0})
    total = joined([tally.report(writer="chat", model="m") for tally in (first, second)])
    assert total == {
        "writer": "chat",
        "model": "m",
        "rows": 5,
        "written": 2,
        "left_out": 3,
        "asked_again": 0,
        "refused": {"copied words": 2, "no answer": 1},
    }
    assert joined([first.report(writer="chat")]) == first.report(writer="chat")


def test_parts_of_different_writers_are_not_added():
    with pytest.raises(ValueError, match="some rows have the model 'm', and those of others 'n'"):
        joined([Tally().report(model="m"), Tally().report(model="n")])
