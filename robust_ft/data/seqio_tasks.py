"""What our seqio tasks are made of: text features without a vocabulary, and a JSON-lines source.

A task here says what an example *is*: its preprocessors end in the strings `inputs` and `targets`
(and, for evaluation, `references`, `id`, `choices`). Which vocabulary turns them into ids is known
only to the run, so the cache does that (`build`). A seqio task that tokenizes by itself works too.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf

from robust_ft.errors import UserError

_CHUNK = 256  # examples that go from Python to tensorflow at once

# Takes one parsed line and says what is wrong with it by raising KeyError or ValueError.
ParseFn = Callable[[dict[str, Any]], dict[str, str]]


def text_features(add_eos_to_inputs: bool = True) -> dict[str, seqio.Feature]:
    """Returns the `output_features` of a task whose `inputs` and `targets` are texts.

    Args:
      add_eos_to_inputs: whether inputs end in EOS, as T5's do; targets always do.
    """

    def feature(add_eos: bool) -> seqio.Feature:
        vocabulary = seqio.PassThroughVocabulary(size=0)
        return seqio.Feature(vocabulary, add_eos=add_eos, dtype=tf.string, rank=0)

    return {"inputs": feature(add_eos_to_inputs), "targets": feature(True)}


def from_python(
    examples: Callable[[], Iterable[Mapping[str, Any]]],
    texts: Sequence[str] = ("inputs", "targets"),
    lists: Sequence[str] = (),
    integers: Sequence[str] = (),
) -> tf.data.Dataset:
    """Returns a dataset of the mappings that `examples()` yields.

    What `tf.data.Dataset.from_generator` does, several times faster: the way out of Python costs
    the same for one example as for hundreds, so hundreds take it together.

    Args:
      examples: called for each pass over the dataset.
      texts: names of fields that are one string.
      lists: names of fields that are lists of strings, of any lengths.
      integers: names of fields that are an integer.
    """

    def chunks() -> Iterator[dict[str, list[Any]]]:
        source = iter(examples())
        while chunk := list(itertools.islice(source, _CHUNK)):
            fields = {name: [example[name] for example in chunk] for name in (*texts, *integers)}
            for name in lists:
                fields[name] = [text for example in chunk for text in example[name]]
                fields[f"{name}/lengths"] = [len(example[name]) for example in chunk]
            yield fields

    def with_lists(fields: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        for name in lists:
            lengths = fields.pop(f"{name}/lengths")
            fields[name] = tf.RaggedTensor.from_row_lengths(fields[name], lengths)
        return fields

    numbers = (*integers, *(f"{name}/lengths" for name in lists))
    signature = {name: tf.TensorSpec([None], tf.string) for name in (*texts, *lists)}
    signature |= {name: tf.TensorSpec([None], tf.int64) for name in numbers}
    dataset = tf.data.Dataset.from_generator(chunks, output_signature=signature)
    return dataset.map(with_lists).unbatch()


class JsonLinesSource(seqio.DataSource):
    """A seqio source over JSON-lines files, one a split, under the data directory.

    A bad line is a `UserError` that names the file and the line.
    """

    def __init__(
        self, directory: str, files: Mapping[str, str], parse: ParseFn, keys: tuple[str, ...]
    ):
        """Describes the source; no file is opened yet.

        Args:
          directory: of the files, usually below ROBUST_FT_DATA_DIR.
          files: file name by split.
          parse: from a line's object to strings under `keys`; raises KeyError or ValueError with
            a sentence for a line it does not accept.
          keys: what `parse` returns.
        """
        super().__init__(splits=tuple(files))
        self._files = {split: Path(directory, name) for split, name in files.items()}
        self._parse = parse
        self._keys = keys

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: a file is read from its start."""
        return False

    def num_input_examples(self, split: str) -> int | None:
        """Returns the number of lines, None if the file does not exist."""
        file = self._files[split]
        if not file.is_file():
            return None
        with open(file, "rb") as lines:
            return sum(1 for _ in lines)

    def list_shards(self, split: str) -> list[str]:
        """Returns the split's one file."""
        return [os.fspath(self._files[split])]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Returns the split's examples in the order of the file; the loader shuffles, not this."""
        del shuffle, seed, shard_info, unused
        return from_python(lambda: self.examples(split), texts=self._keys)

    def examples(self, split: str) -> Iterator[dict[str, str]]:
        """Yields the split's parsed lines; empty lines are skipped.

        Raises:
          UserError: if the file does not exist or a line is bad.
        """
        file = self._files[split]
        if not file.is_file():
            raise UserError(f"The data file '{file}' (split '{split}') does not exist.")
        with open(file, "rb") as lines:  # as bytes, so that bad UTF-8 is a bad line too
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    example = json.loads(line)
                    if not isinstance(example, dict):
                        raise ValueError("it is not a JSON object")
                    yield self._parse(example)
                except json.JSONDecodeError as error:
                    reason = f"it is not JSON ({error.msg}, column {error.colno})"
                    raise UserError(f"{file}, line {number}: {reason}.") from error
                except KeyError as error:
                    raise UserError(f"{file}, line {number}: no field {error}.") from error
                except ValueError as error:
                    raise UserError(f"{file}, line {number}: {error}.") from error
