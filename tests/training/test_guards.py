import math

import pytest

from nla_jax.training.guards import REMEDIES, Guard, GuardConfig, GuardError, Watch, excess, judge_drop

GOOD = {
    "entropy": 2.0,
    "reward_std": 0.1,
    "failed_fraction": 0.0,
    "sampler_trainer_logprob_diff": 0.01,
    "kl": 0.1,
    "judge_drop": 0.0,
    "repeated_excess": 0.0,
    "boilerplate_excess": -0.1,
}


def test_every_guard_has_a_remedy():
    assert GuardConfig().guards.keys() == REMEDIES.keys() == GOOD.keys()


@pytest.mark.parametrize(
    ("name", "slightly", "badly"),
    [
        ("entropy", 0.2, 0.01),
        ("reward_std", 1e-4, 0.0),
        ("failed_fraction", 0.7, 1.0),
        ("sampler_trainer_logprob_diff", 0.3, 2.0),
        ("kl", 3.0, math.nan),
    ],
)
def test_a_warning_first_and_a_stop_in_the_end(name, slightly, badly):
    watch = Watch(GuardConfig(patience=3))
    assert [len(watch.warnings(GOOD | {name: slightly})) for _ in range(5)] == [0, 0, 1, 0, 0]
    assert watch.warnings(GOOD) == []
    # The count begins anew after a good step.
    assert [len(watch.warnings(GOOD | {name: badly})) for _ in range(2)] == [0, 0]
    with pytest.raises(
        GuardError, match=f"{name} is .*, beyond .* for 3 times in a row: .* rl.guards.{name}.warn"
    ):
        watch.warnings(GOOD | {name: badly})


def test_a_judge_that_falls_while_the_own_ar_rises():
    highest = {"own_fve_nrm": 0.3, "judge_fve_nrm": 0.28}
    assert judge_drop({"own_fve_nrm": 0.35, "judge_fve_nrm": 0.22}, highest) == pytest.approx(0.06)
    assert judge_drop({"own_fve_nrm": 0.25, "judge_fve_nrm": 0.22}, highest) == 0
    assert judge_drop({"own_fve_nrm": 0.35, "judge_fve_nrm": 0.30}, highest) == 0
    assert judge_drop({"own_fve_nrm": 0.1, "judge_fve_nrm": 0.1}, {}) == 0
    assert math.isnan(judge_drop({"own_fve_nrm": 0.35, "judge_fve_nrm": math.nan}, highest))
    assert judge_drop({"own_fve_nrm": math.nan, "judge_fve_nrm": 0.1}, highest) == 0
    watch = Watch(GuardConfig())
    assert [len(watch.warnings({"judge_drop": 0.06})) for _ in range(4)] == [0, 1, 0, 0]
    # A judge that came out as NaN is told, but ends nothing where no end is asked for.
    watch = Watch(GuardConfig())
    assert [len(watch.warnings({"judge_drop": math.nan})) for _ in range(4)] == [0, 1, 0, 0]
    watch = Watch(GuardConfig(judge_drop=Guard(warn=0.02, stop=0.05, patience=2)))
    watch.warnings({"judge_drop": 0.06})
    with pytest.raises(GuardError, match="judge_drop is 0.06, beyond 0.05 for 2 times in a row"):
        watch.warnings({"judge_drop": 0.06})


def test_texts_that_repeat_more_than_the_writers_are_told():
    now = {"repeated": 0.05, "writer_repeated": 0.01, "boilerplate": 0.2, "writer_boilerplate": 0.3}
    assert excess(now) == pytest.approx({"repeated_excess": 0.04, "boilerplate_excess": -0.1})
    assert excess({"repeated": 0.05, "writer_boilerplate": 0.3}) == {}
    watch = Watch(GuardConfig())
    warnings = [watch.warnings(excess(now)) for _ in range(3)]
    assert [len(some) for some in warnings] == [0, 1, 0]
    assert "repeated_excess is 0.04, beyond 0.03 for 2 times" in warnings[1][0]


def test_nothing_is_watched_without_a_config_or_a_metric():
    assert Watch(None).warnings({"entropy": 0.0}) == []
    assert Watch(GuardConfig(patience=1)).warnings({"loss": math.nan}) == []


def test_thresholds_that_say_no_direction_are_an_error():
    with pytest.raises(ValueError, match=r"warn=1.0 and stop=1.0 must differ"):
        Guard(1.0, 1.0)
