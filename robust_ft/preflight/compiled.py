"""What the compiler reports of a program: its peak memory, and the bytes of its collectives."""

import math
import re
import time
from collections import Counter
from typing import Any, NamedTuple

import jax

from robust_ft.preflight.topology import GIB

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Transfers between the slices of a topology, over the slower network.
BETWEEN_SLICES = "between slices"
_BITS = {"pred": 8, "bf16": 16}


class Compiled(NamedTuple):
    """A program for one topology.

    Attributes:
        peak_bytes: Peak memory of a device, arguments and results included.
        collective_bytes: Bytes of the collectives' results on each device in one run, by kind; None
            if the program does not fit, as the compiler then returns no program.
        seconds: Compile time.
        fits: Whether the program fits the device's memory.
    """

    peak_bytes: int
    collective_bytes: dict[str, int] | None
    seconds: float
    fits: bool


def compile_for(lowered: jax.stages.Lowered, argument_bytes: int, hbm: int) -> Compiled:
    """Compiles a program for the devices of its arguments' shardings.

    Args:
        lowered: The program.
        argument_bytes: Size of its arguments on each device.
        hbm: Memory of a device, in bytes.

    Raises:
        jax.errors.JaxRuntimeError: The compiler failed for another reason than lack of memory.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        peak = needed(str(error), argument_bytes)
        if peak is None:
            raise
        return Compiled(max(peak, hbm + 1), None, time.perf_counter() - start, False)
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    return Compiled(
        memory.peak_memory_in_bytes,
        collective_bytes(compiled.as_text() or ""),
        seconds,
        memory.peak_memory_in_bytes <= hbm,
    )


def needed(message: str, argument_bytes: int) -> int | None:
    """Returns the bytes per device that a program would need; None if it failed for another reason.

    Args:
        message: The compiler's error, such as "RESOURCE_EXHAUSTED: ... Used 16.6G of 15.75G hbm."
            Its figure is of all memory, or of "HLO temporaries" alone.
        argument_bytes: Size of the program's arguments on each device.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of", message)
    temporary = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message)
    figure = used or temporary
    if figure is None:
        return argument_bytes
    scale = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}[figure[2]]
    return int(float(figure[1]) * scale) + (0 if used else argument_bytes)


def collective_bytes(program: str) -> dict[str, int]:
    """Returns the bytes of collectives' results on a device in one run, by kind of collective.

    Transfers between slices are a kind of their own, `BETWEEN_SLICES`.

    Args:
        program: The compiled program as HLO text. A loop's body counts as often as it runs, once
            where that is unknown, see `_trips`.
    """
    computations, entry = _computations(program)
    if entry is None:
        return {}
    total: Counter[str] = Counter()
    for (kind, _), size in _count(entry, computations, {}).items():
        total[kind] += size
    return dict(total)


def _computations(program: str) -> tuple[dict[str, list[str]], str | None]:
    """Returns {computation: its instructions}, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry, name = None, None
    for line in program.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif line.startswith("}"):
            name = None
        elif name is not None:
            computations[name].append(line)
    return computations, entry


def _count(
    name: str,
    computations: dict[str, list[str]],
    known: dict[str, dict[tuple[str, str], int]],
) -> dict[tuple[str, str], int]:
    """Returns {(kind, channel): bytes} of the collectives in one run of a computation.

    An asynchronous collective occurs several times in the program with the same channel: where it
    starts, where it is done, and in the fusion that it overlaps with. It counts once.

    Args:
        name: The computation.
        computations: All computations' instructions.
        known: The results so far, which are added to.
    """
    if name in known:
        return known[name]
    total: dict[tuple[str, str], int] = {}
    for line in computations.get(name, []):
        sizes: dict[tuple[str, str], int] = {}
        times = _trips(line, computations)
        channel = re.search(r"channel_id=(\d+)", line) or re.match(r"\s*(?:ROOT )?(\S+) =", line)
        for kind in COLLECTIVES:
            if channel and (match := re.search(rf"= (.*?) {kind}(-start)?\(", line)):
                sizes[kind, channel[1]] = _bytes(match[1], last=bool(match[2]))
        received = re.search(r"= \((\S+), .* recv\(.*xla_megascale_runtime", line)
        if channel and received:
            sizes[BETWEEN_SLICES, channel[1]] = _bytes(received[1], last=False)
        for inner in re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", line):
            for key, size in _count(inner, computations, known).items():
                sizes[key] = times * size
        for key, size in sizes.items():
            total[key] = max(total.get(key, 0), size)
    known[name] = total
    return total


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """Returns how often an instruction's computations run: 1 unless it is a loop.

    The TPU's compiler drops `known_trip_count`. The loops of scans count from 0, and their
    condition compares with a constant.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known[1])
    condition = re.search(r" while\(.*condition=%?([\w.\-]+)", line)
    if condition is None:
        return 1
    lines = computations.get(condition[1], [])
    constants = {
        found[1]: int(found[2])
        for each in lines
        if (found := re.search(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", each))
    }
    for each in lines:
        root = re.match(r"\s*ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", each)
        if root and root[1] in constants:
            return constants[root[1]]
    return 1


def _bytes(shapes: str, last: bool) -> int:
    """Returns the bytes of an instruction's result.

    Args:
        shapes: Such as "bf16[8,128]{1,0}" or a tuple of them.
        last: Whether only the last one counts: a "-start" instruction's tuple begins with the
            operands.
    """
    sizes = []
    for dtype, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
        bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 32)
        sizes.append(math.prod(int(n) for n in shape.split(",") if n) * bits // 8)
    return (sizes[-1] if last else sum(sizes)) if sizes else 0
