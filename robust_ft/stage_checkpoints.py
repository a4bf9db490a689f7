"""Checkpoints of a stage, and parameters from files; only what trains is saved."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from safetensors.numpy import save_file

from robust_ft import assets, multihost
from robust_ft.checkpoints_io import adapters, added_tokens, sources
from robust_ft.errors import UserError
from robust_ft.files import read_json, replacing, write_json
from robust_ft.models.model import Model
from robust_ft.train_step import TrainState
from robust_ft.trainable import flatten, unflatten
from robust_ft.types import Params

PREFIX = "checkpoint"
_PROCESSES = "processes"


class StageCheckpoints:
    """The checkpoints of one stage, `<directory>/checkpoint_<step>/`, written asynchronously.

    Each holds three items: `params` (the trainable parameters), `optimizer` and `data` (the
    position in the data). The newest and the best-scored ones are kept.
    """

    def __init__(self, directory: str | os.PathLike[str], keep_best: int = 1):
        policies = checkpoint_managers
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(
                step_prefix=PREFIX,
                cleanup_tmp_directories=True,
                best_fn=_rank,  # Orbax writes scores down only if it has one
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(1),
                        policies.BestN(
                            get_metric_fn=_rank, n=keep_best, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
            ),
            item_names=("params", "optimizer", "data"),
        )

    def save(self, state: TrainState, data_state: Mapping[str, Any], score: float | None) -> None:
        """Starts writing a checkpoint; returns as soon as the arrays are copied."""
        step = int(state.step)
        metrics = None if score is None else {"score": float(score), "step": step}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.trainable),
                optimizer=ocp.args.StandardSave(_optimizer_item(state)),
                data=ocp.args.JsonSave(_of_all_processes(data_state)),
            ),
            metrics=metrics,
            force=True,
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the newest state and data position, or None if there is no checkpoint.

        Args:
            like: A state with the shapes, types and shardings that the result shall have.
        """
        self._manager.wait_until_finished()
        step = self._manager.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(_abstract(like.trainable)),
            optimizer=ocp.args.StandardRestore(_abstract(_optimizer_item(like))),
            data=ocp.args.JsonRestore(),
        )
        self._check_params(step, like.trainable)
        try:
            restored = self._manager.restore(step, args=args)
        except ValueError as error:
            raise self._misfit(step, "another optimizer") from error
        optimizer = restored["optimizer"]
        state = TrainState(optimizer["step"], restored["params"], optimizer["opt_state"])
        return state, _of_this_process(restored["data"])

    def restore_params(self, step: int, like: Params) -> Params:
        """Returns the trainable parameters of one step."""
        self._manager.wait_until_finished()
        args = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(like)))
        return self._manager.restore(step, args=args)["params"]

    def _check_params(self, step: int, like: Params) -> None:
        saved = flatten(_shapes(Path(self._manager.directory) / f"{PREFIX}_{step}" / "params"))
        wanted = flatten(like)
        for path in sorted(saved.keys() | wanted.keys()):
            shapes = [tuple(x[path].shape) if path in x else "none" for x in (saved, wanted)]
            if shapes[0] != shapes[1]:
                what = f"other trainable parameters ({path}: {shapes[0]}, now {shapes[1]})"
                raise self._misfit(step, what)

    def _misfit(self, step: int, what: str) -> UserError:
        return UserError(
            f"The checkpoint of step {step} in {self._manager.directory} was saved with {what}; "
            "go on with the config it was made with, or choose another MODEL_DIR."
        )

    def best_step(self) -> int | None:
        """Returns the step with the best score; of equal ones the earliest; None without scores."""
        self._manager.wait_until_finished()
        scored = []
        for step in self._manager.all_steps():
            metrics = self._manager.metrics(step)
            if metrics is not None:
                scored.append((_rank(metrics), step))
        return max(scored)[1] if scored else None

    def score(self, step: int) -> float | None:
        """Returns the score that a checkpoint was saved with, None if it had none."""
        self._manager.wait_until_finished()
        metrics = self._manager.metrics(step)
        return None if metrics is None else metrics["score"]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def load_params(path: str) -> dict[str, np.ndarray]:
    """Reads parameters as {path: array} from a file or a checkpoint directory.

    Args:
        path: A model directory of Hugging Face's, t5x's or our own, one of this program's
            `checkpoint_<step>` directories, a `.safetensors` file whose names are parameter
            paths, or a soft prompt in a `.npy` file. `asset:` paths are resolved. Several,
            separated by commas, add up.

    Raises:
        UserError: There is nothing at this path, or it can't be read.
    """
    folder = (Path(assets.resolve(path)) / "params").absolute()
    if not folder.is_dir():
        return {name: tensor.load() for name, tensor in sources.weights(path).items()}
    shapes = _shapes(folder)
    to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            folder, args=ocp.args.PyTreeRestore(item=shapes, restore_args=to_numpy)
        )
    return flatten(restored)


def save_params(path: str | os.PathLike[str], params: Params, dtype: str | None = None) -> None:
    """Writes parameters to a `.safetensors` file, floats as `dtype` if given."""
    arrays = {
        name: np.ascontiguousarray(np.asarray(leaf, dtype=dtype))
        for name, leaf in flatten(jax.device_get(params)).items()
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(arrays, temporary)


def read_onto(model: Model, path: str) -> dict[str, np.ndarray]:
    """Reads parameters that a model can start from, and checks them against it.

    Only parameters of PEFT methods may be missing; they start fresh. A larger vocabulary than the
    checkpoint's fits: see `added_tokens`.

    Args:
        model: The model.
        path: As in `load_params`. Of several paths, each is laid over the ones before it: an
            adapter that knows its base over exactly that.

    Returns:
        {parameter path: array} in the model's types.

    Raises:
        UserError: They do not fit the model, or an adapter belongs to another base.
    """
    found: dict[str, np.ndarray] = {}
    before: list[str] = []
    for part in sources.split(path):
        if (adapter := sources.adapter(part)) is not None:
            adapters.check_methods(adapter, model.peft)
            base = [(name, array) for name, array in found.items() if not model.peft_owns(name)]
            if base:
                adapters.check_base(adapter, base, ",".join(before))
        found = added_tokens.extended(model, found | load_params(part), part)
        before.append(part)
    return restore_onto(model.shapes(), found, path, may_lack=model.peft_owns)


def restore_onto(
    shapes: Params,
    restored: Mapping[str, Any],
    source: str,
    may_lack: Callable[[str], bool],
    may_drop: Callable[[str], bool] = lambda path: False,
) -> dict[str, Any]:
    """Returns the restored arrays that the model has, after checking both sides against each other.

    Args:
        shapes: The model's parameters as shapes and types.
        restored: What was read, {path: array}.
        source: What to call the checkpoint in errors.
        may_lack: Whether the checkpoint may lack a parameter of the model, which starts fresh then.
        may_drop: Whether the model may have no place for a parameter of the checkpoint.

    Raises:
        UserError: A parameter of the model is missing, has another shape, or the checkpoint has
            one that the model has no place for.
    """
    expected = flatten(shapes)
    missing = sorted(p for p in expected if p not in restored and not may_lack(p))
    unexpected = sorted(p for p in restored if p not in expected and not may_drop(p))
    if missing or unexpected:
        raise UserError(
            f"'{source}' does not fit the model: {len(missing)} parameters of the model are "
            f"missing ({_few(missing)}), {len(unexpected)} have no place in it "
            f"({_few(unexpected)})."
        )
    found = {path: array for path, array in restored.items() if path in expected}
    for path, array in found.items():
        if array.shape != expected[path].shape:
            raise UserError(
                f"'{source}' has {path} with shape {array.shape}, the model {expected[path].shape}."
            )
    fresh = sorted(expected.keys() - found.keys())
    logging.info("Restored %d parameters from '%s'.", len(found), source)
    if fresh:
        logging.info("Not in '%s', so they start fresh: %s.", source, ", ".join(fresh))
    return {path: array.astype(expected[path].dtype, copy=False) for path, array in found.items()}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished stage leaves behind in `<stage>/outcome.json`.

    Attributes:
        step: The selected step: the best on the selection's split, or the last one.
        score: Its score, or None if nothing was selected by score.
        paths: The paths of the parameters that trained, all that its checkpoints hold.
        steps: The number of steps that the stage took.
    """

    step: int
    score: float | None
    paths: tuple[str, ...]
    steps: int = 0

    @staticmethod
    def file(directory: str | os.PathLike[str]) -> Path:
        return Path(directory) / "outcome.json"

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Writes the file from the first process; on return all processes can read it."""
        if multihost.is_first():
            write_json(self.file(directory), dataclasses.asdict(self))
        multihost.barrier()

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> "Outcome | None":
        """Returns the outcome of a finished stage, None of an unfinished one."""
        fields = read_json(cls.file(directory), default=None)
        if fields is None:
            return None
        return cls(**fields | {"paths": tuple(fields["paths"])})

    def load(self, directory: str | os.PathLike[str]) -> Params:
        """Reads the selected checkpoint's parameters."""
        return unflatten(load_params(str(Path(directory) / f"{PREFIX}_{self.step}")))


def _rank(metrics: Mapping[str, Any]) -> tuple[float, int]:
    # Of equally good checkpoints the earliest counts: it changed the model least.
    return metrics["score"], -int(metrics["step"])


def _shapes(folder: Path) -> Params:
    """Returns shapes and types of what a checkpoint's item holds."""
    return ocp.PyTreeCheckpointHandler().metadata(folder).tree


def _of_all_processes(data_state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the position in the data, or each process's own where they differ (packing)."""
    states = [json.loads(text) for text in multihost.gathered(json.dumps(dict(data_state)))]
    return states[0] if all(state == states[0] for state in states) else {_PROCESSES: states}


def _of_this_process(data: Mapping[str, Any]) -> dict[str, Any]:
    states = data.get(_PROCESSES, [data])
    # Of another number of processes any will do: the loader says what does not fit.
    return dict(states[jax.process_index() % len(states)])


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
