"""A split in parts, each written atomically: the checkpoint of a build.

A part is a file of records of some thousand consecutive examples, and a JSON file of their counts,
which is written last and marks the part as complete. Processes may write different parts of one
folder at the same time.
"""

import dataclasses
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from robust_ft.files import read_json, write_json

_COPIED = 4096  # records in memory while parts are joined
_IDENTITY = "identity.json"
_END = "end.json"
# group_size 1: the loader reads examples one by one, in random order.
_OPTIONS = "group_size:1"


@dataclass
class Counts:
    """Statistics of examples; some for each feature ('inputs', 'targets').

    Attributes:
        num_examples: Number of examples.
        num_dropped_exemplars: Exemplars that did not fit into the inputs.
        num_references: Examples that list what counts as right.
        num_truncated: Number of truncated examples, by feature.
        max_length: Tokens of the longest example before truncation, by feature.
        num_tokens: Tokens after truncation, by feature.
        content: The sum, modulo 2**256, of the SHA-256 of each example and its number, before it is
            tokenized; hexadecimal, "" for no examples.
    """

    num_examples: int = 0
    num_dropped_exemplars: int = 0
    num_references: int = 0
    num_truncated: dict[str, int] = field(default_factory=dict)
    max_length: dict[str, int] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)
    content: str = ""

    def feature(self, name: str, before: int, after: int) -> None:
        """Counts one example's feature, by its numbers of tokens before and after truncation."""
        self.num_truncated[name] = self.num_truncated.get(name, 0) + (after < before)
        self.max_length[name] = max(self.max_length.get(name, 0), before)
        self.num_tokens[name] = self.num_tokens.get(name, 0) + after

    def example(self, number: int, example: Mapping[str, Any]) -> None:
        """Adds an example to the content.

        Args:
            number: Its position in the split.
            example: The task's, before it is tokenized.
        """
        values = [
            (name, value.tolist() if hasattr(value, "tolist") else value)
            for name, value in sorted(example.items())
        ]
        self._add_content(hashlib.sha256(repr((number, values)).encode()).hexdigest())

    def _add_content(self, content: str) -> None:
        # A sum does not depend on how a split is divided into parts.
        total = (int(self.content or "0", 16) + int(content or "0", 16)) % 2**256
        self.content = f"{total:064x}"

    def add(self, other: "Counts") -> None:
        """Adds the counts of other examples."""
        self.num_examples += other.num_examples
        self.num_dropped_exemplars += other.num_dropped_exemplars
        self.num_references += other.num_references
        self._add_content(other.content)
        for name in other.max_length:
            self.num_truncated[name] = self.num_truncated.get(name, 0) + other.num_truncated[name]
            self.max_length[name] = max(self.max_length.get(name, 0), other.max_length[name])
            self.num_tokens[name] = self.num_tokens.get(name, 0) + other.num_tokens[name]


class Parts:
    """The parts of one split in a folder."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        """Opens or makes the folder.

        Args:
            folder: Where the parts are.
            identity: All that the parts depend on, as JSON has it. Parts with another identity are
                removed.
        """
        self.folder = folder
        self.identity = identity
        if folder.exists() and read_json(folder / _IDENTITY, default=None) != identity:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _IDENTITY, identity)

    def counts(self, number: int) -> Counts | None:
        """Returns the counts of a part, None if it is not complete."""
        fields = read_json(self._json(number), default=None)
        return None if fields is None else Counts(**fields)

    def write(self, number: int, records: Iterator[bytes], counts: Counts) -> None:
        """Writes a part; `counts` are those of its records once all have been taken."""
        file = self._file(number)
        temporary = file.with_suffix(f".{socket.gethostname()}.{os.getpid()}")
        writer = ArrayRecordWriter(str(temporary), _OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        temporary.replace(file)
        write_json(self._json(number), dataclasses.asdict(counts))

    def end(self, number: int) -> None:
        """Records how many parts the split has, once its end is reached."""
        write_json(self.folder / _END, {"parts": number})

    def are_complete(self) -> bool:
        """Whether the number of parts is known and all of them are complete."""
        end = read_json(self.folder / _END, default=None)
        return end is not None and all(self._json(n).is_file() for n in range(end["parts"]))

    def join(self, output: Path) -> Counts:
        """Joins all parts, which must be complete, into one file; returns their total counts."""
        end = read_json(self.folder / _END, default=None) or {"parts": 0}
        total = Counts()
        for number in range(end["parts"]):
            counts = self.counts(number)
            assert counts is not None, f"part {number} is not complete"
            total.add(counts)
        if end["parts"] == 1:
            self._json(0).unlink()  # first: a build killed in between must not find it complete
            self._file(0).replace(output)
            return total
        writer = ArrayRecordWriter(str(output), _OPTIONS)
        for number in range(end["parts"]):
            reader = ArrayRecordReader(str(self._file(number)))
            for start in range(0, reader.num_records(), _COPIED):
                stop = min(start + _COPIED, reader.num_records())
                for record in reader.read(start, stop):
                    writer.write(record)
            reader.close()
        writer.close()
        return total

    def _file(self, number: int) -> Path:
        return self.folder / f"examples-{number:06}.array_record"

    def _json(self, number: int) -> Path:
        return self.folder / f"examples-{number:06}.json"


def folder_of(final: Path) -> Path:
    """Returns the folder for the parts of the cache that will be in the folder `final`."""
    return final.parent / f".{final.name}.parts"


def num_done(folder: Path) -> int:
    """Returns how many examples are in the complete parts of a folder, which need not exist."""
    parts = [read_json(file, default=None) for file in folder.glob("examples-*[0-9].json")]
    return sum(counts["num_examples"] for counts in parts if counts is not None)
