"""Rows of a preflight: the memory of each program on a topology, and what would lower it."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax

from robust_ft import console
from robust_ft.errors import UserError
from robust_ft.objectives.meta_learning import MetaLearning
from robust_ft.partitioning import Partitioner
from robust_ft.preflight import flops, programs
from robust_ft.preflight.compiled import Compiled, compile_for
from robust_ft.preflight.topology import GIB, Topology
from robust_ft.recipe import Recipe
from robust_ft.stage import Stage


@dataclasses.dataclass(frozen=True)
class Row:
    """One program on one topology; bytes are per chip.

    Attributes:
        stage: The stage's name.
        program: See `programs.Program.name`.
        topology: Such as "v5e:2x4".
        chips: Number of chips.
        peak_bytes: Peak memory. If the program does not fit, what it would need, as far as the
            compiler tells.
        hbm_bytes: Memory of a chip.
        parameter_bytes: All parameters, a teacher's included.
        optimizer_bytes: The optimizer's state.
        flops: FLOPs of matrix products, of all chips together; when decoding, of outputs of the
            greatest length.
        collectives: Bytes of collectives' results, by kind; None if unknown.
        compile_seconds: Compile time.
        advice: What would lower the peak, if the program does not fit.
    """

    stage: str
    program: str
    topology: str
    chips: int
    peak_bytes: int
    hbm_bytes: int
    parameter_bytes: int
    optimizer_bytes: int
    flops: int
    collectives: dict[str, int] | None
    compile_seconds: float
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.hbm_bytes

    @property
    def activation_bytes(self) -> int:
        """The rest of the peak: activations, gradients, KV caches, batches."""
        return max(self.peak_bytes - self.parameter_bytes - self.optimizer_bytes, 0)

    @property
    def collective_bytes(self) -> int | None:
        return None if self.collectives is None else sum(self.collectives.values())

    @property
    def verdict(self) -> str:
        need, have = _gib(self.peak_bytes), _gib(self.hbm_bytes)
        return f"{self.program} of stage '{self.stage}' needs {need} GiB of a chip's {have}"

    def to_json(self) -> dict[str, Any]:
        """Returns the row as one JSON object."""
        derived = ("fits", "activation_bytes", "collective_bytes")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def of_stage(
    recipe: Recipe, stage: Stage, topology: Topology, names: Collection[str]
) -> Iterator[Row]:
    """Compiles a stage's programs for a topology, one after the other.

    Args:
        recipe: The recipe, with its mesh on the topology's devices.
        stage: One of its stages.
        topology: The topology.
        names: The programs to compile; see `Row.program`.
    """
    if "train_step" in names:
        train = programs.train_step(recipe, stage)
        compiled = _compiled(train, topology)
        yield _row(
            recipe, stage, topology, train, compiled, train.optimizer_bytes, compiled.peak_bytes
        )
    if not {"decode_step", "infer_step"} & set(names):
        return
    if (decode := programs.decode_step(recipe, stage)) is not None:
        compiled = _compiled(decode, topology)
        # During training, the optimizer's state stays in memory beside the evaluation.
        for name, beside in (("decode_step", decode.optimizer_bytes), ("infer_step", 0)):
            if name in names:
                program, peak = decode._replace(name=name), compiled.peak_bytes + beside
                yield _row(recipe, stage, topology, program, compiled, beside, peak)


def settings(recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """Yields gin bindings to try, those that cost least speed first; each adds to those before."""
    bindings: tuple[str, ...] = ()
    yield bindings
    config: Any = recipe.parts[0].model.config
    if recipe.partitioner.fully_sharded == 1:
        bindings += ("FULLY_SHARDED=-1",)
        yield bindings
    if getattr(config, "remat", "full") != "full":
        bindings += (f"{type(config).__name__}.remat='full'",)
        yield bindings
    microbatches = max((stage.microbatches for stage in recipe.stages), default=1)
    while microbatches < min(map(_most_microbatches, recipe.stages), default=0):
        microbatches *= 2
        yield (*bindings, *_microbatches(recipe.stages, microbatches))
    if config.param_dtype == "float32":
        yield (
            *bindings,
            *_microbatches(recipe.stages, microbatches),
            f"{type(config).__name__}.param_dtype='bfloat16'",
        )


def _microbatches(stages: Sequence[Stage], count: int) -> list[str]:
    """Returns gin bindings; a macro of common.gin does not set groups of a meta-batch's tasks."""
    names = [
        f"{stage.name}/Stage.microbatches"
        if isinstance(stage.gradient, MetaLearning)
        else "MICROBATCHES"
        for stage in stages
    ]
    return [f"{name}={count}" for name in dict.fromkeys(names)]


def _most_microbatches(stage: Stage) -> int:
    """Returns how many are worth trying: with a meta-learning rule one for each task."""
    rule = stage.gradient
    return rule.tasks if isinstance(rule, MetaLearning) else min(8, stage.batch_size)


def print_rows(rows: Sequence[Row]) -> None:
    """Prints a table of all rows, then advice for those that do not fit."""
    console.print_table(
        f"GiB a chip on {rows[0].topology}, {rows[0].chips} chips of {_gib(rows[0].hbm_bytes)}",
        ["stage", "program", "fits", "peak", "params", "optim", "rest", "sent", "TFLOP", "compile"],
        [
            [
                row.stage,
                row.program,
                "yes" if row.fits else "NO",
                _gib(row.peak_bytes),
                _gib(row.parameter_bytes),
                _gib(row.optimizer_bytes),
                _gib(row.activation_bytes),
                _gib(row.collective_bytes),
                f"{row.flops / 1e12:.3g}",
                f"{row.compile_seconds:.0f} s",
            ]
            for row in rows
        ],
        caption="rest: activations, gradients, caches; sent: what collectives leave on a chip in "
        "one step; TFLOP: matrix products of all chips in one step",
    )
    for row in rows:
        if not row.fits:
            console.print_line(f"{row.verdict}. {' '.join(row.advice)}")


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / GIB:.2f}"


def _compiled(program: programs.Program, topology: Topology) -> Compiled:
    arguments = program.parameter_bytes
    if program.name == "train_step":
        arguments += program.optimizer_bytes
    try:
        return compile_for(program.traced.lower(), arguments, topology.chip.hbm)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"The compiler cannot make {program.name} for {topology.name}: {reason}"
        ) from None


def _row(
    recipe: Recipe,
    stage: Stage,
    topology: Topology,
    program: programs.Program,
    compiled: Compiled,
    optimizer_bytes: int,
    peak_bytes: int,
) -> Row:
    row = Row(
        stage=stage.name,
        program=program.name,
        topology=topology.name,
        chips=len(topology.devices),
        peak_bytes=peak_bytes,
        hbm_bytes=topology.chip.hbm,
        parameter_bytes=program.parameter_bytes,
        optimizer_bytes=optimizer_bytes,
        flops=flops.count(program.traced, program.trips),
        collectives=compiled.collective_bytes,
        compile_seconds=compiled.seconds,
    )
    advice = () if row.fits else tuple(_advice(recipe, stage, row))
    return dataclasses.replace(row, advice=advice)


def _advice(recipe: Recipe, stage: Stage, row: Row) -> Iterator[str]:
    """Yields what would lower a row's peak, starting with what costs least speed."""
    config: Any = stage.model.config
    name = type(config).__name__
    partitioner = recipe.partitioner
    state_bytes = row.parameter_bytes + row.optimizer_bytes
    if partitioner.mesh.shape["fsdp"] == 1 and row.chips > 1:
        yield (
            f"Shard parameters over the chips with FULLY_SHARDED=-1: "
            f"{state_bytes / GIB:.2f} GiB become about {state_bytes / row.chips / GIB:.2f}."
        )
    if config.dtype == "float32":
        yield f"Compute in bfloat16 with {name}.dtype='bfloat16'."
    if row.program != "train_step":
        yield "Lower EVAL_BATCH_SIZE or BEAM_SIZE."
    else:
        if getattr(config, "remat", "full") != "full":
            yield f"Keep no activations inside layers with {name}.remat='full'."
        yield from _advice_on_microbatches(partitioner, stage)
    if config.param_dtype == "float32":
        yield f"Keep parameters in bfloat16 with {name}.param_dtype='bfloat16': half as large."
    yield "Take a larger slice; --find looks for the smallest."


def _advice_on_microbatches(partitioner: Partitioner, stage: Stage) -> Iterator[str]:
    *_, more = _microbatches([stage], 2 * stage.microbatches)
    if isinstance(stage.gradient, MetaLearning):
        if (tasks := stage.gradient.tasks // stage.microbatches) > 1:
            yield f"Compute fewer than {tasks} tasks side by side with {more}."
    elif (rows := stage.batch_size // (partitioner.batch_shards * stage.microbatches)) > 1:
        yield f"Split a chip's {rows} examples into microbatches with {more}."
