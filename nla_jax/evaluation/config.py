"""What an evaluation measures, and on how much."""

import dataclasses

from nla_jax.chat.models import split_name


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated at the end, and how often on the way."""

    suites: tuple[str, ...] = ("reconstruction", "controls")
    """What a run measures at its end; `nla evaluate` takes others."""
    rows: int = 256
    """Held-out activations of the final evaluation."""
    monitor_rows: int = 128
    """Held-out activations looked at during training."""
    batch_size: int = 64
    temperature: float = 0.0
    """Temperature of the evaluated explanations; 0 takes the likeliest token."""
    samples: int = 4
    """Explanations an activation where the best of several is looked for."""
    prediction_rows: int = 64
    """Held-out activations of suffix prediction, and those whose claims the target LM checks."""
    task_examples: int = 48
    """Texts of each planted task; as many more teach its linear probe."""
    recurrence_rows: int = 24
    """Contexts whose last ten tokens are explained."""
    rewrite_rows: int = 128
    """Explanations that are rewritten by rules."""
    generated_rows: int = 32
    """Explanations that the target LM rewrites; 0 leaves that out."""
    chat_model: str = ""
    """Answers the prediction tasks and checks claims as well: anthropic:MODEL, openai:MODEL or local:SOURCE; empty does
    without. See chat/models.py."""
    dictionary: str | None = None
    """A sparse dictionary in safetensors, whose strongest features make a baseline's texts."""
    second_judge_steps: int = 0
    """Steps of another AR's warm start with another seed, which judges beside the first; 0 does without."""
    bootstrap_samples: int = 2000
    examples: int = 20
    """Examples in the report."""

    def __post_init__(self):
        if self.chat_model:
            split_name(self.chat_model)
