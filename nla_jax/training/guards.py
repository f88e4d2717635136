"""Watching a run for the ways in which it goes wrong: a warning first, and in the end a stop with everything saved."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping


class GuardError(RuntimeError):
    """Raised where a metric has been beyond its last threshold for too long."""


@dataclasses.dataclass(frozen=True)
class Guard:
    """Two thresholds of a metric of every step; the second lies beyond the first, above or below."""

    warn: float
    stop: float
    patience: int | None = None
    """Where another than the config's counts."""

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
    judge_drop: Guard = Guard(warn=0.02, stop=float("inf"), patience=2)
    """By how much `fve_nrm` of the frozen judge has fallen below its best while the own AR's is higher than ever: AV
    and AR then agree on something that nobody else understands. A finite `stop` ends the run there."""
    patience: int = 5
    """Steps (or evaluations, where a metric is one of those) in a row beyond a threshold before anything happens."""

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
    "judge_drop": "stop here and take the best step by the judge, or raise rl.policy.kl_coefficient",
}


def judge_drop(now: Mapping[str, float], highest: Mapping[str, float]) -> float:
    """How far the judge's `fve_nrm` is below its best while the own AR's has never been higher; else 0.

    Args:
      now: `own_fve_nrm` and `judge_fve_nrm` of an evaluation.
      highest: the highest of each in the evaluations before; may be empty.
    """
    own, judge = "own_fve_nrm", "judge_fve_nrm"
    rises = now[own] > highest.get(own, -math.inf)
    return max(0.0, highest.get(judge, now[judge]) - now[judge]) if rises else 0.0


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
            patience = guard.patience or self.config.patience
            for level, threshold in (("stop", guard.stop), ("warn", guard.warn)):
                beyond = self.beyond[name, level]
                self.beyond[name, level] = 0 if guard.passes(value, threshold) else beyond + 1
            message = (
                f"{name} is {value:.3g}, beyond {{}} for {patience} times in a row: {REMEDIES[name]}; "
                f"its thresholds are rl.guards.{name}.warn and .stop"
            )
            if self.beyond[name, "stop"] >= patience:
                raise GuardError(message.format(f"{guard.stop:g}"))
            if self.beyond[name, "warn"] == patience:
                told.append(message.format(f"{guard.warn:g}"))
        return told
