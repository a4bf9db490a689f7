"""Why distillation in distribution helps out of distribution: k-class logistic regression.

Ensembles and Cocktails, section 9 and appendix C. Training data show some of the classes, and the
test has the others. Hard labels leave all unseen classes with the same parameters (Proposition 1);
a teacher's probabilities on the same inputs carry what it knows of them (Proposition 2). All in
NumPy and float64.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from robust_ft.ranges import Count, Share, check_ranges


def probabilities(
    theta: Float[np.ndarray, "classes dim"], inputs: Float[np.ndarray, "examples dim"]
) -> Float[np.ndarray, "examples classes"]:
    """Returns p(class | input) of a model without biases."""
    logits = inputs @ theta.T
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: np.ndarray = exp / exp.sum(axis=1, keepdims=True)
    return result


def train(
    inputs: Float[np.ndarray, "examples dim"],
    targets: Float[np.ndarray, "examples classes"],
    steps: int,
) -> Float[np.ndarray, "classes dim"]:
    """Minimizes the mean cross-entropy by full-batch gradient descent, from zero.

    Args:
        inputs: The examples.
        targets: The probabilities to learn: one-hot labels, a teacher's, or a mixture (eq. 7).
        steps: Number of updates, of the rate 1 / L: the loss's gradient is Lipschitz with
            L = half the largest eigenvalue of X^T X / n, so no step can overshoot.
    """
    rate = 2 * len(inputs) / np.linalg.norm(inputs, 2) ** 2
    theta = np.zeros((targets.shape[1], inputs.shape[1]))
    for _ in range(steps):
        gradient = (probabilities(theta, inputs) - targets).T @ inputs / len(inputs)
        theta -= rate * gradient
    return theta


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A random teacher, and students that see a share of its classes.

    Attributes:
        classes: Number of classes k.
        dim: Dimension d of the inputs, which are standard normal.
        seen: The share of the classes that training data show.
        examples: Number of training examples, and of test examples each.
        teacher_scale: Standard deviation of the teacher's logits; a label is its likeliest class.
        steps: Updates of each student.
    """

    classes: Count = 100
    dim: Count = 16
    seen: Share = 0.5
    examples: Count = 2000
    teacher_scale: float = 3.0
    steps: Count = 1000

    def __post_init__(self) -> None:
        check_ranges(self)

    def accuracies(self, seed: int, weights: tuple[float, ...]) -> dict[str, tuple[float, float]]:
        """Returns {model: (accuracy on seen, on unseen classes)} in percent.

        Args:
            seed: Of the teacher and the inputs.
            weights: The teacher's weights in the cocktail loss (lambda); 0 is hard labels alone.
        """
        rng = np.random.default_rng(seed)
        theta = rng.normal(
            scale=self.teacher_scale / np.sqrt(self.dim), size=(self.classes, self.dim)
        )
        num_seen = max(1, round(self.seen * self.classes))
        inputs, labels = self._of_classes(rng, theta, 0, num_seen)
        soft, hard = probabilities(theta, inputs), np.eye(self.classes)[labels]
        tests = [
            self._of_classes(rng, theta, 0, num_seen),
            self._of_classes(rng, theta, num_seen, self.classes),
        ]
        models = {"teacher": theta}
        for weight in weights:
            name = f"cocktail {weight:g}" if weight else "hard labels"
            models[name] = train(inputs, weight * soft + (1 - weight) * hard, self.steps)
        return {
            name: (_accuracy(model, *tests[0]), _accuracy(model, *tests[1]))
            for name, model in models.items()
        }

    def _of_classes(
        self, rng: np.random.Generator, theta: Float[np.ndarray, "classes dim"], low: int, high: int
    ) -> tuple[Float[np.ndarray, "examples dim"], Int[np.ndarray, " examples"]]:
        """Draws examples whose label is from `low` to below `high`."""
        found: list[np.ndarray] = []
        while sum(map(len, found)) < self.examples:
            inputs = rng.normal(size=(self.examples, self.dim))
            labels = np.argmax(inputs @ theta.T, axis=1)
            found.append(inputs[(labels >= low) & (labels < high)])
        inputs = np.concatenate(found)[: self.examples]
        return inputs, np.argmax(inputs @ theta.T, axis=1)


def _accuracy(
    theta: Float[np.ndarray, "classes dim"],
    inputs: Float[np.ndarray, "examples dim"],
    labels: Int[np.ndarray, " examples"],
) -> float:
    return 100 * float(np.mean(np.argmax(inputs @ theta.T, axis=1) == labels))
