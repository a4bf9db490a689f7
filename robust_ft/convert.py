"""Converts models: python -m robust_ft.convert --from=hf --to=robust_ft --input=DIR --output=DIR

Formats are hf (a Hugging Face directory, or a name on the hub), t5x (a checkpoint_<step> of t5x)
and robust_ft (a model directory of this program). --from is detected from the files if not given.
peft is an adapter (LoRA, soft prompt or prefix) without its base model:

  --from=peft --input=ADAPTER --output=DIR            an adapter that INITIAL_CHECKPOINT_PATH names
  --from=peft --input=ADAPTER --to=hf --base=DIR ...  the base with a LoRA merged into it
  --to=peft   --input=STAGE --base=DIR --output=DIR   what a stage trained, for PEFT

A finished run (its MODEL_DIR) or one of its stages is the model that it ended with, read from where
the run read it: LoRA is merged, a prompt, prefix or adapter lies in a folder below the model.

  --input=RUN --to=hf --output=DIR [--stage=NAME]     what a run ended with, or an earlier stage

An export and a checkpoint_<step> hold only what was trained; --base names the model that the stage
started from, which supplies the other parameters, the config and the vocabulary. With a run, it is
where that model is now. An --output that ends in .safetensors is one file of parameters, which
INITIAL_CHECKPOINT_PATH can name; it needs no --base.
"""

import argparse
import ast
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_ft import command_line

if TYPE_CHECKING:
    from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
    from robust_ft.finished_run import FinishedStage
    from robust_ft.vocabulary import Vocabulary

FORMATS = ("hf", "t5x", "robust_ft", "peft")
DTYPES = ("float32", "float16", "bfloat16")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = command_line.Parser(
        "python -m robust_ft.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source_format", choices=FORMATS)
    parser.add_argument("--to", dest="output_format", choices=FORMATS, default="robust_ft")
    parser.add_argument("--input", required=True, help="a model, a run, a stage or a checkpoint")
    parser.add_argument("--stage", help="of the run that --input names; its last by default")
    parser.add_argument("--output", required=True, help="a directory, or a .safetensors file")
    parser.add_argument("--base", metavar="DIR", help="the model that a stage started from")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of floats; unchanged by default")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the model's config, or of the adapter, that the input does not determine, "
        "such as relative_max_distance=128 or LoRA's alpha=16",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing output, once the new one is complete",
    )
    arguments = parser.parse_args(argv)
    convert(
        arguments.input,
        arguments.output,
        arguments.source_format,
        arguments.output_format,
        stage=arguments.stage,
        dtype=arguments.dtype,
        base=arguments.base,
        config=dict(_field(text) for text in arguments.config),
        overwrite=arguments.overwrite,
    )
    return 0


def convert(
    source: str,
    output: str,
    source_format: str | None = None,
    output_format: str = "robust_ft",
    *,
    stage: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    config: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model or an adapter in another format, tensor by tensor.

    Args:
        source: A model directory, a run, a stage's directory, or a file of parameters.
        output: A directory, or a `.safetensors` file, which holds parameters and no config.
        source_format: One of FORMATS; detected from the files if not given.
        output_format: One of FORMATS, for an `output` that is a directory.
        stage: A stage of the run.
        dtype: The dtype of floats in the output; unchanged if not given.
        base: The model that supplies what `source` does not hold.
        config: Fields that replace those of the source's config, or of the adapter for "peft".
        overwrite: Whether to replace an existing output.

    Raises:
        UserError: The source is missing, broken or does not match its config, or the output exists
            or cannot be written. An earlier output is then untouched.
    """
    from robust_ft import console, model_directory
    from robust_ft.checkpoints_io import outputs, safetensors_files
    from robust_ft.errors import UserError
    from robust_ft.files import check_local

    check_local(source, "The input")
    check_local(output, "The output")
    outputs.check(Path(output).expanduser(), overwrite)
    if (finished := _finished(source, stage, base)) is not None:
        _convert_run(finished, output, output_format, dtype, config, overwrite)
        return
    source = _selected(source)
    is_adapter = source_format == "peft" or _is_adapter(source)
    if is_adapter or output_format == "peft":
        _convert_adapter(source, output, is_adapter, output_format, dtype, base, config, overwrite)
        return
    if output.endswith(".safetensors"):
        tensors = {
            path: tensor.cast(dtype)
            for path, tensor in _weights(source, source_format, base, config).items()
        }
        with outputs.replacing(Path(output), overwrite) as temporary:
            safetensors_files.write(temporary, tensors)
        size = Path(output).stat().st_size
        console.print_line(f"{len(tensors)} parameters in {output} ({size:,} bytes).")
        return
    if base is None and _is_partial(source):
        raise UserError(
            f"'{source}' holds parameters without a config; give --base=DIR, the model that they "
            "belong to, or an --output that ends in .safetensors."
        )
    checkpoint, vocabulary = _model(source, source_format, base, config)
    checkpoint = checkpoint.cast(dtype)
    with outputs.replacing(Path(output), overwrite) as temporary:
        temporary.mkdir()
        model_directory.write(checkpoint, temporary, output_format, vocabulary)
    console.print_line(
        f"{len(checkpoint.tensors)} parameters ({checkpoint.nbytes:,} bytes) of a "
        f"{checkpoint.family} in {output}."
    )


def _convert_adapter(
    source: str,
    output: str,
    is_adapter: bool,
    output_format: str,
    dtype: str | None,
    base: str | None,
    config: dict[str, Any] | None,
    overwrite: bool,
) -> None:
    from robust_ft import console, model_directory
    from robust_ft.checkpoints_io import (
        adapters,
        merging,
        outputs,
        peft,
        safetensors_files,
        sources,
    )
    from robust_ft.errors import UserError

    to_file = output.endswith(".safetensors")
    if output_format != "robust_ft" and not to_file and base is None:
        raise UserError(f"--to={output_format} needs --base=DIR, the model the adapter belongs to.")
    if is_adapter:
        adapter = peft.read(source)
    else:
        adapter = peft.of_weights(source, sources.weights(source), config)
    model = sources.read(base) if base is not None else None
    vocabulary: Vocabulary | None = None
    if model is not None:
        if adapter.tokens is not None:
            model, vocabulary = adapter.tokens.applied(model, source)
        adapters.check(adapter, model)
        leaves = ((path, tensor.load()) for path, tensor in model.tensors.items())
        adapters.check_base(adapter, leaves, str(base))
    tensors = {path: tensor.cast(dtype) for path, tensor in adapter.tensors.items()}
    cast = dataclasses.replace(adapter, tensors=tensors)
    with outputs.replacing(Path(output), overwrite) as temporary:
        if to_file:
            safetensors_files.write(temporary, tensors)
        else:
            temporary.mkdir()
            if model is None or (output_format == "robust_ft" and adapter.methods):
                adapters.write(cast, temporary)
            elif output_format == "peft":
                peft.write(cast, model, temporary)
                model_directory.warn_of_a_separator(adapter.tokens, vocabulary)
            else:  # merged in the types that both were saved in, and rounded once
                whole = merging.merged(adapter, model).cast(dtype)
                model_directory.write(whole, temporary, output_format, vocabulary)
    console.print_line(f"{len(tensors)} parameters ({adapter.kinds}) in {output}.")


def _is_adapter(source: str) -> bool:
    from robust_ft.checkpoints_io import peft

    return peft.is_directory(Path(source).expanduser())


def _model(
    source: str, source_format: str | None, base: str | None, config: dict[str, Any] | None
) -> "tuple[Checkpoint, Vocabulary | None]":
    """Returns a model, and the vocabulary that it was trained with if that is recorded."""
    from robust_ft.checkpoints_io import sources, stage_record
    from robust_ft.errors import UserError

    if base is None:
        return sources.read(source, source_format, config), None
    model, vocabulary = sources.read(base, None, config), None
    record = stage_record.of_checkpoint(Path(source).expanduser())
    if record is not None:
        if record.methods:
            stage = Path(source).expanduser().parent
            raise UserError(
                f"'{source}' does not hold all that it was trained with; convert the stage with "
                f"--input={stage}."
            )
        model, vocabulary = record.tokens.applied(model, source)
    return sources.overlaid(model, sources.weights(source), source), vocabulary


def _weights(
    source: str, source_format: str | None, base: str | None, config: dict[str, Any] | None
) -> dict[str, "Tensor"]:
    from robust_ft.checkpoints_io import sources

    if base is not None or (source_format == "hf" and not Path(source).exists()):
        checkpoint, _ = _model(source, source_format, base, config)
        return dict(checkpoint.tensors)
    return sources.weights(source)


def _finished(source: str, stage: str | None, base: str | None) -> "FinishedStage | None":
    """Returns the stage that a path names, of a run that keeps records; None of all else."""
    from robust_ft.checkpoints_io import stage_record
    from robust_ft.errors import UserError
    from robust_ft.finished_run import FinishedStage

    folder = Path(source).expanduser()
    if stage_record.is_run(folder):
        return FinishedStage.read(source, stage, base)
    if stage is not None:
        raise UserError(f"'{source}' is no run, so it has no stage '{stage}'.")
    run = folder.absolute().parent
    if stage_record.is_run(run) and stage_record.StageRecord.read(folder) is not None:
        return FinishedStage.read(str(run), folder.name, base)
    return None


def _convert_run(
    stage: "FinishedStage",
    output: str,
    output_format: str,
    dtype: str | None,
    config: dict[str, Any] | None,
    overwrite: bool,
) -> None:
    from robust_ft import console
    from robust_ft.checkpoints_io import outputs, peft, safetensors_files
    from robust_ft.model_directory import FinishedModel, warn_of_a_separator

    if output.endswith(".safetensors"):
        tensors = {path: tensor.cast(dtype) for path, tensor in stage.trained().items()}
        with outputs.replacing(Path(output), overwrite) as temporary:
            safetensors_files.write(temporary, tensors)
        console.print_line(f"{len(tensors)} parameters in {output}.")
        return
    model = FinishedModel.read(stage, config)
    with outputs.replacing(Path(output), overwrite) as temporary:
        temporary.mkdir()
        if output_format == "peft":
            peft.write(model.cast(dtype).adapter, model.base, temporary)
            warn_of_a_separator(model.adapter.tokens, model.vocabulary)
            sentences = [f"{model.adapter.kinds} in {output}."]
        else:
            sentences = model.write(temporary, output, output_format, dtype)
    for sentence in sentences:
        console.print_line(sentence)


def _selected(source: str) -> str:
    """Returns a finished stage's export, or else its selected checkpoint; other paths unchanged.

    Of stages without a record, which earlier versions wrote. The export is preferred because it
    records methods and base.
    """
    from robust_ft.export import FOLDER
    from robust_ft.outcome import Outcome

    if (outcome := Outcome.read(source)) is None:
        return source
    exported = Path(source) / FOLDER
    return str(exported if exported.is_dir() else outcome.checkpoint(source))


def _is_partial(source: str) -> bool:
    from robust_ft.checkpoints_io import orbax_params

    path = Path(source).expanduser()
    return path.is_file() or orbax_params.is_directory(path)


def _field(text: str) -> tuple[str, Any]:
    from robust_ft.errors import UserError

    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--config={text} has no value; write --config=FIELD=VALUE.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a bare word


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
