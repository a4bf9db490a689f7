"""Token ids as lines that a person reads: their text, the ids, and the piece of each."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from robust_ft.data.records import Arrays
from robust_ft.decoder_start import DecoderStart
from robust_ft.vocabulary import Vocabulary

_TOKENS = 40
_CHARACTERS = 300
_ROWS = 2
_TASKS = 2  # of a meta-batch
_EXAMPLES = 2  # of a packed row


class Line(NamedTuple):
    """A line, and the style in which a terminal shows it."""

    text: str
    style: str | None = None


def feature_lines(
    name: str,
    ids: Int[np.ndarray, " tokens"],
    text: str,
    vocabulary: Vocabulary,
    note: str = "",
    counts: Bool[np.ndarray, " tokens"] | None = None,
) -> Iterator[Line]:
    """Yields the lines of one feature of an example.

    Args:
        name: The feature's.
        ids: Its tokens.
        text: Its text.
        vocabulary: Gives the piece of each token.
        note: Added to the number of tokens.
        counts: Which tokens count for the loss; these pieces are marked, «so».
    """
    yield Line(f"  {name} ({len(ids)} tokens{note})", "bold")
    for line in text.splitlines() or [""]:
        yield Line(f"    {line}")
    shown = ids[:_TOKENS].tolist()
    more = " ..." if len(ids) > len(shown) else ""
    pieces = [vocabulary.decode([i]) or f"<{i}>" for i in shown]
    if counts is not None:
        marked = zip(pieces, counts[:_TOKENS], strict=True)
        pieces = [f"«{piece}»" if count else piece for piece, count in marked]
    yield Line(f"    {' '.join(map(str, shown))}{more}", "dim")
    yield Line(f"    {'|'.join(pieces)}{more}", "dim")


def batch_lines(
    batch: Arrays,
    examples: Sequence[tuple[str, int]],
    vocabulary: Vocabulary,
    start: DecoderStart,
) -> Iterator[Line]:
    """Yields the lines of the first rows of a training batch, as the model is given them.

    Args:
        batch: Arrays [rows, length], of a meta-batch [rows, tasks, batches, length].
        examples: The task of each example, and its position, `BatchSource.named`.
        vocabulary: The model's.
        start: Says whether the decoder's first token belongs to the input.
    """
    places = _places(batch)
    weights = batch["decoder_loss_weights"]
    shapes = [list(batch[f"{name}_tokens"].shape) for name in ("encoder_input", "decoder_target")]
    axes = " [rows, tasks, batches, length]" if weights.ndim > 2 else ""
    yield Line(
        f"first batch{axes}: inputs {shapes[0]}, targets {shapes[1]}, of which "
        f"{np.count_nonzero(weights)} tokens count for the loss, marked «so»"
    )
    # Without axes of tasks and of batches: [rows, length]
    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items() if x.ndim > 1}
    number = 0  # of the examples in the rows above
    for row, place in places.items():
        number = max(number, row)  # a row of a meta-batch is one example
        parts = _parts({name: x[row] for name, x in flat.items()})
        for part, (task, position) in zip(parts[:_EXAMPLES], examples[number:], strict=False):
            yield Line(f"{place}: example {position} of '{task}'", "bold")
            # What a decoder-only model reads as the decoder's first token is the input's last.
            read = [*part.inputs, *([part.first] if start.continues else [])]
            inputs = np.array(read, np.int32)
            yield from feature_lines("inputs", inputs, _text(inputs, vocabulary), vocabulary)
            yield from feature_lines(
                "targets",
                part.targets,
                _text(part.targets, vocabulary),
                vocabulary,
                f", {np.count_nonzero(part.counts)} count",
                part.counts,
            )
        if len(parts) > _EXAMPLES:
            yield Line(f"{place}: {len(parts) - _EXAMPLES} more examples are packed behind them")
        number += len(parts)


def _places(batch: Arrays) -> dict[int, str]:
    """Returns the rows to show, and what each is called.

    Of a meta-batch these are rows 0 of some tasks, of their first support batch and their query,
    counted with axes of tasks and batches flattened.
    """
    shape = batch["decoder_loss_weights"].shape
    if len(shape) == 2:
        return {row: f"row {row}" for row in range(min(_ROWS, shape[0]))}
    _, tasks, batches, _ = shape
    places = {}
    for task in range(min(_TASKS, tasks)):
        for number in sorted({0, batches - 1}):
            kind = "query" if number == batches - 1 else f"support batch {number}"
            places[task * batches + number] = f"task {task}, {kind}, row 0"
    return places


class _Part(NamedTuple):
    """An example in a row: what is read before the target, the decoder's first token, the target.

    Attributes:
        counts: Which of the targets count for the loss.
    """

    inputs: Int[np.ndarray, " inputs"]
    first: int
    targets: Int[np.ndarray, " targets"]
    counts: Bool[np.ndarray, " targets"]


def _parts(row: Arrays) -> list[_Part]:
    """Returns the examples of a row, several if it is packed."""
    tokens, counts = row["encoder_input_tokens"], row["decoder_loss_weights"] > 0
    if "decoder_segment_ids" in row:
        encoder, decoder = row["encoder_segment_ids"], row["decoder_segment_ids"]
        segments = range(1, 1 + max(encoder.max(), decoder.max()))
        places = [(encoder == segment, decoder == segment) for segment in segments]
    else:
        read = np.asarray(row.get("encoder_input_mask", np.ones(tokens.shape)), bool)
        # Up to the last token that counts: padding does not.
        length = len(counts) - int(np.argmax(counts[::-1])) if counts.any() else 0
        places = [(read, np.arange(len(counts)) < length)]
    return [
        _Part(
            tokens[inputs],
            int(row["decoder_input_tokens"][targets][0]) if targets.any() else 0,
            row["decoder_target_tokens"][targets],
            counts[targets],
        )
        for inputs, targets in places
    ]


def _text(ids: Int[np.ndarray, " tokens"], vocabulary: Vocabulary) -> str:
    text = vocabulary.decode(ids.tolist())
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + " ..."
