"""Reads adapters from PEFT's directories or our own, and writes PEFT's.

PEFT's hold `adapter_config.json` and `adapter_model.safetensors`: see `peft_methods` for what each
method stores in them, and `adapters` for our own directories.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robust_ft.checkpoints_io import adapters, peft_methods, safetensors_files
from robust_ft.checkpoints_io.adapters import Adapter
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError
from robust_ft.files import read_json_object, write_json
from robust_ft.models.peft import Lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_directory(path: Path) -> bool:
    """Returns whether a directory holds an adapter, PEFT's or ours."""
    return (path / CONFIG).is_file() or adapters.is_directory(path)


def read(source: str) -> Adapter:
    """Opens an adapter's directory; tensors are read when they are needed.

    Raises:
        UserError: It is not an adapter, its method is unknown, a file is missing or broken, or its
            tensors do not match its settings.
    """
    folder = Path(source).expanduser()
    if adapters.is_directory(folder):
        return adapters.read(folder)
    if not is_directory(folder):
        raise UserError(
            f"'{source}' is no adapter: it has neither {CONFIG} (PEFT) nor {adapters.SETTINGS} "
            "(robust_ft)."
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"'{folder}' lacks {WEIGHTS}.")
    tensors = safetensors_files.read(folder / WEIGHTS)
    return peft_methods.from_peft(
        str(folder), read_json_object(folder / CONFIG, default={}), tensors
    )


def of_weights(
    source: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any] | None = None
) -> Adapter:
    """Returns the adapter that consists of these parameters, such as a stage's.

    Args:
        source: Where they come from.
        tensors: {parameter path: tensor} of one method.
        fields: Settings that parameters do not determine, such as LoRA's alpha.

    Raises:
        UserError: They are not those of one method, or a setting is missing or unknown.
    """
    kind, inferred = peft_methods.recognized(source, tensors)
    settings = dict(fields or {})
    if kind is Lora and "alpha" not in settings:
        raise UserError(
            f"'{source}' does not say which alpha its LoRA has; give --config=alpha=NUMBER, the "
            "Lora.alpha that it was trained with."
        )
    method = adapters.method(kind.__name__, inferred | settings, source)
    return Adapter(source, (method,), tensors)


def write(adapter: Adapter, base: Checkpoint, folder: Path) -> None:
    """Writes PEFT's files of an adapter into a directory.

    Raises:
        UserError: It belongs to another base, or PEFT cannot express it.
    """
    adapters.check(adapter, base)
    config, tensors = peft_methods.to_peft(adapter, base)
    write_json(folder / CONFIG, dict(sorted(config.items())))
    safetensors_files.write(folder / WEIGHTS, tensors, {"format": "pt"})
