"""From gin files and flags to a recipe: gin builds frozen dataclasses and is then cleared.

This is the only module that imports gin. Nothing in the library is decorated: `REGISTERED` lists
what a config can name.
"""

import ast
import functools
import inspect
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gin

from robust_ft import gin_builders, gin_types, initial_checkpoint
from robust_ft.bundled import ROOT
from robust_ft.checkpoints_io.tensors import Checkpoint
from robust_ft.errors import UserError, nearest
from robust_ft.inference import Inference
from robust_ft.models.config import ModelConfig
from robust_ft.models.model import Model
from robust_ft.recipe import Recipe
from robust_ft.vocabulary import Vocabulary

CONFIGS = ROOT / "gin_configs"


def pretrained_model(checkpoint: str, vocabulary: Vocabulary) -> Model:
    """Returns the model in a checkpoint: its sizes and token ids, without PEFT methods.

    What no checkpoint determines, such as dropout and dtypes, is what the config binds in the
    family's class (`LlamaConfig.remat`) or in `ModelConfig`. Sizes that it binds are compared with
    the checkpoint's, see `initial_checkpoint.check`; a larger `vocab_size` adds tokens.

    Args:
        checkpoint: A model directory, or a model's name on the Hugging Face hub; of several,
            separated by commas, the first.
        vocabulary: The data's; its pad and eos ids are the model's.
    """
    opened = _opened(checkpoint)
    family = type(opened.config).__name__
    bound = gin.get_bindings(family)
    taken = {
        field: value
        for field, value in vars(opened.config).items()
        if field not in bound and not initial_checkpoint.is_free(field)
    }
    return initial_checkpoint.model(opened, gin.get_configurable(family)(**taken), vocabulary)


def pretrained_vocabulary(checkpoint: str) -> Vocabulary:
    """Returns the vocabulary of the model in a checkpoint.

    Args:
        checkpoint: As for `pretrained_model`.
    """
    return initial_checkpoint.vocabulary(_opened(checkpoint))


@functools.cache
def _opened(checkpoint: str) -> Checkpoint:
    """Returns a checkpoint that is opened once, however many stages and tasks a recipe has."""
    return initial_checkpoint.read(checkpoint, gin.get_bindings("T5Config"))


REGISTERED: dict[str, Callable[..., Any]] = {
    **gin_builders.REGISTERED,
    "pretrained_model": pretrained_model,
    "pretrained_vocabulary": pretrained_vocabulary,
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
        return _with_settings(str(error), self.settings, operative=self.operative)


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
        _opened.cache_clear()


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
    if value.startswith(("@", "%")) or _is_literal(value.strip()):
        return binding
    for opened, closed in ("[]", "()", "{}"):
        if value.count(opened) > value.count(closed):
            raise UserError(f"--gin.{binding} opens a '{opened}' that it never closes.")
    without_references = re.sub(r"[@%][A-Za-z_][\w./]*(\(\))?", "None", value.strip())
    return binding if _is_literal(without_references) else f"{name}={value.strip()!r}"


def _is_literal(value: str) -> bool:
    """Whether gin reads the text as a value; it knows no sets."""
    try:
        return not isinstance(ast.literal_eval(value), set)
    except (ValueError, SyntaxError):
        return False


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
    message: str,
    settings: Mapping[str, Mapping[str, str]],
    scopes: Sequence[str] = (),
    operative: str = "",
) -> UserError:
    """Returns an error with what sets, in the config, the fields that its message names.

    Args:
        message: Names fields as "Stage.steps", and scopes, if any, in quotes.
        settings: As in `Config.settings`.
        scopes: Further scopes that the error is about.
        operative: As in `Config.operative`.
    """
    added: list[str] = []
    for field in re.findall(r"\b[A-Za-z]\w*\.[a-z]\w*", message):
        by_scope = settings.get(field, {})
        named = [
            name for scope, name in by_scope.items() if scope in scopes or f"'{scope}'" in message
        ]
        # A field of a run's record is in some scope, where it has the value of now.
        of_record = rf"\bstages\.\S+ \({re.escape(field)}\) is .*?, now ([^;( ]+)"
        for value in re.findall(of_record, message):
            named += [n for n in by_scope.values() if f"\n{n} = {value}\n" in operative]
        if not named and "" in by_scope:
            named = [by_scope[""]]
        added += [name for name in named or by_scope.values() if name not in message]
    if not added:
        return UserError(message)
    end = "." if message.endswith(".") else ""
    names = ", ".join(dict.fromkeys(added))
    return UserError(f"{message.removesuffix('.')} (in the config: {names}){end}")


# What takes the place of parameters that earlier versions had.
_GONE = {"pad_id": " Padding is told by masks; Model.pad_id is the id that fills arrays."}


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
        advice = _GONE.get(parameter) or nearest(parameter, choices)
        return UserError(f"{owner} has no parameter '{parameter}'{where}.{advice}")
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
    message = message.splitlines()[0]
    if match := re.search(r"unexpected keyword argument '(\w+)'", message):
        message += "." + _GONE.get(match[1], "")
    return UserError(f"The config does not build: {message}{where}")


def _parameters(target: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(target).parameters)
