"""The warm starts: supervised training of AV and AR on explainer texts, and of a second AR that judges."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import optax

from nla_jax.autoencoder.verbalizer import sft_loss
from nla_jax.config import ReconstructorWarmStartConfig, WarmStartConfig
from nla_jax.data.batches import RowSource, evaluation_batches, training_batches, verbalizer_rows
from nla_jax.data.splits import shuffled
from nla_jax.lm.packing import budget_for_lengths
from nla_jax.pipeline.models import ModelName
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.warm_start_rows import (
    balanced,
    closed_answers,
    partly_verbalized,
    reconstructor_prompts,
)
from nla_jax.sharding.placement import place_process_rows, process_row_indices, shard_batch
from nla_jax.training.loop import (
    Best,
    Evaluate,
    Metrics,
    States,
    abstract,
    run_stage,
    scalars,
    tell_epochs,
)
from nla_jax.training.state import TrainState, restart
from nla_jax.training.stopwatch import Stopwatch
from nla_jax.training.supervised import (
    ReconstructorBatch,
    VerbalizerBatch,
    ar_mse_step,
    av_sft_step,
    jit_step,
)


def av_sft(run: Run) -> None:
    """Warm-start the AV on explainer texts; its step with the lowest held-out loss is RL's start and reference."""
    config, codec = run.config.av_sft, run.models.autoencoder
    verbalizer, optimizer = codec.verbalizer, config.optimizer.build()
    monitor = run.monitored(run.config.evaluation.monitor_rows)
    step = jit_step(
        av_sft_step, verbalizer=verbalizer, optimizer=optimizer, micro_batches=config.micro_batches
    )

    @jax.jit
    def loss(params, batch: VerbalizerBatch):
        return sft_loss(verbalizer, params, batch.activations_BD, batch.responses_BT, batch.lengths_B)

    true_rows = verbalizer_rows(monitor, codec.tokenizer, verbalizer.prompt, codec.max_explanation_tokens)
    order = shuffled(range(len(monitor)), monitor.doc_ids, run.config.seed)

    def mean_loss(params, columns):
        sums = np.zeros(2)
        for batch, real in evaluation_batches(columns, run.config.evaluation.batch_size):
            batch["lengths_B"][real:] = 0  # the rows that fill up the last batch
            sums += np.array(loss(params, shard_batch(VerbalizerBatch(**batch), run.mesh)))
        return float(sums[0] / sums[1])

    def evaluate(states, highest, steps_made):
        params = run.models.with_base("av", states["av"].params)
        wrong = {**true_rows, "activations_BD": true_rows["activations_BD"][order]}
        real_loss, shuffled_loss = mean_loss(params, true_rows), mean_loss(params, wrong)
        return {
            "real_loss": real_loss,
            "shuffled_loss": shuffled_loss,
            "gap": shuffled_loss - real_loss,
        }

    WarmStart(
        run=run,
        stage="av_sft",
        model="av",
        config=config,
        optimizer=optimizer,
        step=step,
        batch_type=VerbalizerBatch,
        rows=closed_answers(codec, run.open("av_sft"), config.batch_size),
        max_length=codec.max_explanation_tokens,
        forward_flops=functools.partial(
            verbalizer.forward_flops, activations=config.batch_size, answers=config.batch_size
        ),
        evaluate=evaluate,
        best=Best("real_loss", lowest=True),
        shown=("loss", "gap"),
        seed=run.config.seed,
    ).train()


def ar_sft(run: Run) -> None:
    """Warm-start the AR on explainer texts and on the warm-start AV's; its best step on held-out ones is the judge."""
    _train_reconstructor(run, "ar_sft", run.config.ar_sft, run.config.seed)


def second_judge(run: Run) -> None:
    """Warm-start another AR on the same texts in another order, as a judge beside the first."""
    config, steps = run.config.ar_sft, run.config.evaluation.second_judge_steps
    loop = dataclasses.replace(config.loop, steps=steps)
    decay, warmup = config.optimizer.decay_steps and steps, min(config.optimizer.warmup_steps, steps)
    optimizer = dataclasses.replace(config.optimizer, decay_steps=decay, warmup_steps=warmup)
    config = dataclasses.replace(config, loop=loop, optimizer=optimizer)
    _train_reconstructor(run, "second_judge", config, run.config.seed + 1)


def second_judge_is_trained(run: Run) -> bool:
    """Whether its checkpoint is there."""
    return (run.checkpoints("second_judge").latest() or 0) >= run.config.evaluation.second_judge_steps


def _train_reconstructor(run: Run, stage: str, config: ReconstructorWarmStartConfig, seed: int) -> None:
    codec = run.models.autoencoder
    optimizer = config.optimizer.build()
    data = run.open("ar_sft")
    texts = partly_verbalized(run, data, config.verbalized, config.verbalized_samples)
    weights_N = balanced(run, data, stage) if config.balance_places else None
    monitor = run.monitored(run.config.evaluation.monitor_rows)
    step = jit_step(
        ar_mse_step,
        reconstructor=codec.reconstructor,
        optimizer=optimizer,
        micro_batches=config.micro_batches,
    )

    def evaluate(states, highest, steps_made):
        texts = monitor.explanations
        rebuilt_ND = run.models.round_trip.reconstruct(run.models.with_base("ar", states["ar"].params), texts)
        return {"held_out_fve_nrm": run.yardstick.fve_nrm(rebuilt_ND, texts, monitor.activations)}

    WarmStart(
        run=run,
        stage=stage,
        model="ar",
        config=config,
        optimizer=optimizer,
        step=step,
        batch_type=ReconstructorBatch,
        rows=reconstructor_prompts(codec, texts, stage, weights_N=weights_N, cut=config.cut, seed=seed),
        max_length=codec.max_reconstructor_tokens,
        forward_flops=functools.partial(codec.reconstructor.forward_flops, rows=config.batch_size),
        evaluate=evaluate,
        best=Best("held_out_fve_nrm"),
        shown=("loss", "held_out_fve_nrm"),
        seed=seed,
    ).train()


def continued(run: Run, model: ModelName, stage: str, optimizer: optax.GradientTransformation) -> TrainState:
    """AV or AR from a stage's best step, as another begins: adapters with their moments, all parameters with none."""
    if not run.config.lora.rank:
        return TrainState.create(run.models.trainable_params(stage, model), optimizer)
    like = abstract(functools.partial(run.models.initial_state, model, optimizer), run.mesh)
    checkpoints = run.checkpoints(stage)
    restored, _ = checkpoints.restore({model: like}, checkpoints.best())
    return restart(restored[model])


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Supervised training of one model on explainer texts, as a stage of a run."""

    run: Run
    stage: str
    """Name of the stage, of its checkpoints and of its rows in metrics.jsonl."""
    model: ModelName
    config: WarmStartConfig
    optimizer: optax.GradientTransformation
    """The one that `step` applies."""
    initial: Callable[[], TrainState] | None = None
    """Gives the state that training begins with, and is called once; None begins with the base model."""
    step: Callable
    """From `jit_step`: (state, batch, base, token_budget) -> (state, metrics)."""
    batch_type: type[VerbalizerBatch] | type[ReconstructorBatch]
    """What `step` takes as its batch."""
    rows: RowSource
    """The training rows, whose batches have a column for each field of `batch_type`."""
    max_length: int
    """Tokens that the texts in `rows` are padded to."""
    forward_flops: Callable[..., float]
    """Model FLOPs of one forward of a batch, given the mean number of `tokens` of its texts."""
    evaluate: Evaluate
    """Metrics on held-out documents."""
    best: Best
    """Which of them decides the step that is kept."""
    shown: tuple[str, ...]
    """Metrics on the progress bar."""
    seed: int
    """Decides the order of the rows."""

    def train(self) -> None:
        """Train until the config's last step, going on from the last checkpoint if there is one."""
        run, batch_size = self.run, self.config.batch_size
        tell_epochs(self.stage, self.config.loop.steps, len(self.rows), batch_size)
        stopwatch = Stopwatch(run.config.model.dtype)
        run_stage(
            self.stage,
            self.config.loop,
            initial=self._initial,
            step=functools.partial(self._step, stopwatch),
            batches=training_batches(
                self.rows, batch_size, self.seed, process_row_indices(batch_size, run.mesh)
            ),
            evaluate=self.evaluate,
            checkpoints=run.checkpoints(self.stage),
            log=run.log,
            mesh=run.mesh,
            shown=self.shown,
            best=self.best,
        )

    def _initial(self) -> States:
        if self.initial is not None:
            return {self.model: self.initial()}
        states = {self.model: self.run.models.initial_state(self.model, self.optimizer)}
        self.run.models.release_target()
        return states

    def _step(
        self, stopwatch: Stopwatch, states: States, batch: dict[str, np.ndarray], index: int
    ) -> tuple[States, Metrics]:
        """One update; see `training.loop.Step`."""
        lap, lengths_B = stopwatch.lap(), batch["lengths_B"]
        placed = self.batch_type(**place_process_rows(batch, self.config.batch_size, self.run.mesh))
        state, metrics = self.step(
            states[self.model],
            placed,
            self.run.models.bases.get(self.model),
            token_budget=self._token_budget(lengths_B),
        )
        lap.until("update", metrics["loss"])

        def metrics_to_come() -> dict[str, float]:
            speed = lap.metrics({"update": 3 * self.forward_flops(tokens=lengths_B.mean())})
            rate = self.config.batch_size / speed["speed/update_seconds"]
            return scalars(metrics) | speed | {"speed/examples_per_second": rate}

        return {self.model: state}, metrics_to_come

    def _token_budget(self, lengths_B: np.ndarray) -> int | None:
        """What an update is compiled for; None where rows are split over devices: they are not packed there."""
        if self.run.mesh.size > 1:
            return None
        return budget_for_lengths(
            lengths_B,
            self.max_length,
            micro_batches=self.config.micro_batches,
            buckets=self.config.length_buckets,
        )
