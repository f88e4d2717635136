"""Memory traffic and collectives of a compiled program, read from its text.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as the loop can run, which is the
largest number in its condition.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.* -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_BITS = {"pred": 8, "token": 0}
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "opt-barrier",
        "partition-id",
        "replica-id",
        "domain",
        "async-update",
    )
)
"""Instructions that move no bytes."""
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program, on one device."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of its results."""
    size: float
    """Bytes of its results."""
    ways: int
    """Number of devices that take part."""
    times: int
    """How often it runs."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends, in all runs together."""
        share = (self.ways - 1) / self.ways if self.ways > 1 else 0.0
        # The operand of a scatter is `ways` times its result; a reduction is a scatter and a gather.
        factor = {
            "all-reduce": 2 * share,
            "reduce-scatter": self.ways * share,
            "collective-permute": 1.0,
        }
        return self.times * self.size * factor.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The bytes that one device moves in one run of a program."""

    memory: float
    """Bytes read from and written to its main memory; on-chip memory is left out where the text marks it."""
    collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    kind: str
    type: str
    operands: tuple[str, ...]
    rest: str


def read_traffic(text: str) -> Traffic:
    """The traffic of a compiled program, from its text (`compiled.as_text()`)."""
    computations, entry = _parse(text)
    seen: set[str] = set()
    memory, collectives = 0.0, []
    for instruction, scope, times, fused in _walk(computations, entry, 1, False):
        kind = instruction.kind.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = channel[1] if channel else instruction.name
            # Parts of a collective that is spread over several fusions share one channel; it is counted once.
            if key not in seen:
                seen.add(key)
                collectives.append(_collective(kind, instruction, times))
                if fused:
                    memory += times * _moved(instruction, computations[scope], computations)
        if not fused:
            memory += times * _moved(instruction, computations[scope], computations)
    return Traffic(memory, tuple(collectives))


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            name, kind_type, kind, rest = match.groups()
            arguments = rest.split(")", 1)[0]
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            rest = rest.split(", metadata=", 1)[0] if kind != "constant" else arguments
            current[name] = _Instruction(name, kind, kind_type, operands, rest)
    return computations, entry


def _walk(
    computations: dict, scope: str, times: int, fused: bool
) -> Iterator[tuple[_Instruction, str, int, bool]]:
    for instruction in computations[scope].values():
        yield instruction, scope, times, fused
        if instruction.kind == "while":
            body, condition = (_named(instruction.rest, key)[0] for key in ("body", "condition"))
            yield from _walk(computations, body, times * _trips(computations, condition), fused)
        elif instruction.kind == "conditional":
            branches = _named(instruction.rest, "branch_computations") or [
                _named(instruction.rest, key)[0] for key in ("true_computation", "false_computation")
            ]
            # One branch runs; the first stands for it.
            yield from _walk(computations, branches[0], times, fused)
        else:
            inside = fused or instruction.kind == "fusion"
            for called in _named(instruction.rest, "calls"):
                yield from _walk(computations, called, times, inside)
            if instruction.kind == "call":
                for called in _named(instruction.rest, "to_apply"):
                    yield from _walk(computations, called, times, fused)


def _named(rest: str, key: str) -> list[str]:
    match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", rest)
    return re.findall(r"[\w.\-]+", match[1]) if match else []


def _trips(computations: dict, condition: str) -> int:
    numbers = [
        int(match[1])
        for instruction, *_ in _walk(computations, condition, 1, False)
        if instruction.kind == "constant" and (match := re.match(r"(\d+)$", instruction.rest))
    ]
    return max(numbers, default=1)


def _arrays(type_text: str) -> Iterator[tuple[tuple[int, ...], float, bool]]:
    """For each array of a type: its shape, its bytes, and whether it lies in the device's main memory."""
    for dtype, dimensions, layout in _ARRAY.findall(type_text):
        shape = tuple(int(size) for size in dimensions.split(",") if size)
        bits = _BITS.get(dtype) if dtype in _BITS else int(re.search(r"\d+", dtype)[0])
        yield shape, math.prod(shape) * bits / 8, not re.search(r"S\([1-9]", layout)


def _size(type_text: str) -> float:
    return sum((size for _, size, main in _arrays(type_text) if main), 0.0)


def _collective(kind: str, instruction: _Instruction, times: int) -> Collective:
    arrays = [(shape, size) for shape, size, _ in _arrays(instruction.type) if size > 4]
    if instruction.kind.endswith("-start") and kind in ("all-gather", "collective-permute"):
        arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:2]  # operands come first
    return Collective(
        kind,
        tuple(shape for shape, _ in arrays),
        sum((size for _, size in arrays), 0.0),
        _ways(instruction.rest),
        times,
    )


def _ways(rest: str) -> int:
    """Number of devices in each group of a collective, from any of the three notations of groups."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return match[1].count(",") + 1
    return 2 if "source_target_pairs" in rest else 1


def _moved(instruction: _Instruction, scope: dict, computations: dict) -> float:
    """Bytes that one instruction reads from and writes to main memory."""
    kind = instruction.kind
    if kind in _FREE or kind in ("while", "conditional", "call") or kind.endswith("-done"):
        return 0.0
    sizes = [_size(scope[name].type) if name in scope else 0.0 for name in instruction.operands]
    if kind == "fusion":
        return _fusion_moved(instruction, sizes, computations[_named(instruction.rest, "calls")[0]])
    if kind in _SLICES:
        return 2 * _size(instruction.type)
    if kind == "dynamic-update-slice":
        return 2 * sizes[1]
    if kind == "copy-start":
        target = next(_arrays(instruction.type))
        return sizes[0] + target[1] * target[2]
    if kind == "slice-start":
        # The type is ((operands), slice, ...); the slice is read from main memory, mostly into on-chip memory.
        _, size, main = list(_arrays(instruction.type))[1]
        return size * (1 + main)
    if kind.endswith("-start"):
        return 2 * sum(sizes)
    return sum(sizes) + _size(instruction.type)


def _fusion_moved(fusion: _Instruction, sizes: list[float], inside: dict[str, _Instruction]) -> float:
    """Bytes that a fusion reads from and writes to main memory.

    An operand that the fusion only slices counts as the slices; a result that it updates in place counts as the update.
    Where a collective is spread over several fusions, its operands and results pass through them and are not counted.
    """
    passing = any(x.kind in COLLECTIVES for x in inside.values())
    passed = re.findall(r"\{(\d+)\}: \((\d+), \{\}\)", fusion.rest) if passing else []
    through = {int(operand) for _, operand in passed}
    users: dict[str, list[_Instruction]] = {}
    for instruction in inside.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    total = 0.0
    for parameter in (x for x in inside.values() if x.kind == "parameter"):
        index, readers = int(parameter.rest.split(")")[0]), users.get(parameter.name, [])
        if index in through:
            continue
        if readers and all(x.kind in _SLICES and x.operands[0] == parameter.name for x in readers):
            total += min(sizes[index], sum(_size(x.type) for x in readers))
        elif not all(x.kind == "dynamic-update-slice" and x.operands[0] == parameter.name for x in readers):
            total += sizes[index]
    root = list(inside.values())[-1]
    written = [inside[name] for name in root.operands] if root.kind == "tuple" else [root]
    outputs = [size if main else 0.0 for _, size, main in _arrays(fusion.type)]
    for result, _ in passed:
        outputs[int(result)] = 0.0
    for output, size in zip(written, outputs, strict=False):
        while output.kind == "bitcast":
            output = inside[output.operands[0]]
        update = output.kind == "dynamic-update-slice"
        total += min(size, _size(inside[output.operands[1]].type)) if update else size
    return total
