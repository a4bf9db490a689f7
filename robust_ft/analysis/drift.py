"""Drift: how far a model's distribution is from the one that it started with."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robust_ft.analysis import examples
from robust_ft.errors import UserError
from robust_ft.evaluate import Evaluation
from robust_ft.evaluator import EvalContext, Result
from robust_ft.models.model import LanguageModel, Model
from robust_ft.objectives import Teacher
from robust_ft.objectives.chunked_loss import logit_statistics
from robust_ft.predictor import Predictor
from robust_ft.ranges import Count, check_ranges
from robust_ft.summary import ANALYSIS
from robust_ft.types import Batch, Params

_NatsAndTokens = tuple[Float[Array, ""], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Drift:
    """KL(pretrained || model) in nats a target token, given the input and the target before it.

    An `Evaluator`. Its values are means over the target tokens of all tasks of a role: `target`,
    `ood` and `held_out`. Measured on the finetuned task alone, drift forecasts forgetting better
    than other quantities do (Shenfeld et al., 2025, arXiv:2509.04259, who take outputs of the
    model where this takes the task's targets).

    Attributes:
        evaluations: The tasks, as they are evaluated: up to their limits, and each without the
            methods that it detaches. The pretrained model has no methods.
        batch_size: Examples at once.
    """

    evaluations: Sequence[Evaluation]
    batch_size: Count = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "evaluations", tuple(self.evaluations))
        check_ranges(self)
        if not self.evaluations:
            raise UserError("Drift.evaluations is empty; name a task on which to measure it.")
        splits = sorted({evaluation.split for evaluation in self.evaluations})
        if len(splits) > 1:
            raise UserError(f"Drift.evaluations are of one split, not of {' and '.join(splits)}.")

    @property
    def task(self) -> str:
        return "drift"

    @property
    def split(self) -> str:
        return self.evaluations[0].split

    @property
    def role(self) -> str:
        return ANALYSIS

    def detached(self, model: LanguageModel) -> tuple[str, ...]:
        """Returns nothing: each task detaches methods of its own."""
        return ()

    def __call__(self, context: EvalContext) -> Result:
        """Measures the drift on each task.

        Raises:
            UserError: The predictor is an ensemble, there is no pretrained model, the batch does
                not divide over the devices, or there is no target to measure at.
        """
        predictor = examples.predictor(context, "Drift")
        examples.check_batch_size(predictor, self.batch_size, "Drift")
        if context.pretrained is None:
            raise UserError("Drift compares with the pretrained model, which only a run has.")
        pretrained = context.pretrained()
        assert isinstance(pretrained, Predictor)
        teacher = Teacher(pretrained.model, pretrained.params)
        sums: dict[str, list[_NatsAndTokens]] = {}  # of each batch, by role
        num_examples = 0
        for evaluation in self.evaluations:
            own = predictor.without(*evaluation.detached(predictor.model))
            of_role = sums.setdefault(evaluation.role, [])
            inputs = examples.read(evaluation)
            num_examples += len(inputs)
            targets = examples.targets(inputs)
            for batch in examples.batches(evaluation, inputs, targets, own, self.batch_size):
                with own.partitioner.activate():
                    of_role.append(_divergence(own.model, own.params, batch, teacher))
        fetched = jax.device_get(sums)  # once, so that no batch is waited for
        totals = {
            role: (
                sum(float(nats) for nats, _ in fetched[role]),
                sum(float(tokens) for _, tokens in fetched[role]),
            )
            for role in sums
        }
        if empty := [role for role, (_, tokens) in totals.items() if not tokens]:
            raise UserError(
                f"Drift.evaluations: the tasks of the role '{empty[0]}' have no target in "
                f"'{self.split}'; leave them out."
            )
        values = {role: nats / tokens for role, (nats, tokens) in totals.items()}
        return Result(self.task, self.split, self.role, values, num_examples)


@functools.partial(jax.jit, static_argnums=0)
def _divergence(model: Model, params: Params, batch: Batch, pretrained: Teacher) -> _NatsAndTokens:
    """Returns KL(pretrained || model) summed over target tokens, and the number of these."""
    weights = jnp.asarray(batch["decoder_loss_weights"])  # [batch, target]
    kl = logit_statistics(model, params, batch, None, pretrained).kl  # [batch, target]
    return jnp.sum(kl * weights), jnp.sum(weights)
