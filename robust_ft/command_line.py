"""What the command lines share: flags, start-up and how errors end a program.

Heavy packages are imported after the flags are parsed, so that `--help` is instant.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from robust_ft.data.cache import TaskData
    from robust_ft.gin_config import Config

USER_ERROR = 2
# EX_TEMPFAIL: the run was asked to stop and has saved; the same command resumes it.
RESUME = 75

# The module of all tasks of this project.
_ALL_TASKS = "tasks.all_tasks"
_BINDING = re.compile(r"--gin\.([^=]+)=(.*)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, as all errors of the command lines are."""

    def error(self, message: str) -> NoReturn:
        """Raises a UserError instead of printing the usage."""
        from robust_ft.errors import UserError, nearest

        wrong = message.removeprefix("unrecognized arguments: ")
        if wrong == message:
            raise UserError(f"{message[0].upper()}{message[1:]}; see --help.")
        name = wrong.split()[0].split("=")[0]
        if name.startswith("--gin."):
            raise UserError(f"{name} lacks a value; write {name}=VALUE.")
        raise UserError(f"There is no flag '{name}'." + nearest(name, self._option_string_actions))


class Arguments(argparse.Namespace):
    """Parsed flags; `gin_bindings` holds the `--gin.NAME=VALUE` ones in order."""

    gin_file: list[str]
    gin_bindings: list[str]
    gin_search_paths: str
    dry_run: bool
    allow_change: list[str]
    seeds: int | None
    grid: list[str]
    by: str | None
    task: str | None
    split: str | None
    module: str | None
    vocabulary: str | None
    inputs_length: int
    targets_length: int
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    process_timeout: float
    xla_flags: str | None


def parse(program: str, description: str, argv: Sequence[str]) -> Arguments:
    """Parses the flags of `python -m robust_ft.<program>`."""
    parser = gin_parser(program, description)
    parser.epilog = (
        "Exit status: 0 done, 2 a mistake in flags or configs, 75 stopped by SIGTERM or Ctrl-C "
        "after saving (the same command resumes), 76 another process of the run is gone (restart "
        "all), 130 interrupted by Ctrl-C before or after training, or by a second one."
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the resolved recipe, all parameters and the shapes, without training",
    )
    parser.add_argument(
        "--xla_flags",
        metavar="gpu|tpu",
        help="compiler flags that suit several GPUs or TPUs; those already in XLA_FLAGS and "
        "LIBTPU_INIT_ARGS win",
    )
    if program == "train":
        parser.add_argument(
            "--allow_change",
            type=lambda names: [name for name in names.split(",") if name],
            default=[],
            metavar="FIELD,FIELD",
            help="fields in which an unfinished run may differ from what is recorded in MODEL_DIR, "
            "from its newest checkpoint on; the error that refuses a difference names them",
        )
        parser.add_argument(
            "--seeds",
            type=int,
            metavar="N",
            help="run N seeds, from RANDOM_SEED on, one after the other, each in a folder "
            "seed_<seed> of MODEL_DIR, and report on them together",
        )
    if program == "sweep":
        _add_sweep(parser)
    add_processes(parser)
    return parse_gin(parser, argv)


def gin_parser(program: str, description: str) -> Parser:
    """Returns a parser of the flags that name a config."""
    parser = Parser(
        f"python -m robust_ft.{program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin config, such as gin_configs/promot_rte.gin; give several, later ones win",
    )
    parser.add_argument(
        "--gin.NAME",
        dest="_",
        metavar="VALUE",
        help="set a macro (--gin.TRAIN_STEPS=10, --gin.MODEL_DIR=/tmp/run) or a parameter "
        "(--gin.prompt/Stage.eval_period=50); wins over files",
    )
    parser.add_argument(
        "--gin_search_paths",
        default="",
        metavar="DIR,DIR",
        help="folders in which gin files are looked for, besides here and the project's root",
    )
    return parser


def parse_gin(parser: Parser, argv: Sequence[str]) -> Arguments:
    """Parses the flags of `gin_parser` and those that were added to it."""
    bindings = [match for arg in argv if (match := _BINDING.fullmatch(arg))]
    rest = [arg for arg in argv if not _BINDING.fullmatch(arg)]
    arguments = parser.parse_args(rest, namespace=Arguments())
    arguments.gin_bindings = [f"{match[1]}={match[2]}" for match in bindings]
    return arguments


def _add_sweep(parser: Parser) -> None:
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=VALUE,VALUE",
        help="a macro or parameter, as in --gin.NAME=VALUE, and the values to try; of several "
        "flags every combination (by default 0.3, 1 and 3 times the learning rate)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="run every value with N seeds, from RANDOM_SEED on; the mean of their scores chooses",
    )
    parser.add_argument(
        "--by",
        metavar="NAME",
        help="the stage or selection whose validation score chooses (what the recipe ends with); "
        "what comes after it runs with the chosen value only",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that start one of several processes."""
    group = parser.add_argument_group(
        "several processes",
        "detected on Cloud TPU, in Slurm, on GKE and under Open MPI; elsewhere each process needs "
        "these flags",
    )
    group.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="of process 0, with a free port"
    )
    group.add_argument(
        "--num_processes", type=int, metavar="N", help="number of processes; 1: no detection"
    )
    group.add_argument("--process_id", type=int, metavar="I", help="this process's index, from 0")
    group.add_argument(
        "--process_timeout",
        type=float,
        default=100,
        metavar="SECONDS",
        help="a process without a heartbeat for this long is lost, and all end (100)",
    )


@contextlib.contextmanager
def started(arguments: Arguments, stops: bool = False) -> Iterator["Config"]:
    """Joins the run's other processes, if there are any, and yields the config.

    Args:
        arguments: The flags.
        stops: Whether the program saves and ends at SIGTERM.

    Raises:
        UserError: A mistake in the config, or one that shows in the body; it names the macros.
    """
    with joined(arguments, stops), configured(arguments) as config:
        yield config


@contextlib.contextmanager
def joined(arguments: Arguments, stops: bool = False) -> Iterator[None]:
    """Joins the program's other processes, if there are any; the arguments are those of `started`.

    Raises:
        UserError: The processes do not find each other.
    """
    from robust_ft import xla_flags

    if arguments.xla_flags is not None:
        xla_flags.use(arguments.xla_flags)  # before anything imports jax
    from robust_ft import compiling, console, multihost

    processes = multihost.Processes(
        arguments.coordinator_address,
        1 if arguments.dry_run else arguments.num_processes,
        arguments.process_id,
        arguments.process_timeout,
    )
    with multihost.joined(processes, stops):
        compiling.use_cache()
        console.configure(enabled=multihost.is_first())
        yield


@contextlib.contextmanager
def configured(arguments: Arguments) -> Iterator["Config"]:
    """Yields the config that the flags name, the same on all processes.

    Raises:
        UserError: As in `started`.
    """
    from robust_ft import compiling, full_disk, multihost

    config = load_config(arguments)
    multihost.check_same("config", config.operative)
    compiling.use_effort(config.recipe.compile_effort)
    with macros_named(config), full_disk.told(config.recipe.model_dir):
        yield config


@contextlib.contextmanager
def macros_named(config: "Config") -> Iterator[None]:
    """Adds, to the fields that an error names, the macros that set them in the config."""
    from robust_ft.errors import UserError

    try:
        yield
    except UserError as error:
        raise config.explain(error) from error


def write_config(config: "Config") -> None:
    """Writes `config.gin` into the MODEL_DIR of a run, from the first process."""
    from robust_ft import multihost
    from robust_ft.files import as_path, write_atomically

    if multihost.is_first():
        write_atomically(as_path(config.recipe.model_dir) / "config.gin", config.operative)


def load_config(arguments: Arguments) -> "Config":
    """Builds the recipe that the flags name."""
    from robust_ft import gin_config

    search_paths = [path for path in arguments.gin_search_paths.split(",") if path]
    return gin_config.load(arguments.gin_file, arguments.gin_bindings, search_paths)


def data_parser(program: str, description: str) -> Parser:
    """Returns a parser of the flags that name data; see `task_data`."""
    parser = gin_parser(program, description)
    parser.add_argument("--task", help="a task or mixture, such as webnlg_ood or rte_4shot")
    parser.add_argument("--split", help="one of its splits; the recipe's, else train")
    parser.add_argument("--module", help="the module that registers it; the recipe's, else ours")
    parser.add_argument(
        "--vocabulary",
        metavar="DIR",
        help="a Hugging Face model's folder; the recipe's, else bytes",
    )
    parser.add_argument("--inputs_length", type=int, default=512, help="without a recipe (512)")
    parser.add_argument("--targets_length", type=int, default=128, help="without a recipe (128)")
    return parser


def task_data(arguments: Arguments) -> "list[TaskData]":
    """Returns the data that the flags name: of a recipe, or `--task` by itself.

    With a recipe (`--gin_file`), that is what its stages are trained and evaluated on, in order;
    with `--task` too, the data of that name, or else the last stage's data under that name.

    Raises:
        UserError: There is neither a task nor a recipe.
    """
    from robust_ft.data.cache import TaskData
    from robust_ft.errors import UserError
    from robust_ft.evaluate import of_tasks
    from robust_ft.vocabulary import ByteVocabulary, vocabulary_from_directory

    changes: dict[str, Any] = {name: getattr(arguments, name) for name in ("split", "module")}
    if arguments.vocabulary:
        changes["vocabulary"] = vocabulary_from_directory(arguments.vocabulary)
    changes = {name: value for name, value in changes.items() if value is not None}
    if not arguments.gin_file:
        if not arguments.task:
            raise UserError(
                "Say which task with --task=NAME, or which recipe with --gin_file=FILE."
            )
        settings: dict[str, Any] = {
            "vocabulary": ByteVocabulary(),
            "module": _ALL_TASKS,
            "inputs_length": arguments.inputs_length,
            "targets_length": arguments.targets_length,
        }
        return [TaskData(task=arguments.task, **{**settings, **changes})]
    recipe = load_config(arguments).recipe
    datasets: dict[TaskData, None] = {}
    for stage in recipe.stages:
        evaluations = of_tasks((*stage.evaluations, *stage.final_evaluations))
        replayed = [] if stage.replay is None else [stage.replay.data]
        evaluated = [each.task_data for each in evaluations]
        datasets |= dict.fromkeys([stage.data, *replayed, *evaluated])
    if (few_shot := recipe.few_shot) is not None:
        for each in few_shot.evaluations:
            datasets |= dict.fromkeys([few_shot.training_data(each), each.data])
    if arguments.task:
        named = [data for data in datasets if data.task == arguments.task]
        if not named:
            last = recipe.last.data
            module = _ALL_TASKS if (last.module or "").startswith("tasks.") else last.module
            named = [dataclasses.replace(last, task=arguments.task, module=module)]
        datasets = dict.fromkeys(named)
    return list(dict.fromkeys(dataclasses.replace(data, **changes) for data in datasets))


def run(main: Callable[..., Any], *args: Any) -> None:
    """Calls a program's `main` and exits; a UserError and Ctrl-C are printed as one sentence."""
    from robust_ft import full_disk
    from robust_ft.errors import INTERRUPTED, INTERRUPTION, UserError

    try:
        with full_disk.told():
            status = main(*args) or 0
        sys.exit(status)
    except full_disk.FullDisk as error:
        # What writes behind would say it too, at length and later.
        _end(USER_ERROR, f"Error: {error}")
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        _end(INTERRUPTED, INTERRUPTION)


def _end(status: int, sentence: str) -> NoReturn:
    """Ends the process at once with a last line; threads that still write are not waited for."""
    sys.stdout.flush()
    print(sentence, file=sys.stderr, flush=True)
    os._exit(status)
