"""Readers of the table formats of the Hugging Face Hub; see `raw_files`."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from robust_ft.data.raw_files import Row, json_lines
from robust_ft.errors import UserError

_ARROW_FILE = b"ARROW1"  # how it begins


def read(files: Sequence[Path]) -> Iterator[Row]:
    """Yields the rows of Parquet, Arrow (and Feather), JSON Lines and TFRecord files.

    A file's name says which of these it is.

    Raises:
        UserError: A file is of none of these kinds, or not what its name says.
    """
    for file in files:
        kind = max(_READERS, key=file.name.rfind)
        if kind not in file.name:
            raise UserError(f"{file}: its name says none of {', '.join(_READERS)}.")
        try:
            yield from _READERS[kind](file)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"{file}: it does not read as {kind} ({reason}).") from error


def _arrow(file: Path) -> Iterator[Row]:
    """Yields the rows of an Arrow file, which can be read anywhere, or stream."""
    with pa.OSFile(str(file)) as stream:
        is_file = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
        stream.seek(0)
        if not is_file:
            yield from _rows(file, pa.ipc.open_stream(stream))
            return
        batches = pa.ipc.open_file(stream)
        yield from _rows(file, map(batches.get_batch, range(batches.num_record_batches)))


def _parquet(file: Path) -> Iterator[Row]:
    with pq.ParquetFile(file) as table:
        yield from _rows(file, table.iter_batches())


def _rows(file: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for name in batch.schema.names:
            if batch.schema.names.count(name) > 1:
                raise UserError(f"{file}: two columns are called '{name}'.")
        batch.validate(full=True)  # a damaged one would end the process
        for record in batch.to_pylist():
            number += 1
            yield Row(f"{file}, row {number}", record)


def _tfrecord(file: Path) -> Iterator[Row]:
    """Yields each example's features; one of a single value is a list too."""
    import tensorflow as tf  # the other kinds need none

    raws = tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
    for number in itertools.count(1):
        try:
            raw = next(raws, None)
        except tf.errors.DataLossError as error:
            raise OSError(str(error)) from error
        if raw is None:
            return
        example = tf.train.Example.FromString(raw)
        record: dict[str, Any] = {}
        for name, feature in example.features.feature.items():
            kind = feature.WhichOneof("kind")
            values = list(getattr(feature, kind).value) if kind else []
            is_text = kind == "bytes_list"
            record[name] = [value.decode("utf-8") for value in values] if is_text else values
        yield Row(f"{file}, record {number}", record)


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
    ".jsonl": lambda file: json_lines([file]),
    ".tfrecord": _tfrecord,
}
