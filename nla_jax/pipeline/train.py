"""Joint training of AV and AR, and which training stages are done."""

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.data.batches import StoredActivations, training_batches
from nla_jax.pipeline.monitor import Monitor
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.warm_start_rows import MixedTexts, Prompts, balanced
from nla_jax.pipeline.warm_starts import continued
from nla_jax.process import warn
from nla_jax.randomness import key_for
from nla_jax.sharding.aliasing import jit_aliasing
from nla_jax.sharding.placement import process_row_indices
from nla_jax.training.joint import Round
from nla_jax.training.loop import Best, run_stage, tell_epochs
from nla_jax.training.replay import Replay
from nla_jax.training.round_programs import optimizers


def is_trained(run: Run, stage: str) -> bool:
    """Whether a training stage has made all its steps."""
    return (run.checkpoints(stage).latest() or 0) >= getattr(run.config, stage).loop.steps


def _warn_of_short_prompts(codec: Autoencoder) -> None:
    """Tell where the AR could not read an answer of full length to its end."""
    written = codec.max_explanation_tokens - len(codec.verbalizer.prompt.closing)
    needed = written + len(codec.reconstructor.prompt.suffix)
    if needed > codec.max_reconstructor_tokens:
        warn(
            f"rl: an explanation of {written} tokens, which max_explanation_tokens={codec.max_explanation_tokens} "
            f"allows, takes an AR prompt of about {needed}. The AR does not read the ends of those that are longer "
            f"than max_reconstructor_tokens={codec.max_reconstructor_tokens}; raise it to {needed}"
        )


def _replay(run: Run, rows: StoredActivations) -> Replay:
    """What further AR updates of a round learn from: texts of recent rounds, and the writer's as the warm start had."""
    config, codec, writer = run.config.rl, run.models.autoencoder, None
    if config.writer_rows:
        data, seed = run.open("ar_sft"), run.config.seed
        prompts = Prompts(
            codec,
            MixedTexts.written(data),
            balanced(run, data, "rl") if config.balance_places else None,
            run.config.ar_sft.cut,
            seed,
        )
        writer = training_batches(prompts, config.writer_rows, seed)
    return Replay(
        codec,
        rows,
        rounds=config.replay_rounds,
        batch_size=config.activations * config.group,
        writer=writer,
        writer_rows=config.writer_rows,
    )


def rl(run: Run) -> None:
    """Joint training from both warm starts; the best round by the frozen judge is kept."""
    config, codec = run.config.rl, run.models.autoencoder
    _warn_of_short_prompts(codec)
    monitor = Monitor(run)
    run.models.release_target()
    seed = run.config.seed
    # Restored apart from the states: steps donate those. Adapters share their base, which nothing else need copy.
    reference = run.models.warm_start_params("av")
    if not run.config.lora.rank:
        reference = jit_aliasing(codec.verbalizer.frozen)(reference)
    first = {
        model: continued(run, model, run.models.warm_start_stage(model), optimizer)
        for model, optimizer in optimizers(config).items()
    }

    def initial():
        # Called once. Nothing here holds on to the first states after that.
        return {name: first.pop(name) for name in ("av", "ar")}

    data = run.open("rl")
    rows = StoredActivations(data, balanced(run, data, "rl") if config.balance_places else None)
    replay = _replay(run, rows) if config.ar_updates > 1 else None
    tell_epochs("rl", config.loop.steps, len(rows), config.activations)
    run_stage(
        "rl",
        config.loop,
        initial=initial,
        step=Round(
            config=config,
            autoencoder=codec,
            reference_params=reference,
            mesh=run.mesh,
            key=key_for(seed, "rollouts"),
            bases=run.models.bases,
            replay=replay,
        ),
        batches=training_batches(
            rows, config.activations, seed, process_row_indices(config.activations, run.mesh)
        ),
        evaluate=monitor,
        checkpoints=run.checkpoints("rl"),
        log=run.log,
        mesh=run.mesh,
        shown=("reward_mean", "kl", "judge_fve_nrm", "own_fve_nrm"),
        best=Best("judge_fve_nrm"),
        guards=config.guards,
        memory=replay,
    )
