"""Watching a run for the ways in which it goes wrong: a warning first, and in the end a stop with everything saved."""

import dataclasses
from collections import Counter
from collections.abc import Mapping


class GuardError(RuntimeError):
    """Raised where a metric has been beyond its last threshold for too long."""


@dataclasses.dataclass(frozen=True)
class Guard:
    """Two thresholds of a metric of every step; the second lies beyond the first, above or below."""

    warn: float
    stop: float

    def __post_init__(self):
        if self.warn == self.stop:
            raise ValueError(
                f"a guard's thresholds warn={self.warn} and stop={self.stop} must differ: which is larger says "
                "whether high or low values are bad"
            )

    def passes(self, value: float, threshold: float) -> bool:
        """Whether a value is on the good side; one that is not a number is not."""
        return value < threshold if self.stop > self.warn else value > threshold


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What is watched in joint training."""

    entropy: Guard = Guard(warn=0.3, stop=0.02)
    """Nats a token; low where the AV writes one text whatever it reads."""
    reward_std: Guard = Guard(warn=1e-3, stop=1e-6)
    """Within groups; without any there is nothing to learn from."""
    failed_fraction: Guard = Guard(warn=0.5, stop=0.98)
    """Answers that were cut or lack their closing: lengths have saturated."""
    sampler_trainer_logprob_diff: Guard = Guard(warn=0.1, stop=1.0)
    """Nats a token by which sampler and trainer disagree about the same tokens."""
    kl: Guard = Guard(warn=2.0, stop=20.0)
    """Nats a token from the reference."""
    patience: int = 5
    """Steps in a row beyond a threshold before anything happens."""

    @property
    def guards(self) -> dict[str, Guard]:
        """By the metric's name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, Guard)}


REMEDIES = {
    "entropy": "raise rl.policy.kl_coefficient or lower rl.av_optimizer.learning_rate",
    "reward_std": "raise rl.group or rl.policy.temperature, or start from an earlier checkpoint",
    "failed_fraction": "raise max_explanation_tokens, or penalise length (rl.length_hinge_start)",
    "sampler_trainer_logprob_diff": "use model.attention_dtype=float32 or model.dtype=float32",
    "kl": "raise rl.policy.kl_coefficient or lower rl.av_optimizer.learning_rate",
}


class Watch:
    """Counts for how many steps in a row each metric has been beyond its thresholds."""

    def __init__(self, config: GuardConfig | None):
        self.config = config
        self.beyond: Counter[tuple[str, str]] = Counter()

    def warnings(self, metrics: Mapping[str, float]) -> list[str]:
        """Look at a step's metrics; what to tell, once each time that a metric goes beyond.

        Raises:
          GuardError: a metric has been beyond its last threshold for `patience` steps.
        """
        if self.config is None:
            return []
        told = []
        for name, guard in self.config.guards.items():
            if name not in metrics:
                continue
            value = metrics[name]
            for level, threshold in (("stop", guard.stop), ("warn", guard.warn)):
                beyond = self.beyond[name, level]
                self.beyond[name, level] = 0 if guard.passes(value, threshold) else beyond + 1
            message = (
                f"{name} is {value:.3g}, beyond {{}} for {self.config.patience} steps: {REMEDIES[name]}; "
                f"its thresholds are rl.guards.{name}.warn and .stop"
            )
            if self.beyond[name, "stop"] >= self.config.patience:
                raise GuardError(message.format(f"{guard.stop:g}"))
            if self.beyond[name, "warn"] == self.config.patience:
                told.append(message.format(f"{guard.warn:g}"))
        return told
