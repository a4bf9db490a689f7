"""Runs few-shot evaluation: every task at 0 shots, then tunings side by side, each evaluated."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from robust_ft import console, finite, multihost, trainable
from robust_ft.errors import UserError
from robust_ft.evaluate import Evaluation
from robust_ft.few_shot import EXAMPLES, FewShot
from robust_ft.few_shot_results import BEST, LAST, ZERO, Line, Results, keys
from robust_ft.few_shot_tasks import RankedTask, drawn, tuning_name
from robust_ft.few_shot_tuning import DIVISORS, Tuner, divisor, kept_epochs, training_batch
from robust_ft.files import as_path, write_json
from robust_ft.predictor import Predictor
from robust_ft.recipe import Recipe
from robust_ft.restore import place_params
from robust_ft.stage import stage_key
from robust_ft.stage_start import restored
from robust_ft.summary import FEW_SHOT, Summary
from robust_ft.trainable import flatten
from robust_ft.trainer import Stopped
from robust_ft.types import Params


class Tuning(NamedTuple):
    """One tuning of a prompt.

    Attributes:
        evaluation: The task.
        seed: Which draw of its examples.
        batch: The examples.
    """

    evaluation: Evaluation
    seed: int
    batch: dict[str, np.ndarray]


def run_few_shot(
    recipe: Recipe,
    few_shot: FewShot,
    summary: Summary,
    stop: multihost.Stop,
    in_memory: Params | None = None,
) -> None:
    """Evaluates what is missing, and writes each evaluation when it is complete.

    A run that was interrupted goes on at the first group of tunings that lacks one, which is tuned
    again as a whole, so that its files do not depend on where it was interrupted.

    Args:
        recipe: The recipe; its stages have finished, and its mesh is active.
        few_shot: Its few-shot evaluation.
        summary: Gets the results, means over seeds.
        stop: Set from outside to stop after the group of tunings in progress.
        in_memory: The final parameters of the stage that is restored, if they are in memory still.

    Raises:
        Stopped: `stop` was set.
        UserError: What is restored, or a tuned prompt, is not finite.
    """
    results = Results(as_path(recipe.model_dir), few_shot, enabled=multihost.is_first())
    multihost.barrier()  # all have read what the first one is about to replace
    if results.missing():
        job = _Job(recipe, few_shot, results, in_memory)
        total = len(keys(few_shot))
        with (
            multihost.stop_on_ctrl_c(stop),
            console.progress(FEW_SHOT, total, len(results), unit="evaluations") as progress,
        ):
            for lines in itertools.chain(job.zero_shot(), job.tuned()):
                results.add(lines)
                progress.update(len(results))
                if stop.is_set() and results.missing():
                    raise Stopped(f"Stopped after {len(results)} of {total} evaluations.")
    summary.add(results.rows())
    console.print_line(
        f"[{FEW_SHOT}] accuracy, mean over {len(few_shot.evaluations)} task(s): "
        f"{results.mean(ZERO):.1f} at 0 shots, {results.mean(LAST):.1f} at {few_shot.examples} "
        f"(best epoch by the {few_shot.best_on}: {results.mean(BEST):.1f}), guessing "
        f"{results.mean_random():.1f}."
    )


class _Job:
    """What is missing of few-shot evaluation, with the model that it is done with."""

    def __init__(
        self, recipe: Recipe, few_shot: FewShot, results: Results, in_memory: Params | None
    ):
        self._recipe, self._few_shot, self._results = recipe, few_shot, results
        self._paths = few_shot.trainable_paths()
        known = restored(recipe, few_shot, in_memory)
        self._fresh = flatten(few_shot.model.shapes()).keys() - known.keys()
        few_shot.check_zero_shot(self._fresh)
        params = self._place(known, 0)
        what = f"What few-shot tuning starts from, FewShot.restore='{few_shot.restore}',"
        finite.check(params, what, "give a checkpoint that can be used")
        self._first, self._frozen = trainable.split(params, self._paths)
        self._starts = {0: _on_host(self._first)}
        self._read = functools.cache(RankedTask.of)
        self._tuner = Tuner(few_shot, self._frozen, recipe.partitioner)
        self._predictor = Predictor(
            few_shot.model, params, few_shot.data.vocabulary, recipe.partitioner
        )

    def zero_shot(self) -> Iterator[list[Line]]:
        """Yields the evaluation of each task before tuning."""
        missing = {task for task, _, which in self._results.missing() if which == ZERO}
        predictor = self._predictor.without(*self._few_shot.zero_shot_without)
        for evaluation in self._few_shot.evaluations:
            if evaluation.task in missing:
                task = self._read(evaluation)
                outputs = evaluation.outputs(predictor, task.examples)
                correct = [
                    task.right[i, example.answer_choices.index(answer)]
                    for i, (example, [answer]) in enumerate(
                        zip(task.examples, outputs, strict=True)
                    )
                ]
                yield [self._line(task, None, ZERO, 0, np.array(correct))]

    def tuned(self) -> Iterator[list[Line]]:
        """Yields the evaluations of a group's tunings, one tuning after the other."""
        missing = {(task, seed) for task, seed, which in self._results.missing() if which != ZERO}
        for group, width in self._groups():
            if not missing & {(each.evaluation.task, each.seed) for each in group}:
                continue
            lanes = [*group, *[group[-1]] * (width - len(group))]
            names = [tuning_name(each.evaluation.task, each.seed) for each in lanes]
            starts = [self._start(each.seed) for each in lanes]
            kept = self._tuner.tune(
                {path: np.stack([start[path] for start in starts]) for path in starts[0]},
                [each.batch for each in lanes],
                [stage_key(self._recipe.seed, name, "dropout") for name in names],
            )
            for i, tuning in enumerate(group):
                prompts = {path: x[i] for path, x in kept.prompts.items()}  # [epochs, ...]
                self._check_finite(tuning, prompts)
                yield self._evaluated(tuning, prompts, kept.losses[i])

    def _groups(self) -> Iterator[tuple[list[Tuning], int]]:
        """Yields the tunings of each program's runs, and how many fit into one."""
        few_shot = self._few_shot
        buckets: dict[int, list[Tuning]] = {each: [] for each in DIVISORS}
        ids: dict[str, list[list[int]]] = {}
        for evaluation in few_shot.evaluations:
            for seed in range(few_shot.seeds):
                examples = drawn(few_shot, evaluation, self._recipe.seed, seed)
                ids.setdefault(evaluation.task, []).append([each.id for each in examples])
                lengths = [(len(each.inputs), len(each.targets)) for each in examples]
                bucket = divisor(few_shot, lengths)
                batch = training_batch(few_shot, examples, bucket)
                buckets[bucket].append(Tuning(evaluation, seed, batch))
        if multihost.is_first():
            write_json(as_path(self._recipe.model_dir) / FEW_SHOT / "examples.json", ids)
        for tunings in buckets.values():
            runs = -(-len(tunings) // few_shot.side_by_side)
            width = -(-len(tunings) // max(runs, 1))
            for start in range(0, len(tunings), width or 1):
                yield tunings[start : start + width], width

    def _evaluated(
        self,
        tuning: Tuning,
        prompts: dict[str, np.ndarray],
        losses: Float[np.ndarray, " epochs"],
    ) -> list[Line]:
        """Returns the evaluations under the prompts of the last and of the best epoch."""
        task, epochs = self._read(tuning.evaluation), kept_epochs(self._few_shot)
        if self._few_shot.best_on == EXAMPLES:
            best = int(np.argmin(losses))  # of equal ones the first
            chosen = sorted({best, len(epochs) - 1})
            some = {path: x[chosen] for path, x in prompts.items()}
            correct = dict(zip(chosen, self._tuner.rank(task, some), strict=True))
        else:
            ranked = self._tuner.rank(task, prompts)
            best = int(np.argmax(ranked.mean(axis=1)))
            correct = dict(enumerate(ranked))
        found = ((LAST, len(epochs) - 1), (BEST, best))
        return [self._line(task, tuning.seed, w, epochs[i], correct[i]) for w, i in found]

    def _line(
        self,
        task: RankedTask,
        seed: int | None,
        which: str,
        epoch: int,
        correct: Bool[np.ndarray, " examples"],
    ) -> Line:
        name = task.evaluation.task
        return Line(
            name,
            self._few_shot.dataset(name),
            task.evaluation.split,
            0 if seed is None else self._few_shot.examples,
            seed,
            which,
            epoch,
            100 * float(np.mean(correct)),
            task.random_accuracy,
            tuple(map(int, correct)),
        )

    def _start(self, seed: int) -> dict[str, np.ndarray]:
        """Returns what a tuning starts from; only what no stage has trained depends on the seed."""
        if not self._fresh:
            return self._starts[0]
        if seed not in self._starts:
            placed = flatten(trainable.merge(self._frozen, self._first))
            restored = {path: x for path, x in placed.items() if path not in self._fresh}
            drawn_anew, _ = trainable.split(self._place(restored, seed), self._paths)
            self._starts[seed] = _on_host(drawn_anew)
        return self._starts[seed]

    def _place(self, known: Mapping[str, Any], seed: int) -> Params:
        keys = (stage_key(self._recipe.seed, f"{FEW_SHOT}/{seed}", use) for use in ("init", "peft"))
        return place_params(self._few_shot.model, self._recipe.partitioner, known, *keys)

    def _check_finite(self, tuning: Tuning, prompts: Mapping[str, np.ndarray]) -> None:
        if not all(np.isfinite(x).all() for x in prompts.values()):
            raise UserError(
                f"The prompt of task '{tuning.evaluation.task}', seed {tuning.seed}, is not finite "
                "after few-shot tuning; lower the learning rate of FewShot.optimizer."
            )


def _on_host(prompt: Params) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten(multihost.whole(prompt)).items()}
