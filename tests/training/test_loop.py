import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.data.batches import training_batches
from nla_jax.sharding.mesh import make_mesh
from nla_jax.training.checkpoint import Checkpoints
from nla_jax.training.checkpoint_files import steps_of
from nla_jax.training.loop import Best, LoopConfig, Preempted, abstract, run_stage, tell_epochs
from nla_jax.training.metrics_log import MetricsLog
from nla_jax.training.state import OptimizerConfig, TooManyBadSteps, TrainState


class Stage:
    """A stage that counts, and notes in which order the loop asks for what."""

    def __init__(self, folder, bad_from=np.inf, values=None, best=None, signal_at=None):
        """Prepare a stage.

        Args:
          folder: where checkpoints and metrics go.
          bad_from: the first step whose update is refused.
          values: step -> what its evaluation finds.
          best: what `run_stage` takes.
          signal_at: the event during which SIGTERM comes.
        """
        self.events, self.bad_from, self.values = [], bad_from, values or {}
        self.best, self.signal_at = best, signal_at
        self.checkpoints = Checkpoints(folder / "checkpoints", digest="d", keep=1)
        self.log = MetricsLog(folder / "metrics.jsonl")

    def note(self, event):
        self.events.append(event)
        if event == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def step(self, states, batch, index):
        self.note(f"step {index + 1}")
        state = states["model"]

        def metrics():
            self.note(f"read {index + 1}")
            return {"loss": float(index), "bad_steps": max(index + 2 - self.bad_from, 0)}

        return {"model": state.replace(step=state.step + 1)}, metrics

    def evaluate(self, states, highest, step):
        assert step == int(states["model"].step)
        self.note(f"evaluate {step}")
        return {"held_out": self.values.get(step, 0.5), "highest_before": highest.get("held_out", -1.0)}

    def run(self, **config):
        run_stage(
            "stage",
            LoopConfig(**config),
            initial=lambda: {"model": TrainState.create({"w": jnp.zeros(2)}, OptimizerConfig().build())},
            step=self.step,
            batches=training_batches({"x": np.arange(8)}, 2, 0),
            evaluate=self.evaluate,
            checkpoints=self.checkpoints,
            log=self.log,
            mesh=make_mesh(),
            shown=("loss",),
            best=self.best,
        )
        return self.events

    def logged(self, name):
        return {row["step"]: row[name] for row in self.log.rows() if name in row}


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_read(tmp_path):
    events = Stage(tmp_path).run(steps=6, evaluate_every=4, checkpoint_every=100)
    assert events == [
        *("evaluate 0", "step 1", "read 1", "step 2", "step 3", "read 2", "step 4", "read 3"),
        *("read 4", "evaluate 4", "step 5", "step 6", "read 5", "read 6", "evaluate 6"),
    ]


def test_every_step_is_logged_once_and_in_order(tmp_path):
    stage = Stage(tmp_path)
    stage.run(steps=5, evaluate_every=2, checkpoint_every=3)
    assert [row["step"] for row in stage.log.rows()] == list(range(6))
    assert list(stage.logged("held_out")) == [0, 2, 4, 5]
    assert steps_of(tmp_path / "checkpoints") == [5]


def test_a_stage_that_refused_updates_end_has_logged_and_saved_every_step(tmp_path):
    stage = Stage(tmp_path, bad_from=3)
    with pytest.raises(TooManyBadSteps, match=r"^stage, step 4: .*\. Step 5 is saved\.$"):
        stage.run(steps=9, evaluate_every=100, checkpoint_every=100, max_bad_steps=2)
    # Steps 3 and 4 were refused; step 5 was under way when the fourth's metrics came.
    assert stage.events[-3:] == ["step 5", "read 4", "read 5"]
    assert list(stage.logged("loss")) == [1, 2, 3, 4, 5] and stage.checkpoints.latest() == 5


RISING, FALLING = {0: 0.2, 2: 0.1, 4: 0.3, 6: 0.25}, {0: 0.2, 2: 0.3, 4: 0.1, 6: 0.25}


@pytest.mark.parametrize(
    ("values", "lowest", "kept"),
    [
        (RISING, False, 4),
        (FALLING, True, 4),
        # What the stage began with is the best: nothing was gained.
        ({0: 0.4, 2: 0.1, 4: 0.3, 6: 0.25}, False, 0),
        ({0: 0.05, 2: 0.1, 4: 0.3, 6: 0.25}, True, 0),
        # An evaluation that failed neither counts nor ends the comparison.
        ({0: 0.2, 2: np.nan, 4: 0.3, 6: 0.25}, False, 4),
        ({0: np.nan, 2: 0.1, 4: 0.05, 6: np.nan}, False, 2),
    ],
)
def test_the_best_evaluated_step_is_kept_beside_the_last(values, lowest, kept, tmp_path):
    stage = Stage(tmp_path, values=values, best=Best("held_out", lowest))
    stage.run(steps=6, evaluate_every=2, checkpoint_every=100)
    assert stage.checkpoints.best() == kept
    assert steps_of(tmp_path / "checkpoints") == [kept, 6]
    like = {
        "model": abstract(
            lambda: TrainState.create({"w": jnp.zeros(2)}, OptimizerConfig().build()), make_mesh()
        )
    }
    assert int(stage.checkpoints.restore(like, kept)[0]["model"].step) == kept


@pytest.mark.parametrize(("lowest", "values"), [(False, RISING), (True, FALLING)])
def test_a_stage_that_goes_on_remembers_what_was_best(lowest, values, tmp_path):
    Stage(tmp_path, values=values, best=Best("held_out", lowest)).run(
        steps=4, evaluate_every=2, checkpoint_every=100
    )
    again = Stage(tmp_path, values=values, best=Best("held_out", lowest))
    again.run(steps=6, evaluate_every=2, checkpoint_every=100)
    assert again.events[0] == "step 5" and again.checkpoints.best() == 4


def test_the_evaluation_before_the_first_step_counts_among_the_highest(tmp_path):
    stage = Stage(tmp_path, values={0: 0.4, 2: np.nan, 4: 0.3})
    stage.run(steps=6, evaluate_every=2, checkpoint_every=100)
    assert stage.logged("highest_before") == {0: -1.0, 2: 0.4, 4: 0.4, 6: 0.4}


def test_an_evaluation_that_came_out_as_nan_is_told(tmp_path, capsys):
    Stage(tmp_path, values={2: np.nan}).run(steps=2, evaluate_every=2, checkpoint_every=100)
    assert "warning: stage, step 2: held_out of held-out documents came out as NaN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("event", "last"), [("step 2", 2), ("read 3", 4), ("step 4", 4), ("read 4", 4), ("evaluate 4", 4)]
)
def test_a_signal_ends_the_run_after_the_step_that_it_comes_in(event, last, tmp_path):
    stage = Stage(tmp_path, signal_at=event)
    with pytest.raises(Preempted, match="which is saved"):
        stage.run(steps=4, evaluate_every=4, checkpoint_every=100)
    assert stage.checkpoints.latest() == last and list(stage.logged("loss")) == [*range(1, last + 1)]


def test_a_stage_tells_its_epochs_and_warns_above_two(capsys):
    tell_epochs("av_sft", 1000, 8000, 16)
    told = capsys.readouterr()
    assert told.err == "av_sft: 1,000 steps of 16 rows are 2 epochs over 8,000 rows\n" and told.out == ""
    tell_epochs("rl", 1010, 8000, 16)
    information, warning = capsys.readouterr().err.splitlines()
    assert information == "rl: 1,010 steps of 16 rows are 2.02 epochs over 8,000 rows"
    assert (
        warning.startswith("warning: rl: 2.02 epochs are more than 2") and "corpus.max_documents" in warning
    )
