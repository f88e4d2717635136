"""A run's AV and AR as model directories, in the reference's layout or as adapters."""

from typing import Any, Literal

from nla_jax.files import Place, as_path
from nla_jax.interop.model_directories import (
    AdapterOrigin,
    TrainingLimits,
    export_reconstructor,
    export_verbalizer,
)
from nla_jax.lm.lora import merge
from nla_jax.lm.transformer import unstack_blocks
from nla_jax.pipeline.models import ModelName
from nla_jax.pipeline.run import Run


def export_run(
    run: Run,
    directory: Place,
    *,
    stage: Literal["rl", "warm_start"] = "rl",
    step: int | None = None,
    adapters: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> list[str]:
    """Write a run's AV and AR to `directory`/av and `directory`/ar, and its training means beside the AR.

    Args:
      run: a finished or unfinished run.
      directory: created if need be.
      stage: joint training, or the two warm starts.
      step: of joint training; the best by the judge if None.
      adapters: of a run with `lora.rank`, write what was trained alone, in PEFT's format, in place of whole models.
      dtype: of the tensors.

    Returns:
      Why the reference's client cannot use the AV as it is; empty if it can.

    Raises:
      FileNotFoundError: the run has no checkpoint of that stage yet.
      ValueError: adapters of a run that has none, or of a family that PEFT cannot adapt so.
    """
    directory, config, models = as_path(directory), run.config, run.models
    if adapters and not config.lora.rank:
        raise ValueError(f"{run.directory} was trained without adapters (lora.rank=0); export it whole")
    step = trained_step(run, stage, step)
    origin = AdapterOrigin(config.lora, models.base_lm.name) if adapters else None
    autoencoder = models.autoencoder
    models.release_target()

    def params(model: ModelName) -> Any:
        trained_in = "rl" if stage == "rl" else models.warm_start_stage(model)
        if adapters:
            return models.trainable_params(trained_in, model, step)
        return merge(unstack_blocks(models.model_params(trained_in, model, step)))

    notes = export_verbalizer(
        autoencoder.verbalizer,
        params("av"),
        autoencoder.tokenizer,
        config.templates,
        directory / "av",
        layer=config.model.layer,
        limits=TrainingLimits(
            config.max_explanation_tokens, config.max_reconstructor_tokens, config.extraction.min_position
        ),
        adapted=origin,
        dtype=dtype,
    )
    export_reconstructor(
        autoencoder.reconstructor,
        params("ar"),
        autoencoder.tokenizer,
        config.templates,
        directory / "ar",
        tokens=models.prompt_ids,
        adapted=origin,
        dtype=dtype,
    )
    run.yardstick.save(directory / "ar")
    return notes


def trained_step(run: Run, stage: str, step: int | None) -> int | None:
    """The round of joint training to take: `step`, or the best; None for the warm starts.

    Raises:
      FileNotFoundError: there was no joint training yet.
    """
    if stage != "rl":
        return None
    step = run.best_step() if step is None else step
    if step is None:
        raise FileNotFoundError(
            f"{run.directory} holds no checkpoint of joint training; take its warm starts (--warm-start), or train it "
            "with nla train"
        )
    return step
