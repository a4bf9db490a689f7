"""A finished run, read from its MODEL_DIR alone: the base, what was trained, and the methods.

Each stage has its record (`model.json`), its selected checkpoint and, unless the whole model was
trained, its export. A checkpoint holds only what was trained; the rest is read from where the stage
read it: earlier stages of the run, the checkpoint that the first one restored, or the seed.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from robust_ft import export
from robust_ft.checkpoints_io import adapters, families, orbax_params, sources
from robust_ft.checkpoints_io.adapters import Adapter
from robust_ft.checkpoints_io.names import parameter_shapes
from robust_ft.checkpoints_io.stage_record import FILE, RUN, StageRecord, is_run
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError, nearest
from robust_ft.files import as_path, read_json_object
from robust_ft.outcome import Outcome
from robust_ft.partitioning import Partitioner
from robust_ft.restore import place_params
from robust_ft.stage import SCRATCH, STAGE, stage_key
from robust_ft.trainable import flatten

SELECTION = "selection.json"


@dataclasses.dataclass(frozen=True)
class FinishedStage:
    """A finished stage of a run.

    Attributes:
        folder: The stage's.
        record: What it trained.
        outcome: How it ended.
        base: Read instead of the checkpoint that the run's first stage restored, which has moved.
    """

    folder: Path
    record: StageRecord
    outcome: Outcome
    base: str | None = None

    @classmethod
    def read(cls, run: str, name: str | None = None, base: str | None = None) -> "FinishedStage":
        """Opens a stage of a run.

        Args:
            run: MODEL_DIR.
            name: The stage, or a selection of the run; by default what the run ended with.
            base: As in the class.

        Raises:
            UserError: There is no such stage, it has not finished, it has no record, or the run
                ended with an ensemble, which is several models.
        """
        folder = as_path(run).expanduser()
        name = _selected(folder, name)
        outcome, record = Outcome.read(folder / name), StageRecord.read(folder / name)
        if outcome is None:
            raise UserError(
                f"Stage '{name}' of '{run}' has not finished; the same command that started the "
                "run resumes it."
            )
        if record is None:
            raise UserError(
                f"'{folder / name}' has no {FILE}: an earlier robust_ft wrote it, which kept no "
                "record; call robust_ft.load(BASE, weights=...) with the model that it started "
                "from."
            )
        return cls(folder / name, record, outcome, base)

    @functools.cached_property
    def _trained(self) -> dict[str, Tensor]:
        return orbax_params.read(self.outcome.checkpoint(self.folder))

    @functools.cached_property
    def _changed(self) -> dict[str, Tensor]:
        """What was trained of the base."""
        shapes = parameter_shapes(self.record.config)
        return {path: tensor for path, tensor in self._trained.items() if path in shapes}

    @property
    def whole(self) -> bool:
        """Whether the whole base was trained."""
        return self._changed.keys() == parameter_shapes(self.record.config).keys()

    @property
    def keeps_base(self) -> bool:
        """Whether neither this stage nor one before it trained parameters of the base."""
        earlier = self._earlier
        return not self._changed and (earlier is None or earlier.keeps_base)

    @functools.cached_property
    def adapter(self) -> Adapter:
        """What it laid over its `base_checkpoint`: PEFT methods, and parameters that it changed."""
        folder = self.folder / export.FOLDER
        if adapters.is_directory(folder):
            return adapters.read(folder)
        return Adapter(str(self.folder), (), {}, tokens=self.record.tokens)

    def base_checkpoint(self) -> Checkpoint:
        """Returns the base: as it was at the stage's start, or as trained if all of it was.

        Raises:
            UserError: It is not where the run read it.
        """
        if self.whole:
            return self._checkpoint(self._changed)
        if self._earlier is not None:
            return self._checkpoint(self._earlier.ended())
        if self.record.restored_from == SCRATCH and self.base is None:
            return self._checkpoint(self._drawn())
        shapes = parameter_shapes(self.record.config)
        try:
            found = sources.weights(self._restored)
        except UserError as error:
            raise UserError(
                f"{error} It is what stage '{self.folder.name}' of '{self.folder.parent}' started "
                f"from; if it has moved, call robust_ft.load(BASE, "
                f"weights='{self.adapter.source}') with its new path."
            ) from None
        return self._checkpoint({path: found[path] for path in found.keys() & shapes.keys()})

    def trained(self) -> dict[str, Tensor]:
        """Returns all that it trained, and the methods that it trained under."""
        return {**self._changed, **self.adapter.tensors}

    def ended(self) -> Mapping[str, Tensor]:
        """Returns the base's parameters as the stage ended with them."""
        return {**self.base_checkpoint().tensors, **self._changed}

    def origin(self) -> Checkpoint | None:
        """Returns the model directory that the run started from, None if it was none."""
        if self._earlier is not None:
            return self._earlier.origin()
        first = sources.split(self._restored)[0]
        try:
            return sources.read(first)
        except UserError:
            return None

    def first(self) -> "FinishedStage":
        """Returns the first of the stages that lead to this one, which restored no other."""
        return self if self._earlier is None else self._earlier.first()

    @functools.cached_property
    def _earlier(self) -> "FinishedStage | None":
        """The stage that this one restored."""
        restored = self.record.restored_from
        if not restored.startswith(STAGE):
            return None
        run = str(self.folder.parent)
        return FinishedStage.read(run, restored.removeprefix(STAGE), self.base)

    @property
    def _restored(self) -> str:
        return self.base or self.record.restored_from

    def _checkpoint(self, tensors: Mapping[str, Tensor]) -> Checkpoint:
        config, ids = self.record.config, self.record.tokens.ids
        return Checkpoint(str(self.folder), families.name_of(config), config, tensors, ids)

    def _drawn(self) -> dict[str, Tensor]:
        """Returns the initial parameters of a stage that started from scratch, drawn again."""
        seed, name = self.record.seed, self.folder.name
        keys = (stage_key(seed, name, use) for use in ("init", "peft"))
        shapes = parameter_shapes(self.record.config)
        # As at the stage's start: in another program some values would round differently.
        drawn = place_params(self.record.model, Partitioner(), {}, *keys)
        return {
            path: Tensor.of(np.asarray(leaf), f"'{path}'")
            for path, leaf in flatten(drawn).items()
            if path in shapes
        }


def _selected(run: Path, name: str | None) -> str:
    """Returns the stage that a name means: by default, and of a selection, the selected one."""
    if not is_run(run):
        raise UserError(f"'{run}' is not a run: it holds no {RUN}.")
    about = read_json_object(run / RUN)
    stages, selections = (list(about.get(key, ())) for key in ("stages", "selections"))
    if not stages:
        raise UserError(f"'{run}' trained no model, it only evaluated one; load that.")
    name = name or [*stages, *selections][-1]
    if name in stages:
        return name
    if name not in selections:
        known = [*stages, *selections]
        raise UserError(
            f"'{run}' has no stage '{name}', only {', '.join(known)}." + nearest(name, known)
        )
    selection = read_json_object(run / name / SELECTION, default={})
    if not selection:
        raise UserError(f"'{name}' has not been selected yet in '{run}'.")
    if Outcome.read(run / name) is not None:  # it has written its model
        return name
    weight = selection["weight"]
    (folder,) = (c["folder"] for c in selection["candidates"] if c["weight"] == weight)
    if folder in stages:
        return str(folder)
    members = selection.get("members") or ["LIGHT", "FULL"]
    loads = ", ".join(f"robust_ft.load('{run}', stage='{member}')" for member in members)
    raise UserError(
        f"'{run}' ended with '{name}', an ensemble of {' and '.join(members)}; call "
        f"robust_ft.Ensemble([{loads}], ({weight:g}, {1 - weight:g}))."
    )
