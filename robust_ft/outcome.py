"""`<stage>/outcome.json`: what a finished stage leaves behind for those after it."""

import dataclasses
import os
from pathlib import Path

from robust_ft import multihost
from robust_ft.files import as_path, read_json, write_json
from robust_ft.restore import load_params
from robust_ft.stage_checkpoints import checkpoint_folder
from robust_ft.trainable import unflatten
from robust_ft.types import Params

FILE = "outcome.json"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a stage has ended; its directory holds one exactly if it has finished.

    Attributes:
        step: The selected step: the best on the selection's split, or the last one.
        score: Its score, or None if nothing was selected by score.
        paths: The paths of the parameters that trained, all that its checkpoints hold.
        steps: The number of steps that the stage took, fewer than its own if patience ended it.
        is_tested: Whether its final evaluations have been made, too; `runner.validate` leaves them
            out.
    """

    step: int
    score: float | None
    paths: tuple[str, ...]
    steps: int = 0
    is_tested: bool = True

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Writes the file from the first process; on return all processes can read it."""
        if multihost.is_first():
            write_json(as_path(directory) / FILE, dataclasses.asdict(self))
        multihost.barrier()

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> "Outcome | None":
        """Returns the outcome of a finished stage, None of an unfinished one."""
        fields = read_json(as_path(directory) / FILE, default=None)
        return fields and cls(**fields | {"paths": tuple(fields["paths"])})

    def checkpoint(self, directory: str | os.PathLike[str]) -> Path:
        """Returns the folder of the selected checkpoint, below the stage's directory."""
        return checkpoint_folder(directory, self.step)

    def load(self, directory: str | os.PathLike[str]) -> Params:
        """Reads the selected checkpoint's parameters."""
        return unflatten(load_params(str(self.checkpoint(directory))))
