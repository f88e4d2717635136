import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.data.batches import training_batches
from nla_jax.sharding.mesh import make_mesh
from nla_jax.training.checkpoint import Checkpoints
from nla_jax.training.loop import LoopConfig, run_stage
from nla_jax.training.metrics_log import MetricsLog
from nla_jax.training.state import OptimizerConfig, TrainState


class Stage:
    """A stage that counts, and notes in which order the loop asks for what."""

    def __init__(self, folder, bad_from=np.inf):
        self.events, self.bad_from = [], bad_from
        self.checkpoints = Checkpoints(folder / "checkpoints", digest="d", keep=10)
        self.log = MetricsLog(folder / "metrics.jsonl")

    def step(self, states, batch, index):
        self.events.append(f"step {index + 1}")
        state = states["model"]

        def metrics():
            self.events.append(f"read {index + 1}")
            return {"loss": float(index), "bad_steps": max(index + 2 - self.bad_from, 0)}

        return {"model": state.replace(step=state.step + 1)}, metrics

    def evaluate(self, states, highest):
        self.events.append(f"evaluate {int(states['model'].step)}")
        return {"held_out": 0.5}

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
        )
        return self.events


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_read(tmp_path):
    events = Stage(tmp_path).run(steps=6, evaluate_every=4, checkpoint_every=100)
    assert events == [
        *("evaluate 0", "step 1", "read 1", "step 2", "step 3", "read 2", "step 4", "read 3"),
        *("read 4", "evaluate 4", "step 5", "step 6", "read 5", "read 6", "evaluate 6"),
    ]


def test_every_step_is_logged_once_and_in_order(tmp_path):
    stage = Stage(tmp_path)
    stage.run(steps=5, evaluate_every=2, checkpoint_every=3)
    rows = stage.log.rows()
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["step"] for row in rows if "held_out" in row] == [0, 2, 4, 5]
    assert stage.checkpoints.latest() == 5 and (tmp_path / "checkpoints" / "3").is_dir()


def test_refused_updates_stop_the_run(tmp_path):
    stage = Stage(tmp_path, bad_from=3)
    with pytest.raises(RuntimeError, match="stage"):
        stage.run(steps=9, evaluate_every=100, checkpoint_every=100, max_bad_steps=2)
    # Steps 3 and 4 were refused; step 5 was under way when the fourth's metrics came.
    assert stage.events[-1] == "read 4" and stage.events[-2] == "step 5"
