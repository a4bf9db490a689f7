"""`<stage>/first_batch.txt`: the first rows of a stage's first batch, as the model reads them."""

from pathlib import Path

from robust_ft import console, multihost
from robust_ft.data.loader import BatchSource
from robust_ft.data.records import Arrays
from robust_ft.data.rendering import Line, batch_lines
from robust_ft.files import write_atomically
from robust_ft.models.peft import Peft
from robust_ft.stage import Stage

FILE = "first_batch.txt"


def show(stage: Stage, batch: Arrays, batches: BatchSource, directory: Path) -> None:
    """Prints and writes the first rows of a batch, decoded; what counts for the loss is marked.

    Args:
        stage: The stage.
        batch: The batch that `batches` has given last.
        batches: Tells its examples.
        directory: The stage's.
    """
    if not multihost.is_first():
        return
    model = stage.model
    examples = batches.named(batches.examples)
    lines = [*batch_lines(batch, examples, stage.data.vocabulary, model.decoder_start)]
    for method in model.peft:
        if type(method).embed is not Peft.embed:
            rows = "each row" + (" but replayed ones" if stage.prompts_are_left_out else "")
            lines.append(Line(f"'{method.name}', a soft prompt, is put to the inputs of {rows}"))
    for text, style in lines:
        console.print_line(f"[{stage.name}] {text}", style)
    write_atomically(directory / FILE, "".join(f"{text}\n" for text, _ in lines))
