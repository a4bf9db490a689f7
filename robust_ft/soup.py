"""Averages the parameters of finished runs: python -m robust_ft.soup RUN RUN [...] --output=DIR

The runs, such as seeds of one recipe, have finetuned the same model from the same checkpoint. The
mean of what they ended with is one model, in a model directory of its own, which costs no more than
each of them (model soups, Wortsman et al., 2022, arXiv 2203.05482). LoRAs are merged first.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from robust_ft import command_line

if TYPE_CHECKING:
    import numpy as np

    from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
    from robust_ft.finished_run import FinishedStage
    from robust_ft.vocabulary import Vocabulary

FORMATS = ("robust_ft", "hf", "t5x")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = command_line.Parser(
        "python -m robust_ft.soup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a finished run's MODEL_DIR")
    parser.add_argument("--stage", help="of each run; its last by default")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--to", dest="output_format", choices=FORMATS, default="robust_ft")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    arguments = parser.parse_args(argv)
    soup(
        arguments.runs,
        arguments.output,
        arguments.output_format,
        stage=arguments.stage,
        overwrite=arguments.overwrite,
    )
    return 0


def soup(
    runs: Sequence[str],
    output: str,
    output_format: str = "robust_ft",
    *,
    stage: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the mean of several finished runs' parameters as a model directory.

    Args:
        runs: Their folders.
        output: The directory.
        output_format: "robust_ft", "hf" or "t5x".
        stage: A stage of each run; by default what it ended with.
        overwrite: Whether to replace an existing output.

    Raises:
        UserError: They do not start from the same checkpoint, have different shapes or
            vocabularies, or hold what cannot be merged into weights; or the output exists.
    """
    from robust_ft import console, model_directory
    from robust_ft.checkpoints_io import outputs
    from robust_ft.errors import UserError
    from robust_ft.files import check_local
    from robust_ft.finished_run import FinishedStage

    check_local(output, "The output")
    outputs.check(Path(output).expanduser(), overwrite)
    if len({Path(run).expanduser().resolve() for run in runs}) < max(len(runs), 2):
        raise UserError("A soup is the mean of two or more different runs; name each once.")
    stages = [FinishedStage.read(run, stage) for run in runs]
    _check_starts(stages)
    models, (vocabulary, *others) = zip(*map(_merged, stages), strict=True)
    _check_alike(models, vocabulary, others)
    mean = _mean(models)
    with outputs.replacing(Path(output), overwrite) as temporary:
        temporary.mkdir()
        mean = dataclasses.replace(mean, source=output)
        model_directory.write(mean, temporary, output_format, vocabulary)
    console.print_line(
        f"{len(mean.tensors)} parameters, the mean of {len(runs)} runs, in {output}."
    )


def _check_starts(stages: Sequence["FinishedStage"]) -> None:
    from robust_ft.errors import UserError

    starts = [_start(stage) for stage in stages]
    for stage, (place, content) in zip(stages[1:], starts[1:], strict=True):
        if content != starts[0][1]:
            raise UserError(
                f"'{stage.folder}' started from '{place}', '{stages[0].folder}' from "
                f"'{starts[0][0]}', whose content is another; the mean of such models is none."
            )


def _start(stage: "FinishedStage") -> tuple[str, str]:
    """Returns where a run started from, and a hash of it, or its path where none was recorded."""
    from robust_ft.errors import UserError
    from robust_ft.run_record import RunRecord
    from robust_ft.stage import SCRATCH

    first = stage.first()
    place = first.record.restored_from
    if place == SCRATCH:
        raise UserError(
            f"'{stage.folder}' started from scratch: the mean of models that were drawn apart is "
            "none; give runs that finetune one checkpoint."
        )
    record = RunRecord.read(first.folder.parent)
    content = record.settings.get(f"stages.{first.folder.name}.restore") if record else None
    return place, str(content or place)


def _merged(stage: "FinishedStage") -> "tuple[Checkpoint, Vocabulary]":
    from robust_ft.checkpoints_io import merging
    from robust_ft.errors import UserError
    from robust_ft.model_directory import FinishedModel

    model = FinishedModel.read(stage, None)
    mergeable, rest = merging.split(model.adapter)
    if rest:
        kind = type(rest[0]).__name__
        raise UserError(
            f"'{stage.folder}' holds a {kind}, which cannot be merged into a model's weights; a "
            "soup is of models that were finetuned themselves, or with LoRA or (IA)³."
        )
    return merging.merged(mergeable, model.base), model.vocabulary


def _check_alike(
    models: Sequence["Checkpoint"], vocabulary: "Vocabulary", others: Sequence["Vocabulary"]
) -> None:
    from robust_ft.errors import UserError
    from robust_ft.vocabulary.base import same_vocabulary

    first = models[0]
    for model, other in zip(models[1:], others, strict=True):
        for path in sorted(first.tensors.keys() | model.tensors.keys()):
            shapes = [
                list(each.tensors[path].shape) if path in each.tensors else "missing"
                for each in (first, model)
            ]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"'{path}' is {shapes[0]} in '{first.source}', but {shapes[1]} in "
                    f"'{model.source}'; a soup is of models of one shape."
                )
        if not same_vocabulary(vocabulary, other):
            raise UserError(
                f"'{first.source}' and '{model.source}' have different vocabularies; a soup is of "
                "models of one."
            )


def _mean(models: Sequence["Checkpoint"]) -> "Checkpoint":
    """Returns the mean, computed in float32 when a tensor is read, in the first one's dtype."""
    first = models[0]
    tensors = {
        path: dataclasses.replace(
            tensor, read=functools.partial(_read_mean, [each.tensors[path] for each in models])
        )
        for path, tensor in first.tensors.items()
    }
    return dataclasses.replace(first, tensors=tensors)


def _read_mean(tensors: "Sequence[Tensor]") -> "np.ndarray":
    import numpy as np

    total = np.zeros(tensors[0].shape, np.float32)
    for tensor in tensors:
        total += tensor.load().astype(np.float32)
    mean: np.ndarray = total / np.float32(len(tensors))
    return mean


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
