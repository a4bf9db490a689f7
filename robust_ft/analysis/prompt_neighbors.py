"""The vocabulary's nearest neighbours of a soft prompt's vectors.

Prompt tuning (Lester et al., 2021, section 7): neighbours form clusters of related words, labels
that the prompt started from stay among them, and several vectors share their neighbours.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from robust_ft import multihost
from robust_ft.analysis import examples
from robust_ft.errors import UserError
from robust_ft.evaluator import EvalContext, Result
from robust_ft.models.model import LanguageModel, Model
from robust_ft.models.peft import Prompt
from robust_ft.ranges import Count, check_ranges
from robust_ft.summary import ANALYSIS
from robust_ft.trainable import flatten


@dataclasses.dataclass(frozen=True)
class PromptNeighbors:
    """The tokens whose embeddings have the highest cosine with each vector of a soft prompt.

    An `Evaluator`. Its values are `nearest_cosine`, the mean over vectors of the highest cosine;
    `shared`, the percentage of vectors whose nearest token is another vector's, too; and with
    labels `labels_found`, the percentage of labels that have a token among the neighbours of any
    vector. The neighbours are written out, one line a vector.

    Attributes:
        count: Number of neighbours; the paper shows 5.
        labels: Class labels to look for; by default those that a stage's prompt starts from.
    """

    count: Count = 5
    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.labels, str):
            raise UserError(f"PromptNeighbors.labels must be a list; write ['{self.labels}'].")
        object.__setattr__(self, "labels", tuple(self.labels))
        check_ranges(self)

    @property
    def task(self) -> str:
        return "prompt_neighbors"

    @property
    def split(self) -> str:
        return "none"

    @property
    def role(self) -> str:
        return ANALYSIS

    def detached(self, model: LanguageModel) -> tuple[str, ...]:
        """Returns the model's methods but prompts, which nothing else depends on."""
        return tuple(method.name for method in model.peft if not isinstance(method, Prompt))

    def __call__(self, context: EvalContext) -> Result:
        """Finds the neighbours.

        Raises:
            UserError: The predictor is an ensemble, or the model has no soft prompt.
        """
        predictor = examples.predictor(context, "PromptNeighbors")
        vocabulary, prompt = predictor.vocabulary, _prompt(predictor.model)
        flat = flatten(predictor.params)
        values = next(flat[path] for path in flat if prompt.owns(path))  # [tasks, prompt, embed]
        # A model may round its embedding up from the vocabulary.
        size = vocabulary.vocab_size
        with predictor.partitioner.activate():
            cosines, tokens = multihost.whole(
                _nearest(values, flat["token_embedder/embedding"][:size], min(self.count, size))
            )  # both [vectors, count]
        texts = [[_text(vocabulary.decode([i]), i) for i in row] for row in np.asarray(tokens)]
        vectors = []
        for name, *each in zip(_names(prompt), texts, np.asarray(cosines).tolist(), strict=True):
            pairs = list(zip(*each, strict=True))
            listed = ", ".join(f"{text} {cosine:.2f}" for text, cosine in pairs)
            vectors.append({"input": name, "target": "", "prediction": listed, "neighbors": pairs})
        nearest = np.asarray(tokens)[:, 0].tolist()
        found = {
            "nearest_cosine": float(np.mean(np.asarray(cosines)[:, 0])),
            "shared": 100 * float(np.mean([nearest.count(token) > 1 for token in nearest])),
        }
        if labels := self.labels or _initial_labels(context):
            neighbors = set(np.asarray(tokens).ravel().tolist())
            hits = [bool(neighbors & set(vocabulary.encode(label))) for label in labels]
            found["labels_found"] = 100 * float(np.mean(hits))
        return Result(self.task, self.split, self.role, found, len(vectors), vectors)


def _prompt(model: Model) -> Prompt:
    for method in model.peft:
        if isinstance(method, Prompt):
            return method
    raise UserError(
        "PromptNeighbors is of a soft prompt, and the model has none; set Model.prompt."
    )


def _initial_labels(context: EvalContext) -> Sequence[str]:
    """Returns the labels that a stage's prompt starts from; a trained prompt keeps no such note."""
    methods = () if context.stage is None else context.stage.model.peft
    return next((method.labels for method in methods if isinstance(method, Prompt)), ())


def _names(prompt: Prompt) -> list[str]:
    vectors = [f"vector {i}" for i in range(prompt.length)]
    return [f"{task}, {v}" for task in prompt.tasks for v in vectors] if prompt.tasks else vectors


def _text(text: str, token: int) -> str:
    """Returns a token's text, or its id where it has none."""
    return repr(text) if text.strip() else f"<{token}>"


def _nearest(
    vectors: Float[Array, "*tasks prompt embed"], table: Float[Array, "vocab embed"], count: int
) -> tuple[Float[Array, "vectors neighbors"], Int[Array, "vectors neighbors"]]:
    """Returns the highest cosines of each vector with a table's rows, and which rows they are."""
    vectors = vectors.reshape(-1, vectors.shape[-1]).astype(jnp.float32)
    table = table.astype(jnp.float32)
    unit, rows = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (vectors, table))
    cosines, tokens = jax.lax.top_k(unit @ rows.T, count)
    return cosines, tokens
