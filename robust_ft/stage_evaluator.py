"""Runs a stage's evaluations: evaluates, records, and shows the results."""

import dataclasses
from collections.abc import Sequence

from robust_ft import console, multihost
from robust_ft.errors import UserError
from robust_ft.evaluator import HELD_OUT, TARGET, EvalContext, Evaluator, Result, held_out_rows
from robust_ft.metric_writer import EVALUATIONS, MetricWriter
from robust_ft.metrics.norm_avg import norm_avg
from robust_ft.predictor import Predictor
from robust_ft.run_context import RunContext
from robust_ft.stage import Stage
from robust_ft.summary import KEPT, Row
from robust_ft.types import Params

INPUT_SHOWN = 60  # characters, of an input's end


class StageEvaluator:
    """Runs evaluators on a stage's model and records their results.

    An evaluator that detaches all that the stage trains sees the same model at every step: it runs
    once and its result is repeated.

    Args:
        stage: The stage.
        run: Where it runs, and what evaluators may ask for.
        writer: Writes values to metrics.jsonl and TensorBoard.
    """

    def __init__(self, stage: Stage, run: RunContext, writer: MetricWriter):
        self._stage = stage
        self._run = run
        self.writer = writer
        self._trained = stage.trainable_paths()
        # By evaluator and the names of the methods that were detached.
        self._constant: dict[tuple[Evaluator, tuple[str, ...]], Result] = {}

    def __call__(
        self,
        evaluators: Sequence[Evaluator],
        params: Params,
        step: int,
        pretrained: bool = False,
        kept: bool = False,
    ) -> float | None:
        """Evaluates and records.

        Args:
            evaluators: What to run.
            params: All of the model's parameters.
            step: Number of steps done.
            pretrained: Whether to detach all PEFT methods from the model.
            kept: Whether to evaluate held-out tasks also with the methods that they detach.

        Returns:
            The target's score, the mean if there are several targets, None without one.
        """
        names = tuple(method.name for method in self._stage.model.peft)
        results = []
        for each in evaluators:
            detached = names if pretrained else each.detached(self._stage.model)
            results.append(self._evaluate(each, params, step, detached))
        if kept:
            results = [*self._with_all_methods(evaluators, params, step), *results]
        rows = held_out_rows(results, self._stage.name, step)
        for result in results:
            rows += result.rows(self._stage.name, step)
            if multihost.is_first():
                result.write(self._run.directory / self._stage.name / EVALUATIONS, step)
            self.writer.write(step, result.values, result.split, result.name)
        self._run.summary.add(rows)
        self._show(results, rows, step)
        for callback in self._run.callbacks:
            callback.on_evaluation(self._stage, step, results)
        scores = [result.score for result in results if result.role == TARGET]
        return norm_avg(scores) if scores else None

    def _with_all_methods(
        self, evaluators: Sequence[Evaluator], params: Params, step: int
    ) -> list[Result]:
        """Returns the results of held-out tasks with the methods that they are else without.

        A task on which the model cannot be evaluated so has none: where each task has a prompt of
        its own, or where the model's positions do not suffice.
        """
        results: list[Result] = []
        reason = ""
        for each in evaluators:
            detached = each.detached(self._stage.model)
            if each.role == HELD_OUT and detached:
                try:
                    result = self._evaluate(each, params, step, ())
                    results.append(dataclasses.replace(result, role=KEPT))
                except UserError as error:
                    without = " and ".join(detached)
                    reason = reason or f"{each.task} is evaluated without {without} only: {error}"
        if reason:
            console.print_line(f"[{self._stage.name}] {reason}")
        return results

    def _evaluate(
        self, evaluator: Evaluator, params: Params, step: int, detached: tuple[str, ...]
    ) -> Result:
        stage, run = self._stage, self._run
        methods = {method.name: method for method in stage.model.peft}
        key = evaluator, detached
        if key in self._constant:
            return self._constant[key]
        predictor = Predictor(stage.model, params, stage.data.vocabulary, run.partitioner)
        teacher = None if run.teacher is None else run.teacher.with_shared(params)
        result = evaluator(
            EvalContext(predictor.without(*detached), stage, step, teacher, run.pretrained)
        )
        result = dataclasses.replace(result, without=detached)
        if all(any(methods[name].owns(path) for name in detached) for path in self._trained):
            self._constant[key] = result
        return result

    def _show(self, results: Sequence[Result], rows: Sequence[Row], step: int) -> None:
        if not results:
            return
        means = {(row.role, row.shots, row.metric): row for row in rows if row.task == HELD_OUT}
        other_tasks = (HELD_OUT, KEPT)
        facts = [f"{r.name} {r.metric} {r.score:.1f}" for r in results if r.role not in other_tasks]
        for shots in sorted({shots for _, shots, _ in means}):
            mean = means[HELD_OUT, shots, "norm_avg"]
            share = means.get((HELD_OUT, shots, "format_share"))
            fact = f"held-out {shots}-shot {mean.value:.1f}"
            if mean.without:
                fact += f" without {' and '.join(mean.without)}"
            if with_all := means.get((KEPT, shots, "norm_avg")):
                fact += f", {with_all.value:.1f} with"
            facts.append(fact + (f" ({share.value:.1%} in the target's format)" if share else ""))
        console.print_line(
            f"[{self._stage.name}] step {step}, {results[0].split}: {'; '.join(facts)}"
        )
        for result in _sampled(results):
            console.print_line("    " + _sample(result, step))


def _sampled(results: Sequence[Result]) -> list[Result]:
    """Returns the target's result and two held-out ones, far apart in the list."""
    held_out = [r for r in results if r.role == HELD_OUT]
    target = [r for r in results if r.role == TARGET][:1]
    return [r for r in (*target, *held_out[:1], *held_out[1:][-1:]) if r.predictions]


def _sample(result: Result, step: int) -> str:
    """Returns one line: the end of an input, the output, and the target if they differ."""
    example = result.predictions[step % len(result.predictions)]
    text = example["input"]
    text = text if len(text) <= INPUT_SHOWN else "…" + text[-INPUT_SHOWN:]
    output = example.get("prediction", example.get("score"))
    target = "" if output == example["target"] else f"  (target: {example['target']})"
    return f"{result.name}: {text} → {output}{target}"
