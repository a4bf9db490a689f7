"""The table of a model's parameters, and which of them train."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from robust_ft.models.peft import Peft
from robust_ft.trainable import flatten
from robust_ft.types import Params

_LAYER = re.compile(r"(?<=layers_)\d+")


@dataclasses.dataclass(frozen=True)
class _Row:
    """One line: a parameter, or equal ones of several layers."""

    path: str
    copies: int
    shape: str
    dtype: str
    size: int
    trains: bool


def report(
    params: Params, trained: frozenset[str], peft: Sequence[Peft] = (), compact: bool = False
) -> str:
    """Returns a table: path, shape, dtype, size, share of all, trainable or frozen.

    The parameters of each PEFT method follow at the end, below the method's name. The last lines
    are totals.

    Args:
        params: All parameters, or their shapes and dtypes.
        trained: Paths of the parameters that train.
        peft: The model's PEFT methods.
        compact: Whether equal layers share a line: `decoder/layers_{0..11}/mlp/wo/kernel` is twelve
            parameters of one shape and dtype, all trainable or all frozen; the size is their sum.
    """
    sections = {
        title: list(_rows(leaves, trained, compact))
        for title, leaves in _sections(params, peft).items()
    }
    total = sum(row.size for rows in sections.values() for row in rows)
    lines: list[tuple[str, ...]] = []
    for title, rows in sections.items():
        lines += [(f"{title}:", *[""] * 6)] if title and rows else []
        lines += [_cells(row, total) for row in rows]
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        f"{path:{width[0]}}  {copies:>{width[1]}}  {shape:{width[2]}}  {dtype:{width[3]}}  "
        f"{size:>{width[4]}}  {share:>{width[5]}}  {state}".rstrip()
        for path, copies, shape, dtype, size, share, state in lines
    ]
    return "\n".join([*table, *_sums(sections, total), summary(params, trained)])


def summary(params: Params, trained: frozenset[str]) -> str:
    """Returns one line: how many parameters there are and how many of them train."""
    sizes = {path: math.prod(leaf.shape) for path, leaf in flatten(params).items()}
    total = sum(sizes.values())
    count = sum(sizes[path] for path in trained)
    return (
        f"{total:,} parameters, {count:,} trainable ({count / total:.4%}), {total - count:,} frozen"
    )


def _sections(params: Params, peft: Sequence[Peft]) -> dict[str, dict[str, Any]]:
    """Returns {title: {path: leaf}}, the base under "" first, then the methods."""
    titles = {method.name: f"{type(method).__name__} '{method.name}'" for method in peft}
    sections: dict[str, dict[str, Any]] = {title: {} for title in ("", *titles.values())}
    for path, leaf in flatten(params).items():
        owners = [titles[method.name] for method in peft if method.owns(path)]
        sections[owners[0] if owners else ""][path] = leaf
    return sections


def _rows(leaves: Mapping[str, Any], trained: frozenset[str], compact: bool) -> Iterator[_Row]:
    groups: dict[tuple[str, str, str, bool], list[str]] = {}
    for path, leaf in leaves.items():
        template = _LAYER.sub("{}", path, count=1) if compact else path
        key = (template, str(tuple(leaf.shape)), str(leaf.dtype), path in trained)
        groups.setdefault(key, []).append(path)
    for (template, shape, dtype, trains), paths in groups.items():
        numbers = sorted(int(match[0]) for path in paths if (match := _LAYER.search(path)))
        path = template.replace("{}", f"{{{_ranges(numbers)}}}") if len(paths) > 1 else paths[0]
        size = sum(math.prod(leaves[each].shape) for each in paths)
        yield _Row(path, len(paths), shape, dtype, size, trains)


def _ranges(numbers: Sequence[int]) -> str:
    """Returns sorted numbers as text: "0..11", "0,1", "0..3,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(
        f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs
    )


def _cells(row: _Row, total: int) -> tuple[str, ...]:
    copies = f"{row.copies} ×" if row.copies > 1 else ""
    state = "trainable" if row.trains else "frozen"
    return (
        row.path, copies, row.shape, row.dtype, f"{row.size:,}", f"{row.size / total:.4%}", state
    )  # fmt: skip


def _sums(sections: Mapping[str, Iterable[_Row]], total: int) -> list[str]:
    """Returns the totals of the base and each PEFT method; nothing if there is only a base."""
    sizes = {title or "Base": sum(row.size for row in rows) for title, rows in sections.items()}
    lines = [f"{title}: {size:,} parameters ({size / total:.4%})" for title, size in sizes.items()]
    return lines if len(lines) > 1 else []
