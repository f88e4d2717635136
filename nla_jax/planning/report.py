"""A plan as text: tables of memory, speed and collectives, and a verdict."""

from collections import defaultdict

from nla_jax.planning.chips import GIB, Chip
from nla_jax.planning.plan import Plan, StepPlan


def render(plan: Plan) -> str:
    """Tables of a plan, and its verdict."""
    parts = [_memory(plan), _speed(plan), _collectives(plan), _verdict(plan)]
    if plan.blocks:
        low, high = plan.blocks
        parts.insert(
            0, f"Extrapolated from programs with {low} and {high} blocks, unless they loop over blocks."
        )
    return "\n\n".join(parts)


def render_held(held: dict[str, dict[str, float]], chip: Chip) -> str:
    """A table of what a device holds during each step, and the largest total of any step."""
    names = {key: None for step in held.values() for key in step}
    rows = [["GiB a device", *held]]
    rows += [[name, *(_gib(step.get(name, 0.0)) for step in held.values())] for name in names]
    totals = {name: sum(step.values()) for name, step in held.items()}
    rows.append(["held", *map(_gib, totals.values())])
    worst = max(totals, key=totals.get)
    return (
        f"{_table(rows)}\n\nAt most {_gib(totals[worst])} of {_gib(chip.memory)} GiB a device are held, in {worst}; "
        "results, temporaries and programs come on top."
    )


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _memory(plan: Plan) -> str:
    names = {key: None for step in plan.steps.values() for key in step.held}
    rows = [["GiB a device", *plan.steps]]
    rows += [[name, *(_gib(s.held.get(name, 0.0)) for s in plan.steps.values())] for name in names]
    inside = {key: None for step in plan.steps.values() for key in step.inside}

    def of(step: StepPlan, field: str) -> str:
        return "too much" if step.cost is None else _gib(getattr(step.cost, field))

    for name, field in (("results", "outputs"), ("temporaries", "temporaries"), ("program", "code")):
        rows.append([name, *(of(step, field) for step in plan.steps.values())])
        if field == "temporaries":
            rows += [
                [
                    f"  of them {part}",
                    *(_gib(s.inside[part]) if part in s.inside else "" for s in plan.steps.values()),
                ]
                for part in inside
            ]
    rows.append(["peak", *("too much" if s.cost is None else _gib(s.peak) for s in plan.steps.values())])
    return _table(rows)


def _speed(plan: Plan) -> str:
    head = ("TFLOPs", "done twice", "GB moved", "GB sent", "compute ms", "memory ms", "links ms", "XLA ms")
    rows = [["a device", *head]]
    for name, step in plan.steps.items():
        if (cost := step.cost) is None:
            rows.append([name, *[""] * len(head)])
            continue
        optimal = cost.optimal_seconds
        rows.append(
            [
                name,
                f"{cost.flops / 1e12:.3g}",
                f"{cost.redundancy - 1:.0%}",
                f"{cost.memory_traffic / 1e9:.3g}",
                f"{cost.sent / 1e9:.3g}",
                *(f"{1e3 * seconds:.3g}" for seconds in cost.bounds(plan.chip).values()),
                "" if optimal is None else f"{1e3 * optimal:.3g}",
            ]
        )
    return _table(rows)


def _collectives(plan: Plan) -> str:
    """A table row for each step and kind of collective: how often it runs, bytes sent, and the largest result."""
    rows = [["collectives", "kind", "in program", "runs", "GB sent", "largest result"]]
    for name, step in plan.steps.items():
        kinds = defaultdict(list)
        for collective in step.cost.collectives if step.cost else ():
            kinds[collective.kind].append(collective)
        for kind, collectives in sorted(kinds.items()):
            largest = max(collectives, key=lambda collective: collective.size)
            shapes = " ".join("x".join(map(str, shape)) for shape in largest.shapes[:2])
            sent = sum(collective.sent for collective in collectives)
            rows.append(
                [
                    name,
                    kind,
                    f"{len(collectives)}",
                    f"{sum(collective.times for collective in collectives)}",
                    f"{sent / 1e9:.3g}",
                    f"{largest.size / 2**20:.1f} MiB ({shapes})",
                ]
            )
    return _table(rows) if len(rows) > 1 else "collectives: none"


def _verdict(plan: Plan) -> str:
    worst = max(plan.steps.values(), key=lambda step: step.peak)
    sizes = ", ".join(f"{name}={size}" for name, size in plan.mesh.items())
    if worst.cost is None:
        lines = [f"It does not fit on {sizes}: {worst.name}: {worst.problem}"]
    else:
        verb = "fits" if plan.fits else "does not fit"
        lines = [
            f"It {verb} on {sizes}: at most {_gib(worst.peak)} of {_gib(plan.chip.memory)} GiB a device, "
            f"in {worst.name}."
        ]
    parts = worst.held | worst.inside
    if worst.cost:
        parts["other temporaries"] = max(worst.cost.temporaries - sum(worst.inside.values()), 0.0)
    largest = max(parts, key=parts.get)
    lines.append(f"The largest part is {largest}, {_gib(parts[largest])} GiB: {_KNOBS.get(largest, _SPLIT)}.")
    if (seconds := plan.round_seconds) is not None:
        lines.append(
            f"A round of joint training takes {seconds:.3g} s at the least: at most {plan.rollouts / seconds:.3g} "
            f"rollouts a second, {plan.utilisation:.1%} of the chips' peak."
        )
    return "\n".join(lines)


_SPLIT = "split it over more devices (mesh.fsdp in place of mesh.data, or a larger slice)"
_KNOBS = {
    "other temporaries": "raise micro_batches, and turn on model.remat if it is off",
    "logits chunk": "split the vocabulary with mesh.tensor",
    "logits": "sample fewer rows a round (rl.activations, rl.group)",
    "kv cache": "set model.attention_dtype to bfloat16, or sample fewer rows a round",
    "reference": "set model.dtype to bfloat16, or split it over more devices",
}
