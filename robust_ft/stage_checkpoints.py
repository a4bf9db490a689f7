"""The checkpoints that a stage saves while it trains, and resumes from."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from robust_ft import buckets, multihost
from robust_ft.checkpoints_io import orbax_buckets, orbax_params
from robust_ft.errors import UserError
from robust_ft.files import as_path
from robust_ft.train_step import TrainState
from robust_ft.trainable import flatten
from robust_ft.types import Params

_PREFIX = "checkpoint"
_PROCESSES = "processes"


def checkpoint_folder(directory: str | os.PathLike[str], step: int) -> Path:
    """Returns where the checkpoint of a step is, below the stage's directory."""
    return as_path(directory) / f"{_PREFIX}_{step}"


def saved_steps(directory: str | os.PathLike[str]) -> list[int]:
    """Returns the steps of the checkpoints below a stage's directory that are complete."""
    found = _checkpoints(as_path(directory))
    return [step for step, path in found.items() if orbax_buckets.is_complete(path)]


def _checkpoints(directory: Path) -> dict[int, Path]:
    return {
        int(match[1]): path
        for path in directory.glob(f"{_PREFIX}_*")
        if (match := re.fullmatch(rf"{_PREFIX}_(\d+)", path.name))
    }


class StageCheckpoints:
    """The checkpoints of one stage, `<directory>/checkpoint_<step>/`, written asynchronously.

    Each holds three items: `params` (the trainable parameters as they are evaluated), `optimizer`
    (with the step, and with the parameters themselves where those are averaged) and `data` (the
    position in the data). The newest one and the one with the best score are kept.

    Args:
        directory: The stage's directory.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        policies = checkpoint_managers
        folder = orbax_buckets.prepared(as_path(directory).absolute())
        in_bucket = buckets.is_bucket(folder)
        if in_bucket:
            _remove_incomplete(folder)
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                step_prefix=_PREFIX,
                temporary_path_class=orbax_buckets.temporary_path_class(folder),
                cleanup_tmp_directories=not in_bucket,
                best_fn=_rank,  # Orbax saves metrics only if it has one
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(1),
                        policies.BestN(
                            get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
            ),
            item_names=(orbax_params.ITEM, "optimizer", "data"),
        )
        saved = map(self._manager.metrics, self._manager.all_steps())
        # Of the best checkpoint. Asked for after every evaluation, when it may not be whole yet.
        self._best = max((m for m in saved if m is not None), key=_rank, default=None)

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:  # which ends at once, and what is not whole is dropped
            self.close()

    def save(self, state: TrainState, data_state: Mapping[str, Any], score: float | None) -> None:
        """Starts writing a checkpoint; returns as soon as the arrays are copied.

        Args:
            state: What has been trained so far.
            data_state: The position in the data, as the batch source gives it.
            score: On the selection's split; None if this step was not evaluated.
        """
        step = int(state.step)
        metrics = None if score is None else {"score": float(score), "step": step}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.evaluated),
                optimizer=ocp.args.StandardSave(_optimizer_item(state)),
                data=ocp.args.JsonSave(_of_all_processes(data_state)),
            ),
            metrics=metrics,
            force=True,
        )
        if metrics and (self._best is None or _rank(metrics) > _rank(self._best)):
            self._best = metrics

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the newest state and data position, or None if there is no checkpoint.

        Args:
            like: A state with the shapes, dtypes and shardings that the result shall have.

        Raises:
            UserError: Other parameters, or those of another optimizer, were saved.
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
        state = TrainState(
            optimizer["step"],
            optimizer.get("trainable", restored["params"]),
            optimizer["opt_state"],
            optimizer.get("gradient_state"),
            optimizer.get("average"),
        )
        return state, _of_this_process(restored["data"])

    def restore_params(self, step: int, like: Params) -> Params:
        """Returns the trainable parameters of one step, as they were evaluated."""
        self._manager.wait_until_finished()
        args = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(like)))
        params: Params = self._manager.restore(step, args=args)["params"]
        return params

    def best_step(self) -> int | None:
        """Returns the step with the best score; of equal ones the earliest; None without scores."""
        return None if self._best is None else int(self._best["step"])

    def score(self, step: int) -> float | None:
        """Returns the score that a checkpoint was saved with, None if it had none."""
        self._manager.wait_until_finished()
        metrics = self._manager.metrics(step)
        return None if metrics is None else metrics["score"]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _check_params(self, step: int, like: Params) -> None:
        saved = orbax_params.metadata(checkpoint_folder(self._manager.directory, step))
        wanted = flatten(like)
        for path in sorted(saved.keys() | wanted.keys()):
            shapes = [tuple(x[path].shape) if path in x else "none" for x in (saved, wanted)]
            if shapes[0] != shapes[1]:
                what = f"other trainable parameters ({path}: {shapes[0]}, now {shapes[1]})"
                raise self._misfit(step, what)

    def _misfit(self, step: int, what: str) -> UserError:
        return UserError(
            f"The checkpoint of step {step} in {self._manager.directory} was saved with {what}; "
            "go on with the config it was made with, or choose another Recipe.model_dir."
        )


def _remove_incomplete(directory: Path) -> None:
    """Removes what a killed run has left of a checkpoint in a bucket.

    Orbax would take each folder beside the checkpoints for one, as none has its final name only
    when it is complete.
    """
    if multihost.is_first():
        for checkpoint in _checkpoints(directory).values():
            if not orbax_buckets.is_complete(checkpoint):
                buckets.remove(checkpoint)
    multihost.barrier()


def _rank(metrics: Mapping[str, Any]) -> tuple[float, int]:
    # Of equally good checkpoints the earliest counts: it changed the model least. NaN is the worst.
    score = metrics["score"]
    return -math.inf if math.isnan(score) else score, -int(metrics["step"])


def _of_all_processes(data_state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the position in the data, or each process's own where they differ (packing)."""
    states = [json.loads(text) for text in multihost.gathered(json.dumps(dict(data_state)))]
    return states[0] if all(state == states[0] for state in states) else {_PROCESSES: states}


def _of_this_process(data: Mapping[str, Any]) -> dict[str, Any]:
    states = data.get(_PROCESSES, [data])
    # If the number of processes has changed, any state will do: the loader says what does not fit.
    return dict(states[jax.process_index() % len(states)])


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    item = {"step": state.step, "opt_state": state.opt_state}
    if state.gradient_state is not None:
        item["gradient_state"] = state.gradient_state
    if state.average is not None:
        item |= {"trainable": state.trainable, "average": state.average}
    return item


def _abstract(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
