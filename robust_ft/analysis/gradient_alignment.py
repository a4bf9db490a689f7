"""Gradient alignment: how much of a gradient is about the format of the targets alone.

ProMoT, section 3.2 and figures 3 and 7. Where the targets are shuffled among the inputs, only
their format is left to learn.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from robust_ft.analysis import examples
from robust_ft.data.loader import EvalExample
from robust_ft.errors import UserError
from robust_ft.evaluate import ALL, Evaluation
from robust_ft.evaluator import EvalContext, Result
from robust_ft.models.model import LanguageModel, Model
from robust_ft.objectives import CrossEntropy
from robust_ft.predictor import Predictor
from robust_ft.ranges import Count, Integer, check_ranges
from robust_ft.summary import ANALYSIS
from robust_ft.trainable import flatten, merge, split
from robust_ft.types import Batch, Params

# "decoder/layers_3/self_attention/query/kernel" -> its stack, its layer, and the part: an
# attention's projection, or the whole MLP. Norms belong to no part.
_PART = re.compile(
    r"(?P<stack>encoder|decoder)/layers_(?P<layer>\d+)/"
    r"(?P<part>mlp|\w*attention/(?:query|key|value|qkv|out))/.*"
)


@dataclasses.dataclass(frozen=True)
class GradientAlignment:
    """The cosine of a task's gradient and its format gradient, by parts of the last layer.

    An `Evaluator`. The gradients are those of the mean cross-entropy on the same inputs: with
    their own targets, and with all targets shuffled. The values are `cosine` over all parts
    together, `format_norm` (the format gradient's norm over the other's), and a cosine for each
    part, such as `decoder/layers_1/mlp`.

    Attributes:
        evaluation: The task, its split and its limit. With what it detaches, say its prompt, it
            tells what a model would learn without that.
        all_layers: Whether to take every layer of encoder and decoder, not the decoder's last.
        batch_size: Examples at once.
        seed: Of the shuffling.
    """

    evaluation: Evaluation
    all_layers: bool = False
    batch_size: Count = 32
    seed: Integer = 0

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def task(self) -> str:
        detach = self.evaluation.detach
        names = [detach] if detach == ALL else list(detach)
        parts = "_all_layers" * self.all_layers  # whose cosine is another
        return f"gradient_alignment{parts}" + "".join(f"_without_{name}" for name in names)

    @property
    def split(self) -> str:
        return self.evaluation.split

    @property
    def role(self) -> str:
        return ANALYSIS

    def detached(self, model: LanguageModel) -> tuple[str, ...]:
        """Returns the methods that the task detaches."""
        return self.evaluation.detached(model)

    def __call__(self, context: EvalContext) -> Result:
        """Computes both gradients.

        Raises:
            UserError: The predictor is an ensemble, the batch does not divide over the devices,
                or the task has one example, which cannot be shuffled.
        """
        predictor = examples.predictor(context, "GradientAlignment")
        examples.check_batch_size(predictor, self.batch_size, "GradientAlignment")
        inputs = examples.read(self.evaluation)
        if len(inputs) < 2:
            raise UserError(
                f"GradientAlignment shuffles targets, but '{self.evaluation.task}' has "
                f"{len(inputs)} example in '{self.split}'."
            )
        targets = examples.targets(inputs)
        order = np.random.default_rng(self.seed).permutation(len(targets))
        parts = _parts(predictor.model, self.all_layers)
        gradients = [
            self._gradient(predictor, inputs, each, frozenset(parts))
            for each in (targets, [targets[i] for i in order])
        ]
        products = {
            path: [float(product) for product in of_path]
            for path, of_path in jax.device_get(_products(*map(flatten, gradients))).items()
        }
        _, total, of_format = (sum(column) for column in zip(*products.values(), strict=True))
        values = {
            "cosine": _cosine(products.values()),
            "format_norm": math.sqrt(of_format / total) if total else math.nan,
        }
        for part in sorted(set(parts.values())):
            values[part] = _cosine(products[path] for path in parts if parts[path] == part)
        return Result(self.task, self.split, self.role, values, len(inputs))

    def _gradient(
        self,
        predictor: Predictor,
        inputs: list[EvalExample],
        targets: list[np.ndarray],
        paths: frozenset[str],
    ) -> Params:
        """Returns the gradient summed over target tokens; their number is the same for both."""
        total: Params | None = None
        for batch in examples.batches(self.evaluation, inputs, targets, predictor, self.batch_size):
            with predictor.partitioner.activate():
                gradient = _gradient(predictor.model, paths, predictor.params, batch)
            total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        assert total is not None
        return total


def _parts(model: Model, all_layers: bool) -> dict[str, str]:
    """Returns {path: part} of the parameters whose gradients are compared."""
    found = {path: match for path in flatten(model.shapes()) if (match := _PART.fullmatch(path))}
    base = {path: match for path, match in found.items() if not model.peft_owns(path)}
    last = max(int(m["layer"]) for m in base.values() if m["stack"] == "decoder")
    return {
        path: f"{m['stack']}/layers_{m['layer']}/{m['part']}"
        for path, m in base.items()
        if all_layers or (m["stack"], int(m["layer"])) == ("decoder", last)
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient(model: Model, paths: frozenset[str], params: Params, batch: Batch) -> Params:
    """Returns the float32 gradient of the cross-entropy, summed over target tokens."""
    chosen, rest = split(params, paths)

    def loss(chosen: Params) -> jax.Array:
        total, _, _ = CrossEntropy()(model, merge(chosen, rest), batch, None)
        return total

    gradient: Params = jax.tree.map(lambda x: x.astype(jnp.float32), jax.grad(loss)(chosen))
    return gradient


@jax.jit
def _products(
    gradient: dict[str, jax.Array], other: dict[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns <g, h>, <g, g> and <h, h> for each path."""
    return {
        path: (jnp.vdot(g, other[path]), jnp.vdot(g, g), jnp.vdot(other[path], other[path]))
        for path, g in gradient.items()
    }


def _cosine(products: Iterable[list[float]]) -> float:
    """Returns the cosine of two vectors, given the products of their pieces; NaN of a zero one."""
    dot, gg, hh = (sum(column) for column in zip(*products, strict=True))
    return dot / math.sqrt(gg * hh) if gg * hh > 0 else math.nan
