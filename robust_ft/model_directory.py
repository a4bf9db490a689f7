"""Writes model directories: a checkpoint with its vocabulary, and what a run laid over it.

LoRA, (IA)³ and changed parameters of the base are merged into the weights. Prompts, prefixes and
adapters cannot be: they are written into a folder below the model that they belong to.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from robust_ft.checkpoints_io import adapters, hf, merging, native, peft, sources, t5x
from robust_ft.checkpoints_io.adapters import Adapter, Base
from robust_ft.checkpoints_io.tensors import Checkpoint
from robust_ft.checkpoints_io.tokens import Tokens
from robust_ft.errors import UserError
from robust_ft.export import FOLDER
from robust_ft.fingerprint import fingerprint
from robust_ft.finished_run import FinishedStage
from robust_ft.models.peft import Lora
from robust_ft.vocabulary import Vocabulary, write_hub_files


def write(
    checkpoint: Checkpoint,
    folder: Path,
    output_format: str,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Writes a whole model into a directory.

    Args:
        checkpoint: The model.
        folder: An empty directory.
        output_format: "hf", "t5x" or "robust_ft".
        vocabulary: The model's, where it may be another than the one in the checkpoint's files.
    """
    {"hf": hf, "t5x": t5x, "robust_ft": native}[output_format].write(checkpoint, folder)
    if output_format == "hf" and vocabulary is not None:
        write_hub_files(vocabulary, folder)


def warn_of_a_separator(tokens: Tokens | None, vocabulary: Vocabulary | None) -> None:
    """Says what whoever uses an adapter has to do, as no file of PEFT's can."""
    separator = None if tokens is None else tokens.ids.get("separator")
    if separator is not None:
        text = vocabulary.decode([separator]) if vocabulary is not None else ""
        logging.warning(
            "PEFT's files cannot say the separator between input and target: put token %d%s "
            "behind each input.",
            separator,
            f" ({text!r})" if text else "",
        )


@dataclasses.dataclass(frozen=True)
class FinishedModel:
    """A finished stage, ready to be written in any format.

    Attributes:
        base: What the stage started from or, if it trained all of it, ended with.
        adapter: What the stage laid over it.
        vocabulary: The model's.
        restored_from: The model directory that `base` is unchanged from, None if it has changed.
    """

    base: Checkpoint
    adapter: Adapter
    vocabulary: Vocabulary
    restored_from: str | None

    @classmethod
    def read(cls, stage: FinishedStage, fields: dict[str, Any] | None) -> "FinishedModel":
        """Opens a stage with the settings and files of the model directory that its run read.

        Args:
            stage: The stage.
            fields: Fields that replace those of its config.

        Raises:
            UserError: A part is missing, or not what the stage was trained with.
        """
        base, origin = stage.base_checkpoint(), stage.origin()
        if origin is not None and origin.family == base.family:
            base = dataclasses.replace(
                origin, config=base.config, tensors=base.tensors, token_ids=base.token_ids
            )
        base, vocabulary = stage.record.tokens.applied(base, stage.adapter.source)
        base = sources.overridden(base, fields or {})
        stage.record.tokens.check_model(native.model(base), str(stage.folder))
        adapters.check(stage.adapter, base)
        leaves = ((path, tensor.load()) for path, tensor in base.tensors.items())
        adapters.check_base(stage.adapter, leaves, base.source)
        kept = origin.source if origin is not None and stage.keeps_base else None
        return cls(base, stage.adapter, vocabulary, kept)

    def cast(self, dtype: str | None) -> "FinishedModel":
        """Returns it with floats of this dtype; unchanged for None."""
        tensors = {path: tensor.cast(dtype) for path, tensor in self.adapter.tensors.items()}
        adapter = dataclasses.replace(self.adapter, tensors=tensors)
        return dataclasses.replace(self, base=self.base.cast(dtype), adapter=adapter)

    def write(self, folder: Path, output: str, output_format: str, dtype: str | None) -> list[str]:
        """Writes the model, and what cannot be merged into it, into folders below.

        Args:
            folder: An empty directory.
            output: Where it will be.
            output_format: "hf", "t5x" or "robust_ft".
            dtype: The dtype of floats in the output; unchanged if not given.

        Returns:
            Sentences that say how to use what was written.

        Raises:
            UserError: The format cannot express it.
        """
        mergeable, rest = merging.split(self.adapter)
        model = merging.merged(mergeable, self.base).cast(dtype)  # rounded once
        model = dataclasses.replace(model, source=output)
        write(model, folder, output_format, self.vocabulary)
        kinds = " and ".join(type(each).__name__ for each in rest)
        if output_format == "t5x" and rest:
            raise UserError(
                f"'{self.adapter.source}' holds a {kinds}, which t5x's format has no place for; "
                "convert with --to=hf or --to=robust_ft."
            )
        remainder = self.cast(dtype).adapter.only(*rest)
        if output_format == "robust_ft":
            return [_beside(remainder, model, folder, output) if rest else _ours(output)]
        if output_format == "t5x":
            return [f"'{output}' is a checkpoint of t5x."]
        sentences = [_theirs(output, model)]
        if rest:
            (folder / rest[0].name).mkdir()
            peft.write(remainder, model, folder / rest[0].name)
            sentences.append(
                f"peft.PeftModel.from_pretrained(model, '{output}/{rest[0].name}') plugs in its "
                f"{kinds}: with it the model does what it was trained for, without it all else."
            )
        elif [type(each) for each in self.adapter.methods] == [Lora] and self.restored_from:
            sentences.append(self._lora(folder, output, dtype))
        return sentences

    def _lora(self, folder: Path, output: str, dtype: str | None) -> str:
        """Writes a LoRA as an adapter, too: of the base without it."""
        (lora,) = self.adapter.methods
        (folder / lora.name).mkdir()
        adapter = self.cast(dtype).adapter
        peft.write(adapter, self.base, folder / lora.name)
        return (
            f"Its Lora is merged into it; '{output}/{lora.name}' is the same LoRA for "
            f"peft.PeftModel.from_pretrained with the model in '{self.restored_from}'."
        )


def _theirs(output: str, model: Checkpoint) -> str:
    kind = "CausalLM" if model.config.decoder_only else "Seq2SeqLM"
    return f"model = transformers.AutoModelFor{kind}.from_pretrained('{output}') loads the model."


def _ours(output: str) -> str:
    return f"robust_ft.load('{output}') loads the model."


def _beside(adapter: Adapter, model: Checkpoint, folder: Path, output: str) -> str:
    """Writes what cannot be merged as an export of the model."""
    leaves = ((path, tensor.load()) for path, tensor in model.tensors.items())
    base = Base(fingerprint(leaves), output)
    (folder / FOLDER).mkdir()
    adapters.write(dataclasses.replace(adapter, base=base), folder / FOLDER)
    return (
        f"robust_ft.load('{output}', weights='{output}/{FOLDER}') loads the model with its "
        f"{adapter.kinds}, robust_ft.load('{output}') without."
    )
