"""From gin files and flags to a recipe: gin builds frozen dataclasses and is then cleared.

This is the only module that imports gin. Nothing in the library is decorated: `REGISTERED` lists
what a config can name.
"""

import ast
import inspect
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gin

from robust_ft import gin_types, objectives, optim, task_names, trainable, vocabulary
from robust_ft.bundled import ROOT
from robust_ft.data.cache import TaskData
from robust_ft.data.file_task import FileTask
from robust_ft.decoding import Decoder
from robust_ft.ensembles.selection import (
    CocktailSelection,
    EnsembleSelection,
    Selection,
    students,
)
from robust_ft.errors import UserError, nearest
from robust_ft.evaluate import Evaluation, suite
from robust_ft.evaluator import Evaluator
from robust_ft.inference import Inference
from robust_ft.models import bart, gpt2, llama, t5
from robust_ft.models.config import ModelConfig
from robust_ft.models.model import Model
from robust_ft.models.peft import METHODS, Peft
from robust_ft.objectives import gradients
from robust_ft.partitioning import Partitioner
from robust_ft.recipe import Recipe
from robust_ft.stage import Stage

CONFIGS = ROOT / "gin_configs"


def task_data(
    task: str,
    module: str,
    split: str,
    feature_lengths: Mapping[str, int],
    vocabulary: vocabulary.Vocabulary,
    cache_dir: str | None = None,
    shots: int = 0,
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
    config: ModelConfig,
    peft: Sequence[Peft | None] | None = None,
    pad_id: int = 0,
    eos_id: int = 1,
    start_id: int = 0,
    separator_id: int | None = None,
    stop_ids: Sequence[int] = (),
    **methods: Peft | None,
) -> Model:
    """Builds a `Model`; each PEFT method has a parameter of its own, such as `Model.prompt`.

    Args:
        config: The model's config.
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
    return Model(config, used, pad_id, eos_id, start_id, separator_id, tuple(stop_ids))


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


# `**fields` written out, as those of `Stage`.
stage.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        parameter.replace(annotation=_Evaluators) if "evaluations" in name else parameter
        for name, parameter in inspect.signature(Stage).parameters.items()
    ]
)


def recipe(
    name: str,
    model_dir: str,
    stages: Sequence[Stage | Sequence[Stage]],
    seed: int = 0,
    partitioner: Partitioner = Partitioner(),
    selections: Sequence[Selection] = (),
    compile_effort: float = 0.0,
) -> Recipe:
    """Builds a `Recipe`; a group of stages, as `students` returns, counts as its stages."""
    return Recipe(
        name, model_dir, _flat(stages), seed, partitioner, tuple(selections), compile_effort
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
    "EnsembleSelection": EnsembleSelection,
    "Evaluation": Evaluation,
    "FileTask": FileTask,
    "GPT2Config": gpt2.GPT2Config,
    "Inference": Inference,
    "LlamaConfig": llama.LlamaConfig,
    "Model": model,
    "ModelConfig": ModelConfig,
    "Partitioner": Partitioner,
    "Recipe": recipe,
    "Schedule": optim.Schedule,
    "SentencePieceVocabulary": vocabulary.SentencePieceVocabulary,
    "Stage": stage,
    "T5Config": t5.T5Config,
    "TaskData": task_data,
    "TokenizersVocabulary": vocabulary.TokenizersVocabulary,
    "backprop": gradients.backprop,
    "bitfit": trainable.bitfit,
    "students": students,
    "suite": suite,
    "top_layers": trainable.top_layers,
    "vocabulary_from_directory": vocabulary.vocabulary_from_directory,
}


class Config(NamedTuple):
    """What a config describes.

    Attributes:
        recipe: For `train`.
        inference: For `eval` and `infer`.
        operative: All values that it was built from, as the text of a gin file.
        settings: {field: {scope: name}}: what sets a field in the config, such as
            {"Stage.steps": {"model": "TRAIN_STEPS", "prompt": "PROMPT_TRAIN_STEPS"}}; scope "" is
            the field where no scope says otherwise.
    """

    recipe: Recipe
    inference: Inference
    operative: str
    settings: Mapping[str, Mapping[str, str]]

    def explain(self, error: UserError) -> UserError:
        """Returns an error that names fields with what sets them in the config."""
        return _with_settings(str(error), self.settings)


def load(
    files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()
) -> Config:
    """Parses files, then bindings (later ones win), builds the recipe and clears gin.

    Unless a file or a binding says otherwise, the recipe is named after the files, as in
    "full_rte+lora", and MODEL_DIR is /tmp/robust_ft/<name>.

    Args:
        files: gin files, found in the working directory, `search_paths` or the project's root.
        bindings: gin statements such as "TRAIN_STEPS=10".
        search_paths: Folders to look for files, before the project's root.

    Raises:
        UserError: A file, name, macro or value is wrong; one sentence says where.
    """
    if not files:
        recipes = ", ".join(sorted(path.name for path in CONFIGS.glob("*.gin")))
        raise UserError(f"Give a recipe with --gin_file=gin_configs/NAME.gin; there are {recipes}.")
    folders = ["", *search_paths, str(ROOT)]
    name = "+".join(Path(file).stem for file in files)
    defaults = [f"Recipe.name = {name!r}", f"MODEL_DIR = {f'/tmp/robust_ft/{name}'!r}"]
    statements = [_quoted(binding) for binding in bindings]
    gin.clear_config()
    _prepare(folders)
    try:
        texts = [*(text for file in files for text in _texts(file, folders)), *statements]
        _check_names(texts, statements)
        gin.parse_config(defaults)
        gin.parse_config_files_and_bindings(list(files), statements, finalize_config=False)
        _bind_families()
        gin.finalize()
        recipe = gin.get_configurable("Recipe")()
        inference = gin.get_configurable("Inference")()
        # Last, so that it holds all that a later `train`, `eval` or `infer` needs.
        return Config(recipe, inference, gin.operative_config_str(), _settings())
    except UserError as error:
        # gin appends which calls it was in, line by line.
        message, *calls = str(error).split("\n  In call to")
        scopes = re.findall(r"in scope '([^']*)'", "".join(calls))
        raise _with_settings(message, _settings(), scopes) from None
    except tokenize.TokenError:
        places = ", ".join([*files, *(f"--gin.{binding}" for binding in bindings)])
        raise UserError(
            f"A bracket or quote is opened but never closed; look in {places}."
        ) from None
    except (ValueError, TypeError, OSError, SyntaxError) as error:
        raise _explain(error) from error
    finally:
        gin.clear_config()


# gin keeps registered names for the life of the process.
_known_to_gin: set[str] = set()


def _prepare(folders: Sequence[str]) -> None:
    # gin's functions can only extend these lists: folders of an earlier call would be searched too.
    # gin's second reader takes folders for packages, and fails for ours.
    gin.config._LOCATION_PREFIXES[:] = folders
    del gin.config._FILE_READERS[1:]
    for name, target in REGISTERED.items():
        if name not in _known_to_gin:
            gin.external_configurable(gin_types.typed(name, target), name=name, module="robust_ft")
            _known_to_gin.add(name)


def _bind_families() -> None:
    """Gives each model family what `ModelConfig` is bound to, unless its own config is bound."""
    families = [
        name
        for name, target in REGISTERED.items()
        if isinstance(target, type) and ModelConfig in target.__bases__
    ]
    for (scope, selector), values in list(gin.config._CONFIG.items()):
        if not selector.endswith(".ModelConfig"):
            continue
        for family in families:
            own = gin.config._CONFIG.get((scope, selector.replace("ModelConfig", family)), {})
            for field in values.keys() - own.keys():
                parameter = f"{scope}/{family}.{field}".removeprefix("/")
                gin.bind_parameter(parameter, values[field])


def _quoted(binding: str) -> str:
    """Returns `NAME='/tmp/run'` for `NAME=/tmp/run`, since shells remove quotes."""
    name, sign, value = binding.partition("=")
    if not sign:
        raise UserError(f"--gin.{binding} lacks a value; write --gin.{binding}=VALUE.")
    if value.startswith(("@", "%")):
        return binding
    try:
        ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        if re.search(r"[@%\[({]", value):  # a composite value that holds references
            return binding
        return f"{name}={value.strip()!r}"
    return binding


def _texts(file: str, folders: Sequence[str], above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the texts of the files that a gin file includes, then its own, without comments."""
    if file in above:
        raise UserError(f"The gin file '{file}' includes itself: {' > '.join((*above, file))}.")
    for folder in folders if not Path(file).is_absolute() else [""]:
        path = Path(folder) / file
        if path.is_file():
            break
    else:
        known = [str(p.relative_to(ROOT)) for p in CONFIGS.rglob("*.gin")]
        where = ", ".join(f"'{folder or '.'}'" for folder in folders)
        raise UserError(f"There is no gin file '{file}' in {where}." + nearest(file, known))
    text = re.sub(r"(?m)^((?:[^#'\"]|'[^']*'|\"[^\"]*\")*?)#.*$", r"\1", path.read_text("utf-8"))
    for include in re.findall(r"""(?m)^include\s+['"](.+)['"]""", text):
        yield from _texts(include, folders, (*above, file))
    yield text


_MACRO = re.compile(r"(?m)^([A-Za-z_]\w*)\s*=")
_MACRO_USE = re.compile(r"%([A-Za-z_]\w*)")
_SCOPE = re.compile(r"(?m)^([A-Za-z_]\w*)/[\w.]+\s*[:=.]")
_SCOPE_USE = re.compile(r"@([A-Za-z_]\w*)/")


def _check_names(texts: Sequence[str], flags: Sequence[str]) -> None:
    """Raises a UserError for a macro or scope that is set but never read.

    gin accepts them silently. A file may set a macro that only other recipes read, a flag may not.
    """
    text = "\n".join(texts)
    used = set(_MACRO_USE.findall(text))
    shipped = "\n".join(path.read_text("utf-8") for path in CONFIGS.rglob("*.gin"))
    known = used | set(_MACRO_USE.findall(shipped))
    in_flags = [name for flag in flags for name in _MACRO.findall(flag)]
    for name in _MACRO.findall(text):
        if name not in (used if name in in_flags else known):
            raise UserError(f"No config reads the macro '{name}'." + nearest(name, used))
    # gin evaluates a macro's value in a scope of the macro's name.
    scopes = set(_SCOPE_USE.findall(text)) | used
    for scope in _SCOPE.findall(text):
        if scope not in scopes | set(_SCOPE_USE.findall(shipped)):
            raise UserError(f"No config reads the scope '{scope}/'." + nearest(scope, scopes))


def _settings() -> dict[str, dict[str, str]]:
    """Returns `Config.settings` of what gin has parsed.

    A field is set by a macro, or in a scope; where it is set as itself, there is nothing to add.
    """
    settings: dict[str, dict[str, str]] = {}
    for (scope, selector), values in gin.config._CONFIG.items():
        owner = selector.split(".")[-1]
        for field, value in values.items():
            name = repr(value)
            if isinstance(value, gin.config.ConfigurableReference) and name.startswith("%"):
                setting = name.removeprefix("%")
            elif scope:
                setting = f"{scope}/{owner}.{field}"
            else:
                continue
            if owner in REGISTERED:
                settings.setdefault(f"{owner}.{field}", {})[scope] = setting
    return settings


def _with_settings(
    message: str, settings: Mapping[str, Mapping[str, str]], scopes: Sequence[str] = ()
) -> UserError:
    """Returns an error with what sets, in the config, the fields that its message names.

    Args:
        message: Names fields as "Stage.steps", and scopes, if any, in quotes.
        settings: As in `Config.settings`.
        scopes: Further scopes that the error is about.
    """
    added: list[str] = []
    for field in re.findall(r"\b[A-Za-z]\w*\.[a-z]\w*", message):
        by_scope = settings.get(field, {})
        named = [
            name for scope, name in by_scope.items() if scope in scopes or f"'{scope}'" in message
        ]
        if not named and "" in by_scope:
            named = [by_scope[""]]
        added += [name for name in named or by_scope.values() if name not in message]
    if not added:
        return UserError(message)
    end = "." if message.endswith(".") else ""
    names = ", ".join(dict.fromkeys(added))
    return UserError(f"{message.removesuffix('.')} (in the config: {names}){end}")


def _explain(error: Exception) -> UserError:
    """Returns a gin error as one sentence with the place and the nearest valid name."""
    message = str(error)
    place = re.search(r"(In (?:file|bindings string).*?line \d+\s*\n?\s*.*)", message)
    where = f" ({' '.join(place[1].split())})" if place else ""
    if match := re.search(r"No configurable matching (?:reference )?'@?(?:.*/)?([\w.]+)", message):
        name = match[1].removesuffix("()")
        return UserError(f"Configs know no '{name}'{where}." + nearest(name, REGISTERED))
    if match := re.search(r"Configurable '(.*)' doesn't have a parameter named '(.*)'", message):
        owner, parameter = match[1].split(".")[-1], match[2]
        choices = _parameters(REGISTERED[owner]) if owner in REGISTERED else []
        return UserError(
            f"{owner} has no parameter '{parameter}'{where}." + nearest(parameter, choices)
        )
    if match := re.search(r"No bindings specified for '(\w+)/gin\.macro'", message):
        return UserError(
            f"The config needs a value for the macro {match[1]}; set it with "
            f"--gin.{match[1]}=VALUE or in a later --gin_file."
        )
    if match := re.search(r"missing \d+ required .*?: (.*)", message):
        owner = re.findall(r"In call to configurable '([^']*)'", message)
        owner = owner[0].split(".")[-1] if owner else "a configurable"
        return UserError(f"{owner} needs a value for {match[1]} in the config.")
    if isinstance(error, SyntaxError):
        source = f" in {error.filename}, line {error.lineno}" if error.filename else ""
        return UserError(f"Gin syntax error{source}: {error.msg}: {(error.text or '').strip()}")
    return UserError(f"The config does not build: {message.splitlines()[0]}{where}")


def _parameters(target: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(target).parameters)
