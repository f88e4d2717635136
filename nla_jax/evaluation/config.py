"""EvaluationConfig: what an evaluation measures, and on how many rows."""

import dataclasses

from nla_jax.chat.config import split_name

FEWEST_TAUGHT = 24
"""Fewest texts that teach the probes of a planted task: four of each of six answers."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The suites of the final evaluation, and the sizes of all evaluations."""

    suites: tuple[str, ...] = ("reconstruction", "controls")
    """The suites that a run measures at its end; `nla evaluate` takes others."""
    rows: int = 256
    """Held-out activations of the final evaluation, of documents that chose none of the steps that are kept."""
    monitor_rows: int = 128
    """Held-out activations of the evaluations during training, of the other documents."""
    monitor_tasks: tuple[str, ...] = ()
    """Planted tasks whose texts are explained at each evaluation of joint training, to see what the words tell of them:
    each takes about as long as 96 of `monitor_rows`. See evaluation/planted/ for their names."""
    batch_size: int = 64
    temperature: float = 0.0
    """Temperature of the evaluated explanations; 0 takes the likeliest token."""
    samples: int = 4
    """Explanations sampled for each activation where the best of several is chosen."""
    prediction_rows: int = 64
    """Held-out activations of suffix prediction, and of the claims that the target LM checks. Continuations are asked
    about at the first activations that end a word."""
    task_examples: int = 48
    """Texts of each planted task that are asked about."""
    task_taught: int = 96
    """Other texts of each planted task, which teach the probes on activations and on the words of explanations."""
    recurrence_rows: int = 24
    """Contexts whose last ten tokens are explained."""
    rewrite_rows: int = 128
    """Explanations that are rewritten by rules."""
    generated_rows: int = 32
    """Explanations that the target LM rewrites; 0 leaves these rewrites out."""
    chat_model: str = ""
    """A chat model that answers the prediction tasks and checks claims beside the target LM: anthropic:MODEL,
    openai:MODEL or local:SOURCE; empty uses none. See chat/models.py."""
    dictionary: str | None = None
    """Path of a sparse dictionary whose code and words are baselines: what `nla data dictionary` wrote, another
    safetensors file, a folder of SAELens, or a params.npz of Gemma Scope."""
    second_judge_steps: int = 0
    """Warm-start steps of a second AR, with another seed, that judges beside the first; 0 trains none."""
    oracle_steps: int = 0
    """Training steps of an activation oracle, adapters of the target that answer questions about activations, as a
    baseline; 0 trains none."""
    oracle_batch_size: int = 32
    """Questions of each of these steps."""
    bootstrap_samples: int = 2000
    """Resamples of documents behind the interval of a share or mean. Differences of two figures take 2,000 always, and
    AUROC and the FVE for ten tokens 200."""
    examples: int = 20
    """Examples in the report."""

    def __post_init__(self):
        for name in (
            "rows",
            "monitor_rows",
            "batch_size",
            "samples",
            "oracle_batch_size",
            "bootstrap_samples",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name} is {getattr(self, name)}; expected a positive number")
        if self.task_taught < FEWEST_TAUGHT:
            raise ValueError(
                f"evaluation.task_taught is {self.task_taught}; expected at least {FEWEST_TAUGHT}, so that a "
                "probe has a few examples of each answer"
            )
        if self.chat_model:
            split_name(self.chat_model)
