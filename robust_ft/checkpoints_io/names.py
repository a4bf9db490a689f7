"""Tables of our parameter paths and another format's names, checked strictly in both directions."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax

from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.errors import UserError
from robust_ft.models.config import ModelConfig
from robust_ft.models.model import Model
from robust_ft.trainable import flatten

LAYER = "{i}"


@dataclass(frozen=True)
class Name:
    """One row of a family's table; `{i}` is the layer number, the same in both names.

    Attributes:
        ours: Our path, such as "encoder/layers_{i}/mlp/wo/kernel".
        theirs: The other format's name.
        transpose: Whether the other format has the transposed matrix, [outputs, inputs].
    """

    ours: str
    theirs: str
    transpose: bool = False

    def match(self, path: str) -> str | None:
        """Returns the other format's name for our path, None if the row is for other paths."""
        pattern = re.escape(self.ours).replace(re.escape(LAYER), r"(?P<i>\d+)", 1)
        pattern = pattern.replace(re.escape(LAYER), r"(?P=i)")  # a second {i}: the same number
        match = re.fullmatch(pattern, path)
        if match is None:
            return None
        return self.theirs.replace(LAYER, match["i"]) if LAYER in self.ours else self.theirs


@dataclass(frozen=True)
class Redundant:
    """What a family's files may hold beyond the model's parameters.

    Attributes:
        duplicates: (copy, original), such as the encoder's copy of a shared embedding. Both are
            checked to be equal; a file may hold either or both.
        ignored: Regexes, matched in full, of names that the model has no use for, such as buffers
            with attention masks.
        prefix: The prefix that all names lack in files of base models, saved without a head
            ("transformer.").
    """

    duplicates: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    prefix: str = ""


@dataclass(frozen=True)
class Resolved:
    """Tensors under our paths, and what is needed to write the same files again.

    Attributes:
        tensors: {parameter path: tensor}.
        duplicates: {copy: original} of the copies that the files held.
        stand_ins: {name that the files lacked: name of the copy that they held instead}.
    """

    tensors: dict[str, Tensor]
    duplicates: dict[str, str]
    stand_ins: dict[str, str]

    def notes(self) -> dict[str, Any]:
        """Returns all but the tensors as plain data, without what is empty."""
        notes = {name: getattr(self, name) for name in ("duplicates", "stand_ins")}
        return {name: value for name, value in notes.items() if value}


def expand(names: Iterable[Name], config: ModelConfig) -> dict[str, tuple[str, bool]]:
    """Returns {our path: (their name, transpose)} for every parameter of the config's model.

    The model decides which parameters there are: a table holds the rows that any config of the
    family needs, and no sizes.
    """
    return _expand(tuple(names), parameter_shapes(config))


def parameter_shapes(config: ModelConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Returns {our path: shape and type} of the config's model."""
    return _shapes(cast(Any, config))


@functools.lru_cache(maxsize=16)
def _shapes(config: Any) -> Mapping[str, jax.ShapeDtypeStruct]:
    return flatten(Model(config).shapes())  # tracing a large model takes seconds


def with_prefix(
    tensors: Mapping[str, Tensor], names: Iterable[Name], redundant: Redundant
) -> tuple[dict[str, Tensor], str]:
    """Returns a file's tensors under the names of whole models, and the prefix that they lacked."""
    prefix = redundant.prefix
    if not prefix or any(name.startswith(prefix) for name in tensors):
        return dict(tensors), ""
    known = {name.theirs for name in names} | {copy for copy, _ in redundant.duplicates}
    return {name if name in known else prefix + name: t for name, t in tensors.items()}, prefix


def resolve(
    names: Iterable[Name],
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    source: str,
    redundant: Redundant = Redundant(),
    tied: Mapping[str, str] | None = None,
) -> Resolved:
    """Matches the model's parameters and the tensors of a file, one to one.

    Args:
        names: The family's table.
        config: Determines the parameters and their shapes.
        tensors: {the other format's name: tensor}.
        source: What to call the checkpoint in errors.
        redundant: What it may hold beyond the model's parameters.
        tied: {name: name of the tensor that is used if the file lacks it}.

    Raises:
        UserError: A tensor has no place, a place no tensor, a shape differs, or a copy differs from
            its original.
    """
    shapes = parameter_shapes(config)
    table = _expand(tuple(names), shapes)
    missing = [theirs for theirs, _ in table.values() if theirs not in tensors]
    wanted = {theirs for theirs, _ in table.values()}
    # A name may be a copy in one config and a parameter in another: a head, tied or not.
    copies = {copy: name for copy, name in redundant.duplicates if copy not in wanted}
    stand_ins = _stand_ins(missing, tensors, copies, tied or {})
    claimed = {stand_ins.get(theirs, theirs) for theirs in wanted}
    duplicates, unplaced = {}, []
    for name in tensors.keys() - claimed:
        original = copies.get(name)
        original = stand_ins.get(original, original) if original else None
        if original in claimed and original in tensors:
            _check_equal(tensors[name], tensors[original])
            duplicates[name] = original
        elif not any(re.fullmatch(pattern, name) for pattern in redundant.ignored):
            unplaced.append(name)
    missing = [theirs for theirs in missing if theirs not in stand_ins]
    if unplaced or missing:
        raise UserError(misfit(source, unplaced, missing))
    ours = {}
    for path, (theirs, transpose) in table.items():
        tensor = tensors[stand_ins.get(theirs, theirs)]
        tensor = tensor.transposed() if transpose else tensor
        if tensor.shape != shapes[path].shape:
            raise UserError(
                f"{tensor.where} has shape {_shape(tensor.shape, transpose)}, the config asks for "
                f"{_shape(shapes[path].shape, transpose)}."
            )
        ours[path] = tensor
    return Resolved(ours, dict(sorted(duplicates.items())), stand_ins)


def misfit(source: str, unplaced: Sequence[str], missing: Sequence[str]) -> str:
    """Returns the error for a checkpoint of another model, with both lists of names."""
    lines = [
        f"'{source}' does not fit the model: {len(unplaced)} tensors have no place in it, "
        f"{len(missing)} places have no tensor.",
        f"  Tensors with no place: {', '.join(sorted(unplaced)) or 'none'}",
        f"  Places with no tensor: {', '.join(sorted(missing)) or 'none'}",
    ]
    return "\n".join(lines)


def _expand(names: Sequence[Name], paths: Iterable[str]) -> dict[str, tuple[str, bool]]:
    table = {}
    for path in paths:
        hits = [(their, name.transpose) for name in names if (their := name.match(path))]
        if len(hits) != 1:
            raise ValueError(f"{len(hits)} rows of the table name the parameter {path}.")
        table[path] = hits[0]
    if len({theirs for theirs, _ in table.values()}) < len(table):
        raise ValueError("Two parameters have the same name in the table.")
    return table


def _stand_ins(
    missing: Iterable[str],
    tensors: Mapping[str, Tensor],
    copies: Mapping[str, str],
    tied: Mapping[str, str],
) -> dict[str, str]:
    """Returns {missing name: the tensor to use instead}, for those that have one."""
    stand_ins = {}
    for name in missing:
        candidates = [copy for copy, original in copies.items() if original == name]
        if name in tied:
            # The original that it is tied to may be there only as a copy.
            candidates += [tied[name], *(c for c, o in copies.items() if o == tied[name])]
        present = [candidate for candidate in candidates if candidate in tensors]
        if present:
            stand_ins[name] = present[0]
    return stand_ins


def _check_equal(copy: Tensor, original: Tensor) -> None:
    if not copy.equals(original):
        raise UserError(
            f"{copy.where} differs from {original.where}, whose copy it should be; the model has "
            "one place for both."
        )


def _shape(shape: tuple[int, ...], transpose: bool) -> tuple[int, ...]:
    return shape[::-1] if transpose else shape
