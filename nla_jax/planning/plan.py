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
    **dict.fromkeys(("prefill", "decode"), ("av", "ar", "reference", "weights")),
    **dict.fromkeys(("copy", "reference", "ar_update", "av_update"), ("av", "ar", "reference")),
}
"""What lives on the devices during each step; weights is what a round's sampling reads a copy of."""


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A step's cost beside what else is held while it runs; bytes on one device."""

    name: str
    cost: Cost | None
    """None where the program does not fit."""
    held: dict[str, float]
    """What lives on the device before and after the step, by name."""
    inside: dict[str, float]
    """Parts of the temporaries that follow from shapes: gradients, the KV cache, one chunk of logits."""
    problem: str = ""
    """XLA's words where the program does not fit."""

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
    """Explanations a round of joint training."""
    blocks: tuple[int, ...] = ()
    """Depths from which costs are extrapolated, those of loops over blocks excepted; empty where all were compiled."""

    @property
    def peak(self) -> float:
        """The largest peak of any step."""
        return max(step.peak for step in self.steps.values())

    @property
    def fits(self) -> bool:
        """Whether every step does."""
        return self.peak <= self.chip.memory

    @property
    def round_seconds(self) -> float | None:
        """What a round of joint training takes at the least; None where a part of it was not compiled."""
        costs = [self.steps[name].cost if name in self.steps else None for name in ROUND]
        return None if None in costs else sum(cost.seconds(self.chip) for cost in costs)

    @property
    def utilisation(self) -> float | None:
        """Matrix products of a round over what the chips could compute meanwhile."""
        if self.round_seconds is None:
            return None
        return sum(self.steps[name].cost.flops for name in ROUND) / (self.round_seconds * self.chip.flops)


def held_by_step(
    config: ExperimentConfig,
    lm: LMConfig,
    devices: Sequence[jax.Device],
    *,
    steps: Sequence[str] = STEPS,
    lengths: PromptLengths = LENGTHS,
) -> dict[str, dict[str, float]]:
    """Bytes a device of what lives before and after each step, by name: from shapes alone, nothing is compiled.

    What is too much here does not fit; what is not may yet fail for its temporaries.

    Raises:
      ValueError: sizes that the mesh does not divide.
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
      config: the run's.
      lm: the target.
      chip: peaks of a device.
      devices: of the mesh; they need not be there.
      steps: which to compile.
      blocks: two depths to compile in place of the model's own, from which its costs follow: a step's costs lie on a
        line, its blocks being alike. Models whose blocks differ by layer need multiples of their period. Steps that
        loop over blocks (`model.scan_blocks`) are compiled at the model's own depth all the same.
      lengths: of the prompts.
      compiled: told of every compiled program: step, blocks, cost, text.

    Raises:
      ValueError: sizes that the mesh does not divide, or depths that are not two within the model.
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
    return Plan(chip, dict(mesh.shape), plans, rl.activations * rl.group, tuple(sorted(blocks)))


def _by_step(held: dict[str, dict[str, float]], steps: Sequence[str]) -> dict[str, dict[str, float]]:
    return {
        name: {key: size for model in STAGE_MODELS[name] for key, size in held[model].items()}
        for name in steps
    }


def _held(run: AbstractRun) -> dict[str, dict[str, float]]:
    """Bytes a device of what lives between steps, by the names in STAGE_MODELS and by what is shown."""
    model, lora, sizes = run.config.model, run.config.lora, bytes_per_device
    held = {
        "target": {"target": sizes(run.target)},
        "reference": {"reference": sizes(run.reference)},
        "weights": {"sampling weights": sizes(run.copied)},
    }
    for name, state in run.states.items():
        parts = {"params": state.params, "optimizer": state.opt_state}
        held[name] = {f"{name} {part}": sizes(tree) for part, tree in parts.items()}
    if not lora.rank:
        return held
    # The target's weights are everyone's base.
    held["av"]["target"] = held["ar"]["target"] = sizes(run.target)
    held["reference"] = {"reference": sizes(run.states["av"].params)}
    if model.scan_blocks:
        held["ar"]["base of the ar"] = sizes(run.bases["ar"].lm)
    return held


def _depth(config: ExperimentConfig, lm: LMConfig, step: str) -> int:
    """Blocks that a step runs."""
    stops = step in ("ar_sft", "ar_update") or (step == "extract" and not config.extraction.next_words)
    return config.model.layer + 1 if stops else lm.num_layers


def _cut(config: ExperimentConfig, lm: LMConfig, blocks: int) -> tuple[ExperimentConfig, LMConfig]:
    """A run on the first blocks of a model, all of which its AR keeps as well."""
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
    """Configs with one knob turned towards less memory, each with what was done."""

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
