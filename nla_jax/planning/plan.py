"""The plan of a run: the cost of its steps on given devices, whether it fits, and how fast it can be."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from nla_jax.config import ExperimentConfig
from nla_jax.lm.config import LMConfig
from nla_jax.lm.logits import CHUNK_LOGITS
from nla_jax.planning.chips import Chip
from nla_jax.planning.measure import Cost, extrapolate, measure
from nla_jax.planning.steps import (
    LENGTHS,
    ROUND,
    STEPS,
    TRAINED,
    UNROLLED,
    AbstractRun,
    PromptLengths,
    bytes_per_device,
    check_divisions,
)
from nla_jax.sharding.mesh import make_mesh

STAGE_MODELS = {
    "extract": ("target",),
    "av_sft": ("av",),
    "ar_sft": ("ar",),
    "prefill": ("av", "ar", "reference", "weights"),
    "decode": ("av", "ar", "reference", "weights"),
    "copy": ("av", "ar", "reference"),
    "reference": ("av", "ar", "reference"),
    "ar_update": ("av", "ar", "reference"),
    "av_update": ("av", "ar", "reference"),
}
"""The models that the devices hold during each step; "weights" are the copies that a round samples from."""


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A step's cost, and the memory that is held while it runs; bytes on one device."""

    name: str
    cost: Cost | None
    """None where the program does not fit."""
    held: dict[str, float]
    """Bytes of everything that the device holds before and after the step, by name."""
    inside: dict[str, float]
    """Bytes of those temporaries that follow from shapes: gradients, the KV cache, one chunk of logits."""
    problem: str = ""
    """XLA's message where the program does not fit."""

    @property
    def peak(self) -> float:
        """Bytes on a device while the step runs."""
        if self.cost is None:
            return math.inf
        return sum(self.held.values()) + self.cost.outputs + self.cost.temporaries + self.cost.code


@dataclasses.dataclass(frozen=True)
class Plan:
    """All steps of a run on one mesh."""

    chip: Chip
    mesh: dict[str, int]
    steps: dict[str, StepPlan]
    rollouts: int
    """Number of explanations in a round of joint training."""
    ar_updates: int = 1
    """AR updates in a round."""
    blocks: tuple[int, ...] = ()
    """The depths from which costs are extrapolated, except those of loops over blocks; empty if none are."""

    @property
    def peak(self) -> float:
        """The largest peak of any step."""
        return max(step.peak for step in self.steps.values())

    @property
    def fits(self) -> bool:
        """Whether every step fits in the chip's memory."""
        return self.peak <= self.chip.memory

    @property
    def round_seconds(self) -> float | None:
        """Least seconds of a round of joint training; None where a part of it was not compiled."""
        costs = [self.steps[name].cost if name in self.steps else None for name in self._round]
        return None if None in costs else sum(cost.seconds(self.chip) for cost in costs)

    @property
    def utilisation(self) -> float | None:
        """Share of the chips' peak that a round's matrix products use; None where a part was not compiled."""
        if self.round_seconds is None:
            return None
        return sum(self.steps[name].cost.flops for name in self._round) / (
            self.round_seconds * self.chip.flops
        )

    @property
    def _round(self) -> tuple[str, ...]:
        """The steps of a round, each as often as it is run."""
        return (*ROUND, *["ar_update"] * (self.ar_updates - 1))


def held_by_step(
    config: ExperimentConfig,
    lm: LMConfig,
    devices: Sequence[jax.Device],
    *,
    steps: Sequence[str] = STEPS,
    lengths: PromptLengths = LENGTHS,
) -> dict[str, dict[str, float]]:
    """Bytes that a device holds before and after each step, by name, from shapes alone: nothing is compiled.

    A run that holds more than the chip's memory does not fit; one that holds less may still fail for its temporaries.

    Raises:
      ValueError: the mesh does not divide a size.
    """
    mesh = make_mesh(config.mesh, devices)
    check_divisions(config, lm, mesh)
    return _by_step(_held(AbstractRun(config, lm, mesh, lengths)), steps)


def make_plan(
    config: ExperimentConfig,
    lm: LMConfig,
    chip: Chip,
    devices: Sequence[jax.Device],
    *,
    steps: Sequence[str] = STEPS,
    blocks: tuple[int, ...] = (),
    lengths: PromptLengths = LENGTHS,
    compiled: Callable[[str, int, Cost, str], None] = lambda *_: None,
) -> Plan:
    """Compile the steps of a run.

    Args:
      config: config of the run.
      lm: config of the target LM.
      chip: peaks of a device.
      devices: devices of the mesh; they need not be present.
      steps: names of the steps to compile.
      blocks: two depths to compile instead of the model's own. Its costs are extrapolated from them, since a step's
        costs are linear in the number of equal blocks; models whose blocks differ by layer need multiples of their
        period. Steps that loop over blocks (`model.scan_blocks`) are compiled at the model's own depth in any case.
      lengths: lengths of the prompts.
      compiled: called with step, blocks, cost and text of every compiled program.

    Raises:
      ValueError: the mesh does not divide a size, or `blocks` are not two depths within the model.
    """
    mesh = make_mesh(config.mesh, devices)
    check_divisions(config, lm, mesh)
    run = AbstractRun(config, lm, mesh, lengths)
    if blocks and (len(set(blocks)) != 2 or not 0 < min(blocks) <= max(blocks) <= lm.num_layers):
        raise ValueError(f"blocks={blocks} must be two depths between 1 and the model's {lm.num_layers}")
    held = _by_step(_held(run), steps)
    shallow = {depth: AbstractRun(*_cut(config, lm, depth), mesh, lengths) for depth in blocks}
    plans = {}
    for name in steps:
        # A loop over blocks compiles as fast at any depth.
        parts = shallow if shallow and (name in UNROLLED or not config.model.scan_blocks) else {}
        resident = held[name]
        try:
            costs = {}
            for depth, part in (parts or {lm.num_layers: run}).items():
                costs[depth], text = measure(part.step(name), mesh)
                compiled(name, depth, costs[depth], text)
            target = _depth(config, lm, name)
            cost = extrapolate(costs, target) if parts else costs[lm.num_layers]
            plans[name] = StepPlan(name, cost, resident, _inside(run, name))
        except MemoryError as error:
            plans[name] = StepPlan(name, None, resident, _inside(run, name), str(error))
    rl = config.rl
    rollouts = rl.activations * rl.group
    return Plan(chip, dict(mesh.shape), plans, rollouts, rl.ar_updates, tuple(sorted(blocks)))


def _by_step(held: dict[str, dict[str, float]], steps: Sequence[str]) -> dict[str, dict[str, float]]:
    return {
        name: {key: size for model in STAGE_MODELS[name] for key, size in held[model].items()}
        for name in steps
    }


def _held(run: AbstractRun) -> dict[str, dict[str, float]]:
    """Bytes that a device holds between steps: name in STAGE_MODELS -> name in the report -> bytes."""
    model, lora, sizes = run.config.model, run.config.lora, bytes_per_device
    held = {
        "target": {"target": sizes(run.target)},
        "reference": {"reference": sizes(run.reference)},
        "weights": {"sampling weights": sizes(run.copied)},
    }
    for name, state in run.states.items():
        parts = {"params": state.params, "optimizer": state.opt_state}
        held[name] = {f"{name} {part}": sizes(tree) for part, tree in parts.items()}
    if model.frozen_blocks:
        # One copy serves both models.
        held["av"]["frozen blocks"] = held["ar"]["frozen blocks"] = sizes(run.bases["av"].lm)
    if not lora.rank:
        return held
    # The target's weights are the base of all adapters.
    held["av"]["target"] = held["ar"]["target"] = sizes(run.target)
    held["reference"] = {"reference": sizes(run.states["av"].params)}
    if model.scan_blocks:
        held["ar"]["base of the ar"] = sizes(run.bases["ar"].lm)
    return held


def _depth(config: ExperimentConfig, lm: LMConfig, step: str) -> int:
    """Number of blocks that a step runs."""
    stops = step in ("ar_sft", "ar_update") or (step == "extract" and not config.extraction.next_words)
    return config.model.layer + 1 if stops else lm.num_layers


def _cut(config: ExperimentConfig, lm: LMConfig, blocks: int) -> tuple[ExperimentConfig, LMConfig]:
    """Configs of a run on the first blocks of a model; its AR keeps all of them."""
    model = dataclasses.replace(config.model, layer=blocks - 1)
    injection = dataclasses.replace(config.injection, layer=min(config.injection.layer, blocks - 1))
    lm = dataclasses.replace(
        lm,
        num_layers=blocks,
        sliding_layers=lm.sliding_layers[:blocks],
        expert_layers=lm.expert_layers[:blocks],
    )
    return dataclasses.replace(config, model=model, injection=injection), lm


def _inside(run: AbstractRun, step: str) -> dict[str, float]:
    """Bytes of the parts of a step's temporaries that follow from shapes."""
    config, lm, shape = run.config, run.lm, run.mesh.shape
    ways, parts = shape["data"] * shape["fsdp"], {}
    if step in TRAINED:
        parts["gradients"] = bytes_per_device(run.states[TRAINED[step]].params)
    if step == "decode":
        rows = config.rl.activations * config.rl.group / ways
        heads = lm.num_kv_heads / shape["tensor"]
        cached = 2 * rows * heads * lm.head_dim * config.max_explanation_tokens * lm.num_layers
        parts["kv cache"] = cached * np.dtype(lm.cache_dtype).itemsize
        parts["logits"] = 4 * rows * lm.vocab_size
    if step in ("av_sft", "av_update"):
        parts["logits chunk"] = 4.0 * CHUNK_LOGITS
    return parts


def alternatives(config: ExperimentConfig, plan: Plan) -> Iterator[tuple[str, ExperimentConfig]]:
    """Configs with one setting changed towards less memory, each after a description of the change."""

    def replaced(part: str, **values: object) -> ExperimentConfig:
        return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})

    rl, (data, fsdp, tensor) = config.rl, plan.mesh.values()
    if not config.model.remat:
        yield "model.remat=True", replaced("model", remat=True)
    if rl.activations % (2 * rl.micro_batches * data * fsdp) == 0:
        pieces = 2 * rl.micro_batches
        yield f"rl.micro_batches={pieces}", replaced("rl", micro_batches=pieces)
    if data > 1:
        sizes = {"data": 1, "fsdp": data * fsdp, "tensor": tensor}
        yield f"mesh.data=1, mesh.fsdp={data * fsdp}", replaced("mesh", **sizes)
    if fsdp % 2 == 0:
        sizes = {"data": data, "fsdp": fsdp // 2, "tensor": tensor * 2}
        yield f"mesh.fsdp={fsdp // 2}, mesh.tensor={tensor * 2}", replaced("mesh", **sizes)
    if tensor % 2 == 0:
        sizes = {"data": data, "fsdp": fsdp * 2, "tensor": tensor // 2}
        yield f"mesh.fsdp={fsdp * 2}, mesh.tensor={tensor // 2}", replaced("mesh", **sizes)
    if config.model.dtype == "float32":
        yield "model.dtype=bfloat16 (and with it the reference)", replaced("model", dtype="bfloat16")
    if config.model.attention_dtype == "float32":
        yield "model.attention_dtype=bfloat16", replaced("model", attention_dtype="bfloat16")
