"""Joint training of AV and AR, and which training stages are done."""

import functools

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.data.batches import StoredActivations, training_batches
from nla_jax.pipeline.monitor import Monitor
from nla_jax.pipeline.run import Run
from nla_jax.process import warn
from nla_jax.randomness import key_for
from nla_jax.sharding.aliasing import jit_aliasing
from nla_jax.sharding.placement import process_row_indices
from nla_jax.training.joint import Round, optimizers
from nla_jax.training.loop import Best, abstract, run_stage, tell_epochs
from nla_jax.training.state import TrainState, restart


def is_trained(run: Run, stage: str) -> bool:
    """Whether a training stage has made all its steps."""
    return (run.checkpoints(stage).latest() or 0) >= getattr(run.config, stage).loop.steps


def _warm_started(run: Run) -> dict[str, TrainState]:
    """AV and AR as joint training begins: adapters with the moments of their warm start, all parameters with none."""
    states = {}
    for model, optimizer in optimizers(run.config.rl).items():
        stage = f"{model}_sft"
        if run.config.lora.rank:
            like = abstract(functools.partial(run.models.initial_state, model, optimizer), run.mesh)
            checkpoints = run.checkpoints(stage)
            restored, _ = checkpoints.restore({model: like}, checkpoints.best())
            states[model] = restart(restored[model])
        else:
            states[model] = TrainState.create(run.models.trainable_params(stage, model), optimizer)
    return states


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
    first = _warm_started(run)

    def initial():
        # Called once. Nothing here holds on to the first states after that.
        return {name: first.pop(name) for name in ("av", "ar")}

    rows = StoredActivations(run.open("rl"))
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
    )
