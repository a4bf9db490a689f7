"""What a config can name: `REGISTERED`, and functions that build from what gin can express."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from robust_ft import objectives, optim, task_names, trainable, vocabulary
from robust_ft.analysis import Drift, GradientAlignment, PromptNeighbors
from robust_ft.data.cache import TaskData
from robust_ft.data.file_task import FileTask
from robust_ft.data.replay import Replay
from robust_ft.decoding import Decoder
from robust_ft.ensembles.selection import (
    CocktailSelection,
    EnsembleSelection,
    Selection,
    students,
)
from robust_ft.ensembles.weight_interpolation import InterpolationSelection
from robust_ft.errors import UserError
from robust_ft.evaluate import Evaluation, suite
from robust_ft.evaluator import Evaluator
from robust_ft.few_shot import FewShot
from robust_ft.half_finetuning import HalfFinetuning
from robust_ft.inference import Inference
from robust_ft.models import bart, gpt2, llama, t5
from robust_ft.models.config import ModelConfig
from robust_ft.models.model import Model
from robust_ft.models.peft import METHODS, Peft
from robust_ft.objectives import gradients, meta_learning
from robust_ft.partitioning import Partitioner
from robust_ft.ranges import Count, Integer, Range, Whole, check
from robust_ft.recipe import Recipe
from robust_ft.stage import Stage


def task_data(
    task: str,
    module: str,
    split: str,
    feature_lengths: Mapping[str, int],
    vocabulary: vocabulary.Vocabulary,
    cache_dir: str | None = None,
    shots: Whole = 0,
    file_tasks: Sequence[FileTask] = (),
) -> TaskData:
    """Builds `TaskData` from t5x's parameters.

    Args:
        task: Name of the task or mixture.
        module: The module that registers it.
        split: Name of the split.
        feature_lengths: As t5x's TASK_FEATURE_LENGTHS, {'inputs': 512, 'targets': 128}.
        vocabulary: Of the model.
        cache_dir: The folder of all caches.
        shots: Number of exemplars before each input; above 0, the task is "<task>_<shots>shot".
        file_tasks: Tasks that are read from files.
    """
    check("TaskData.shots", shots, Range(least=0))
    if set(feature_lengths) != {"inputs", "targets"}:
        raise UserError(
            f"TaskData.feature_lengths={dict(feature_lengths)} needs exactly 'inputs' and "
            "'targets'."
        )
    return TaskData(
        task=task_names.with_shots(task, shots),
        module=module,
        split=split,
        inputs_length=feature_lengths["inputs"],
        targets_length=feature_lengths["targets"],
        vocabulary=vocabulary,
        cache_dir=cache_dir,
        file_tasks=tuple(file_tasks),
    )


def model(
    config: ModelConfig | Model,
    peft: Sequence[Peft | None] | None = None,
    pad_id: Whole | None = None,
    eos_id: Whole | None = None,
    start_id: Whole | None = None,
    separator_id: Whole | None = None,
    stop_ids: Sequence[Whole] | None = None,
    **methods: Peft | None,
) -> Model:
    """Builds a `Model`; each PEFT method has a parameter of its own, such as `Model.prompt`.

    Ids that are None are those of a pretrained model, or else the defaults of `Model`.

    Args:
        config: The model's sizes, or a pretrained model, as `pretrained_model` returns.
        peft: All methods, if given, in place of `methods`; None leaves one out.
        pad_id: Id of the padding token.
        eos_id: Id of the token that ends a sequence.
        start_id: Id of the first token of every decoder input; in a decoder-only model, of what
            stands for an input without tokens.
        separator_id: Id of a token between input and target of a decoder-only model.
        stop_ids: Further ids at which decoding stops.
        **methods: A method by its name in `METHODS`, whose order they get; None leaves one out.
    """
    if peft is None:
        peft = [methods.get(name) for name in METHODS]
    used = tuple(method for method in peft if method is not None)
    base = Model(config) if isinstance(config, ModelConfig) else config
    ids = {
        "pad_id": pad_id,
        "eos_id": eos_id,
        "start_id": start_id,
        "separator_id": separator_id,
        "stop_ids": None if stop_ids is None else tuple(stop_ids),
    }
    given: dict[str, Any] = {name: value for name, value in ids.items() if value is not None}
    return dataclasses.replace(base, peft=used, **given)


# `**methods` written out, for gin and `gin_types`: they refuse what is no parameter.
model.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *list(inspect.signature(model).parameters.values())[:-1],
        *(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=method | None
            )
            for name, method in METHODS.items()
        ),
    ]
)


# A list in which `suite` may stand beside evaluations and analyses.
_Evaluators = Sequence[Evaluator | Sequence[Evaluator]]


def stage(
    evaluations: _Evaluators = (), final_evaluations: _Evaluators = (), **fields: Any
) -> Stage:
    """Builds a `Stage`; a group of evaluations, as `suite` returns, counts as its evaluations."""
    return Stage(
        evaluations=_flat(evaluations), final_evaluations=_flat(final_evaluations), **fields
    )


def _flat(groups: Sequence[Any]) -> tuple[Any, ...]:
    flat: list[Any] = []
    for group in groups:
        flat += group if isinstance(group, list | tuple) else [group]
    return tuple(flat)


def _as_of(built: type[Stage] | type[FewShot]) -> inspect.Signature:
    """Returns the signature of what is built, for a builder's `**fields` written out."""
    return inspect.Signature(
        [
            parameter.replace(annotation=_Evaluators) if "evaluations" in name else parameter
            for name, parameter in inspect.signature(built).parameters.items()
        ]
    )


stage.__signature__ = _as_of(Stage)  # type: ignore[attr-defined]


def few_shot(evaluations: _Evaluators, **fields: Any) -> FewShot:
    """Builds a `FewShot`; a group of evaluations, as `suite` returns, counts as its evaluations."""
    return FewShot(evaluations=_flat(evaluations), **fields)


few_shot.__signature__ = _as_of(FewShot)  # type: ignore[attr-defined]


def drift(
    evaluations: Sequence[Evaluation | Sequence[Evaluation]], batch_size: Count = 32
) -> Drift:
    """Builds a `Drift`; a group of evaluations, as `suite` returns, counts as its evaluations."""
    return Drift(_flat(evaluations), batch_size)


def recipe(
    name: str,
    model_dir: str,
    stages: Sequence[Stage | Sequence[Stage]],
    seed: Integer = 0,
    partitioner: Partitioner = Partitioner(),
    selections: Sequence[Selection] = (),
    few_shot: FewShot | None = None,
    compile_effort: Annotated[float, Range(least=-1, most=1)] = 0.0,
    tuned_up_to: Count | None = None,
) -> Recipe:
    """Builds a `Recipe`; a group of stages, as `students` returns, counts as its stages."""
    return Recipe(
        name,
        model_dir,
        _flat(stages),
        seed,
        partitioner,
        tuple(selections),
        few_shot,
        compile_effort,
        tuned_up_to,
    )


REGISTERED: dict[str, Callable[..., Any]] = {
    **{method.__name__: method for method in METHODS.values()},
    "AdamW": optim.AdamW,
    "Adafactor": optim.Adafactor,
    "BartConfig": bart.BartConfig,
    "BpeVocabulary": vocabulary.BpeVocabulary,
    "ByteVocabulary": vocabulary.ByteVocabulary,
    "Cocktail": objectives.Cocktail,
    "CocktailSelection": CocktailSelection,
    "CrossEntropy": objectives.CrossEntropy,
    "Decoder": Decoder,
    "Dft": objectives.Dft,
    "Drift": drift,
    "Eaft": objectives.Eaft,
    "EnsembleSelection": EnsembleSelection,
    "Evaluation": Evaluation,
    "Ewc": objectives.Ewc,
    "FewShot": few_shot,
    "FileTask": FileTask,
    "Flow": objectives.Flow,
    "Fisher": objectives.Fisher,
    "Fomaml": meta_learning.Fomaml,
    "GPT2Config": gpt2.GPT2Config,
    "GradientAlignment": GradientAlignment,
    "HalfFinetuning": HalfFinetuning,
    "Inference": Inference,
    "KlAnchor": objectives.KlAnchor,
    "InterpolationSelection": InterpolationSelection,
    "L2SP": objectives.L2SP,
    "LlamaConfig": llama.LlamaConfig,
    "Model": model,
    "ModelConfig": ModelConfig,
    "Partitioner": Partitioner,
    "PromptNeighbors": PromptNeighbors,
    "Recipe": recipe,
    "Replay": Replay,
    "Reptile": meta_learning.Reptile,
    "Schedule": optim.Schedule,
    "SentencePieceVocabulary": vocabulary.SentencePieceVocabulary,
    "Stage": stage,
    "Stm": objectives.Stm,
    "T5Config": t5.T5Config,
    "TaskData": task_data,
    "TokenizersVocabulary": vocabulary.TokenizersVocabulary,
    "above_bottom_layers": trainable.above_bottom_layers,
    "backprop": gradients.backprop,
    "bitfit": trainable.bitfit,
    "students": students,
    "suite": suite,
    "top_layers": trainable.top_layers,
    "vocabulary_from_directory": vocabulary.vocabulary_from_directory,
}
