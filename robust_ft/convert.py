"""Converts models: python -m robust_ft.convert --from=hf --to=robust_ft --input=DIR --output=DIR

Formats are hf (a Hugging Face directory, or a name on the hub), t5x (a checkpoint_<step> of t5x)
and robust_ft (a model directory of this program). --from is detected from the files if not given.
peft is an adapter (LoRA, soft prompt or prefix) without its base model:

  --from=peft --input=ADAPTER --output=DIR            an adapter that INITIAL_CHECKPOINT_PATH names
  --from=peft --input=ADAPTER --to=hf --base=DIR ...  the base with a LoRA merged into it
  --to=peft   --input=STAGE --base=DIR --output=DIR   what a stage trained, for PEFT

A stage of a finished run (its export, or else its selected checkpoint) and a checkpoint_<step> hold
only the trained parameters; --base names the model that the stage started from, which supplies the
other parameters, the config and the vocabulary. An --output that ends in .safetensors is one file
of parameters, which INITIAL_CHECKPOINT_PATH can name; it needs no --base.
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
    parser.add_argument("--input", required=True, help="a model, a stage or a checkpoint")
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
    dtype: str | None = None,
    base: str | None = None,
    config: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model or an adapter in another format, tensor by tensor.

    Args:
        source: A model directory, a stage's directory, or a file of parameters.
        output: A directory, or a `.safetensors` file, which holds parameters and no config.
        source_format: One of FORMATS; detected from the files if not given.
        output_format: One of FORMATS, for an `output` that is a directory.
        dtype: The dtype of floats in the output; unchanged if not given.
        base: The model that supplies what `source` does not hold.
        config: Fields that replace those of the source's config, or of the adapter for "peft".
        overwrite: Whether to replace an existing output.

    Raises:
        UserError: The source is missing, broken or does not match its config, or the output exists
            or cannot be written. An earlier output is then untouched.
    """
    from robust_ft import console
    from robust_ft.checkpoints_io import outputs, safetensors_files
    from robust_ft.errors import UserError

    outputs.check(Path(output).expanduser(), overwrite)
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
    checkpoint = _model(source, source_format, base, config).cast(dtype)
    with outputs.replacing(Path(output), overwrite) as temporary:
        temporary.mkdir()
        _write(checkpoint, temporary, output_format)
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
    from robust_ft import console
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
    if model is not None:
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
            else:  # merged in the types that both were saved in, and rounded once
                _write(merging.merged(adapter, model).cast(dtype), temporary, output_format)
    console.print_line(f"{len(tensors)} parameters ({adapter.kinds}) in {output}.")


def _is_adapter(source: str) -> bool:
    from robust_ft.checkpoints_io import peft

    return peft.is_directory(Path(source).expanduser())


def _write(checkpoint: "Checkpoint", folder: Path, output_format: str) -> None:
    from robust_ft.checkpoints_io import hf, native, t5x

    {"hf": hf, "t5x": t5x, "robust_ft": native}[output_format].write(checkpoint, folder)


def _model(
    source: str, source_format: str | None, base: str | None, config: dict[str, Any] | None
) -> "Checkpoint":
    from robust_ft.checkpoints_io import sources

    if base is None:
        return sources.read(source, source_format, config)
    model = sources.read(base, None, config)
    return sources.overlaid(model, sources.weights(source), source)


def _weights(
    source: str, source_format: str | None, base: str | None, config: dict[str, Any] | None
) -> dict[str, "Tensor"]:
    from robust_ft.checkpoints_io import sources

    if base is not None or (source_format == "hf" and not Path(source).exists()):
        return dict(_model(source, source_format, base, config).tensors)
    return sources.weights(source)


def _selected(source: str) -> str:
    """Returns a finished stage's export, or else its selected checkpoint; other paths unchanged.

    The export is preferred because it records methods and base.
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
