"""How time and memory grow with activations, group, answer length and depth."""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import alternate, exponent, markdown, progress
from benchmarks.setting import OPTIMIZER, Setting, with_depth
from nla_jax.training.grpo import PolicyLossConfig, Rollouts, grpo_step
from nla_jax.training.state import TrainState


def growth(setting: Setting) -> list[dict[str, Any]]:
    """Vary one size at a time around a middle, for generation and for the policy update."""
    blocks = setting.config.num_layers
    axes = setting.sizes.growth | {"blocks": tuple(int(blocks * x) for x in setting.sizes.growth_depths)}
    middle = {axis: values[len(values) // 2] for axis, values in axes.items()}
    points: dict[tuple, tuple[float, int]] = {}
    lines = []
    for what, measure in (("generation", _generation), ("policy update", _policy_update)):
        for axis, values in ((axis, values) for axis, values in axes.items() if len(values) > 1):
            for value in values:
                point = middle | {axis: value}
                key = (what, *point.values())
                if key not in points:
                    points[key] = measure(setting, *point.values())
                    progress(f"growth: {what} {point}: {points[key][0]:.3f} s")
            measured = [points[(what, *(middle | {axis: value}).values())] for value in values]
            seconds, temporary = zip(*measured, strict=True)
            lines.append(
                {
                    "what": what,
                    "axis": axis,
                    "dtype": setting.dtype,
                    "values": values,
                    "seconds": seconds,
                    "temp_bytes": temporary,
                    "time_exponent": exponent(values, seconds),
                    "memory_exponent": exponent(values, temporary),
                }
            )
    return lines


def growth_table(lines: list[dict[str, Any]]) -> str:
    """A markdown table with one line an axis; an exponent of 1 is linear growth, a smaller one has a constant part."""
    columns = ("what", "dtype", "axis", "values", "seconds", "exponent", "temp MB", "exponent")
    return markdown(
        columns,
        [
            (
                line["what"],
                line["dtype"],
                line["axis"],
                ", ".join(map(str, line["values"])),
                ", ".join(f"{x:.3g}" for x in line["seconds"]),
                f"{line['time_exponent']:.2f}",
                ", ".join(f"{x / 1e6:.4g}" for x in line["temp_bytes"]),
                f"{line['memory_exponent']:.2f}",
            )
            for line in lines
        ],
    )


def _deep(setting: Setting, blocks: int) -> Setting:
    config, params = with_depth(setting.lm.config, setting.lm.params, blocks)
    return dataclasses.replace(setting, lm=dataclasses.replace(setting.lm, config=config, params=params))


def _timed(compiled: Any, call: Callable[[], Any], repeats: int) -> tuple[float, int]:
    """Median seconds of a compiled call, and the bytes of its temporaries."""
    (times,) = alternate(call, repeats=repeats)
    return statistics.median(times), compiled.memory_analysis().temp_size_in_bytes


def _generation(setting: Setting, activations: int, group: int, length: int, blocks: int):
    setting = _deep(setting, blocks)
    verbalizer = setting.verbalizer
    write = jax.jit(functools.partial(verbalizer.sample, group=group, max_tokens=length))
    arguments = (
        verbalizer.init(setting.lm.params),
        jnp.asarray(setting.activations(activations)),
        jax.random.key(0),
    )
    compiled = write.lower(*arguments).compile()
    return _timed(compiled, lambda: jax.block_until_ready(compiled(*arguments)), setting.repeats)


def _policy_update(setting: Setting, activations: int, group: int, length: int, blocks: int):
    setting = _deep(setting, blocks)
    verbalizer, optimizer = setting.verbalizer, OPTIMIZER.build()
    params = verbalizer.init(setting.master_params)
    state, reference = TrainState.create(params, optimizer), jax.jit(verbalizer.frozen)(params)
    static = {"verbalizer": verbalizer, "optimizer": optimizer, "config": PolicyLossConfig()}
    shape = (activations, group)
    columns = jax.device_put(
        (
            setting.activations(activations),
            setting.tokens(activations * group, length).reshape(*shape, length),
            np.full(shape, length, np.int32),
            np.full((*shape, length), -1.0, np.float32),
            np.random.default_rng(4).standard_normal(shape, np.float32),
        )
    )

    def update(state, columns, reference):
        return grpo_step(state, Rollouts(*columns), reference, **static)

    compiled = jax.jit(update, donate_argnums=0).lower(state, columns, reference).compile()

    def call() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, columns, reference))

    return _timed(compiled, call, setting.repeats)
