"""Datasets that the library `datasets` has saved to disk; see `raw_files`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from robust_ft.data import tables
from robust_ft.data.raw_files import Row
from robust_ft.errors import UserError, nearest
from robust_ft.files import read_json_object

_SPLITS, _STATE = "dataset_dict.json", "state.json"


def find(folder: Path, split: str) -> list[Path]:
    """Returns the files of a dataset: what describes it, and those that hold its rows.

    Args:
        folder: What `save_to_disk` has written.
        split: The split to read if the dataset has several.

    Raises:
        UserError: The folder is no such dataset, or the dataset has no such split.
    """
    splits = read_json_object(folder / _SPLITS, default={}).get("splits")
    if splits is not None:
        if split not in splits:
            raise UserError(
                f"'{folder}' is a dataset without a split '{split}', only {', '.join(splits)}; "
                f"name the folder of one, such as '{folder / splits[0]}'.{nearest(split, splits)}"
            )
        folder = folder / split
    if not (folder / _STATE).is_file():
        raise UserError(
            f"'{folder}' is a folder, but no dataset that `save_to_disk` has written: it has no "
            f"{_STATE}."
        )
    state = read_json_object(folder / _STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            f"'{folder}' holds a selection of rows; save it again after `flatten_indices()`."
        )
    files = [folder / data["filename"] for data in state.get("_data_files", ())]
    for file in files:
        if not file.is_file():
            raise UserError(f"'{file}' is missing, which {folder / _STATE} names.")
    return [folder / _STATE, *files]


def read(files: Sequence[Path]) -> Iterator[Row]:
    """Yields the rows of what `find` has returned."""
    return tables.read(files[1:])
