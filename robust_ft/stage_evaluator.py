"""What a stage does at its evaluation steps: evaluate, record, show."""

from collections.abc import Sequence
from pathlib import Path

from robust_ft import console
from robust_ft.evaluate import HELD_OUT, TARGET, Evaluation, Result, evaluate, held_out_rows
from robust_ft.metric_writer import MetricWriter
from robust_ft.models.model import Model
from robust_ft.partitioning import Partitioner
from robust_ft.predictor import Predictor
from robust_ft.summary import Summary
from robust_ft.types import Params

SAMPLES_SHOWN = 3


class StageEvaluator:
    """Runs a stage's evaluations and writes what they found.

    An evaluation that detaches every PEFT method that trains, of a stage in which nothing else
    trains, sees the same model at every step: it is run once and its result repeated.

    Args:
        stage: The stage's name.
        directory: The stage's folder.
        model: The stage's model with its PEFT methods.
        trained: The paths of the parameters that train.
        writer: Where values go, for programs and TensorBoard.
        summary: Where rows for summary.json go.
    """

    def __init__(
        self,
        stage: str,
        directory: Path,
        model: Model,
        trained: frozenset[str],
        partitioner: Partitioner,
        writer: MetricWriter,
        summary: Summary,
    ):
        self._stage = stage
        self._outputs = directory / "inference_eval"
        self._model = model
        self._trained = trained
        self._partitioner = partitioner
        self.writer = writer
        self._summary = summary
        self._constant: dict[Evaluation, Result] = {}

    def __call__(
        self, evaluations: Sequence[Evaluation], params: Params, step: int
    ) -> float | None:
        """Evaluates; returns the first target evaluation's score, None without one."""
        results = [self._evaluate(evaluation, params) for evaluation in evaluations]
        rows = held_out_rows(results, self._stage, step)
        for result in results:
            rows += result.rows(self._stage, step)
            result.write(self._outputs, step)
            self.writer.write(
                step, result.values, result.evaluation.data.split, result.evaluation.task
            )
        self._summary.add(rows)
        self._show(results, rows, step)
        scores = [r.score for r in results if r.evaluation.role == TARGET]
        return scores[0] if scores else None

    def _evaluate(self, evaluation: Evaluation, params: Params) -> Result:
        if evaluation in self._constant:
            return self._constant[evaluation]
        predictor = Predictor(self._model, params, evaluation.data.vocabulary, self._partitioner)
        result = evaluate(evaluation, predictor)
        detached = [p for p in self._model.peft if p.name in evaluation.detach]
        if all(any(method.owns(path) for method in detached) for path in self._trained):
            self._constant[evaluation] = result
        return result

    def _show(self, results: Sequence[Result], rows: list[dict], step: int) -> None:
        scores = [
            f"{r.evaluation.task} {r.preferred} {r.score:.1f}"
            for r in results
            if r.evaluation.role == TARGET
        ]
        names = {"norm_avg": "held-out Norm. Avg.", "format_share": "in the target's format"}
        scores += [
            f"{names[row['metric']]} {row['value']:.3g} ({row['shots']}-shot)"
            for row in rows
            if row["task"] == HELD_OUT
        ]
        console.print_line(f"[{self._stage}] step {step}: " + ", ".join(scores))
        shown = [r for r in results if r.evaluation.role == TARGET][:1]
        shown += [r for r in results if r.evaluation.role != TARGET][:: max(1, len(results) // 3)]
        samples = [{"task": r.evaluation.task, **r.predictions[0]} for r in shown]
        console.print_samples(f"step {step}", samples[:SAMPLES_SHOWN])
