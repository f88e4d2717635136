"""Guards of a run: metrics beyond a first threshold give a warning, beyond a second they stop the run."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping


class GuardError(RuntimeError):
    """A metric has been beyond its last threshold for too long."""


@dataclasses.dataclass(frozen=True)
class Guard:
    """Two thresholds of a metric; `stop` lies beyond `warn`, above it if high values are bad, else below.

    An infinite threshold is none: nothing is beyond it, not even NaN.
    """

    warn: float
    stop: float
    patience: int | None = None
    """Steps in a row beyond a threshold before anything happens; None takes the config's `patience`."""

    def __post_init__(self):
        if self.warn == self.stop:
            raise ValueError(
                f"a guard's thresholds warn={self.warn} and stop={self.stop} must differ: which is larger says "
                "whether high or low values are bad"
            )

    def passes(self, value: float, threshold: float) -> bool:
        """Whether a value is on the good side of a threshold; NaN never is on that of a finite one."""
        if math.isinf(threshold):
            return True
        return value < threshold if self.stop > self.warn else value > threshold


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """The metrics that are watched in joint training, and their thresholds."""

    entropy: Guard = Guard(warn=0.3, stop=0.02)
    """Entropy in nats a token; it is low where the AV writes one text whatever it reads."""
    reward_std: Guard = Guard(warn=1e-3, stop=1e-6)
    """Standard deviation of rewards within groups; at zero there is nothing to learn from."""
    failed_fraction: Guard = Guard(warn=0.5, stop=0.98)
    """Share of answers that were cut or lack their closing; it is high where lengths have saturated."""
    sampler_trainer_logprob_diff: Guard = Guard(warn=0.1, stop=1.0)
    """Difference of sampler and trainer in the log-probability of the same tokens, in nats a token."""
    kl: Guard = Guard(warn=2.0, stop=20.0)
    """KL divergence from the reference, in nats a token."""
    judge_drop: Guard = Guard(warn=0.02, stop=float("inf"), patience=2)
    """Fall of the frozen judge's `fve_nrm` below its best while the own AR's is higher than ever: AV and AR then agree
    on something that nobody else understands. A finite `stop` ends the run there."""
    repeated_excess: Guard = Guard(warn=0.03, stop=float("inf"), patience=2)
    """Share of the 2-grams that a text says again, less that of the writer's texts: the AV has begun to stutter."""
    boilerplate_excess: Guard = Guard(warn=0.1, stop=float("inf"), patience=2)
    """Share of the 4-grams that texts about other documents have too, less that of the writer's texts: the AV writes
    more and more of one text, whatever it reads."""
    patience: int = 5
    """Steps in a row beyond a threshold before anything happens; evaluations, for a metric of evaluations."""

    @property
    def guards(self) -> dict[str, Guard]:
        """The guards by the name of their metric."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, Guard)}


REMEDIES = {
    "entropy": "raise rl.policy.kl_coefficient or lower rl.av_optimizer.learning_rate",
    "reward_std": "raise rl.group or rl.policy.temperature, or start from an earlier checkpoint",
    "failed_fraction": "raise max_explanation_tokens, or penalise length (rl.length_hinge_start)",
    "sampler_trainer_logprob_diff": "use model.attention_dtype=float32 or model.dtype=float32",
    "kl": "raise rl.policy.kl_coefficient or lower rl.av_optimizer.learning_rate",
    "judge_drop": "stop here and take the best step by the judge, or raise rl.policy.kl_coefficient",
    "repeated_excess": "raise rl.policy.kl_coefficient, or let the AR read texts that are cut short (rl.cut)",
    "boilerplate_excess": "raise rl.policy.kl_coefficient or rl.group, or take an earlier step",
}


def judge_drop(now: Mapping[str, float], highest: Mapping[str, float]) -> float:
    """The fall of the judge's `fve_nrm` below its best if the own AR's is higher than ever; else 0.

    Args:
      now: `own_fve_nrm` and `judge_fve_nrm` of an evaluation.
      highest: highest value of each in the evaluations before, that of the warm start included; may be empty.

    Returns:
      The fall, or NaN where the judge's value is NaN while the own AR's is higher than ever.
    """
    own, judge = "own_fve_nrm", "judge_fve_nrm"
    if not now[own] > highest.get(own, -math.inf):
        return 0.0
    fall = highest.get(judge, now[judge]) - now[judge]
    return fall if fall > 0 or math.isnan(fall) else 0.0


def excess(now: Mapping[str, float]) -> dict[str, float]:
    """How far the AV's texts repeat more than the writer's, for each of the two ways that an evaluation measures.

    Args:
      now: `repeated` and `boilerplate` of an evaluation, and both of the writer's texts (`writer_repeated` and
        `writer_boilerplate`); what is not known has no excess.
    """
    known = [name for name in ("repeated", "boilerplate") if {name, f"writer_{name}"} <= now.keys()]
    return {f"{name}_excess": now[name] - now[f"writer_{name}"] for name in known}


class Watch:
    """Counts for how many steps in a row each metric has been beyond its thresholds."""

    def __init__(self, config: GuardConfig | None):
        self.config = config
        self.beyond: Counter[tuple[str, str]] = Counter()

    def warnings(self, metrics: Mapping[str, float]) -> list[str]:
        """Count a step's metrics, and return a warning for each that has now been beyond its first threshold too long.

        Raises:
          GuardError: a metric has been beyond its last threshold for `patience` steps.
        """
        if self.config is None:
            return []
        warnings = []
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
                warnings.append(message.format(f"{guard.warn:g}"))
        return warnings
