"""Reads run folders into plain data."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from robust_ft.analysis_results import with_analyses
from robust_ft.ensembles.mixture_weight import SelectedWeight
from robust_ft.errors import UserError, nearest
from robust_ft.files import as_path, read_json, read_json_object
from robust_ft.metric_writer import EVALUATIONS, read_metrics
from robust_ft.summary import FEW_SHOT, Row, read_rows
from robust_ft.sweep_file import Sweep

if TYPE_CHECKING:
    from robust_ft.run_record import RunRecord

_SAMPLES = re.compile(r"(?P<task>.+)-(?P<step>\d{6,})\.jsonl")


@dataclasses.dataclass(frozen=True)
class SampleFile:
    """The predictions of one evaluation; `name` is the file's name without the step."""

    stage: str
    step: int
    name: str
    path: pathlib.Path

    def read(self) -> list[dict[str, Any]]:
        """Returns dicts with `input`, `target` and `prediction`."""
        return read_metrics(self.path)


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        directory: The folder of the run.
        name: Name of the method; runs of one name differ by their seed (`report.groups`).
        seed: The seed.
        target: The finetuned task, "" if the run has none.
        stages: Names of the stages, in the order they ran.
        rows: The rows of `summary.json`, without those of few-shot tuning (`report.promptability`),
            and those of analyses of the finished run.
        config: The text of `config.gin`, or "".
        train: The training metrics of each stage, from `metrics.jsonl`.
        samples: Files with predictions; read when needed.
        selected: The selected step of each finished stage, from `outcome.json`.
        selections: The finished selections of lambda, by name.
        weight: The selected lambda, if the run is one selection (`report.members`).
        grid: The final rows for each lambda, if the run is one selection.
        overlaps: What evaluated tasks have in common with the training data, a sentence each.
        record: What the run was made with; None if its version did not record it.
        sweep: The sweep that chose its settings, if one did.
    """

    directory: pathlib.Path
    name: str
    seed: int
    target: str
    stages: tuple[str, ...]
    rows: tuple[Row, ...]
    config: str = ""
    train: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    samples: tuple[SampleFile, ...] = ()
    selected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    selections: Mapping[str, SelectedWeight] = dataclasses.field(default_factory=dict)
    weight: float | None = None
    grid: Mapping[float, Sequence[Row]] = dataclasses.field(default_factory=dict)
    overlaps: tuple[str, ...] = ()
    record: "RunRecord | None" = None
    sweep: Sweep | None = None


def load_runs(directories: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Reads runs, in the order given.

    A folder with runs of several seeds stands for all of them, that of a sweep for those with the
    chosen value.

    Raises:
        UserError: A folder is not a finished run, or a sweep that has not chosen yet.
    """
    return [
        dataclasses.replace(load_run(each), sweep=Sweep.read(folder))
        for folder in map(as_path, directories)
        for each in run_folders([folder])
    ]


def run_folders(directories: Iterable[str | os.PathLike[str]]) -> list[pathlib.Path]:
    """Returns the folders of runs that folders stand for, in the order given; see `load_runs`."""
    found: list[pathlib.Path] = []
    for folder in map(as_path, directories):
        sweep = Sweep.read(folder)
        inner = folder if sweep is None else folder / _chosen(sweep, folder)
        found += _seeds(inner) or [inner]
    return found


def _chosen(sweep: Sweep, folder: pathlib.Path) -> str:
    """Returns the folder of a sweep's choice, below its own."""
    if (chosen := sweep.chosen) is not None:
        return chosen.folder
    if sweep.left:
        why = f"{sweep.left} of its runs have no validation score yet; the same command goes on"
    else:
        why = "a run diverged with every value that was tried; give it others"
    raise UserError(f"The sweep in {folder} has chosen nothing: {why}.")


def _seeds(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of the runs that `robust_ft.run_seeds` wrote into a folder."""
    if (folder / "run.json").exists():
        return []
    found = {
        int(match[1]): path.parent
        for path in folder.glob("seed_*/run.json")
        if (match := re.fullmatch(r"seed_(\d+)", path.parent.name))
    }
    return [found[seed] for seed in sorted(found)]


def load_run(directory: str | os.PathLike[str]) -> Run:
    """Reads `run.json`, `summary.json`, `config.gin` and the files of stages and analyses of a run.

    Raises:
        UserError: The folder is not a finished run, or a file in it is malformed.
    """
    folder = as_path(directory)
    _check_folder(folder)
    about = read_json_object(folder / "run.json")
    is_few_shot = (folder / FEW_SHOT).is_dir()
    for key in ("name", "target", "stages"):
        if key not in about:
            raise UserError(f"{folder / 'run.json'} has no '{key}'.{nearest(key, about)}")
        if not about[key] and not (is_few_shot and key != "name"):
            raise UserError(f"{folder} has nothing to report: '{key}' in its run.json is empty.")
    stages = tuple(s["name"] if isinstance(s, dict) else str(s) for s in about["stages"])
    selections = about.get("selections") or about.get("choices") or ()  # runs before version 0.2
    weights = {name: SelectedWeight.read(folder / name) for name in selections}
    config = folder / "config.gin"
    return Run(
        directory=folder,
        name=str(about["name"]),
        seed=int(about.get("seed", 0)),
        target=str(about["target"] or ""),
        stages=stages,
        rows=tuple(
            with_analyses(folder, _rows(folder / "summary.json", (*stages, *weights), is_few_shot))
        ),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        train={stage: _train_lines(folder / stage) for stage in stages},
        samples=tuple(s for stage in stages for s in sample_files(folder, stage)),
        selected={
            stage: int(read_json(outcome)["step"])
            for stage in stages
            if (outcome := folder / stage / "outcome.json").exists()
        },
        selections={
            name: selection for name, selection in weights.items() if selection is not None
        },
        overlaps=tuple(
            dict.fromkeys(
                sentence
                for stage in stages
                for name in ("overlap.json", "overlap_replay.json")
                for sentence in _overlaps(folder / stage / name)
            )
        ),
        record=_record(folder, about),
    )


def _overlaps(file: pathlib.Path) -> list[str]:
    fields = read_json(file, default=None)
    if not fields or not any(each["same_input"] for each in fields["overlaps"]):
        return []
    from robust_ft.data import overlap  # numpy

    return [f"{sentence}." for sentence in overlap.sentences(overlap.Counted.from_json(fields))]


def _record(folder: pathlib.Path, about: Mapping[str, Any]) -> "RunRecord | None":
    if "settings" not in about:
        return None
    from robust_ft.run_record import RunRecord  # jax, which nothing else here needs

    return RunRecord.read(folder)


def _check_folder(folder: pathlib.Path) -> None:
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"There is no folder {folder}.{nearest(folder.name, siblings)}")
    if not (folder / "run.json").exists():
        inside = sorted(path.parent.name for path in folder.glob("*/run.json"))
        hint = f" Did you mean '{folder / inside[0]}'?" if inside else ""
        raise UserError(f"{folder} is not a run: it holds no run.json.{hint}")
    if not (folder / "summary.json").exists():
        raise UserError(f"{folder} has no summary.json: its run has not been evaluated yet.")


def _rows(path: pathlib.Path, stages: Sequence[str], is_few_shot: bool) -> tuple[Row, ...]:
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} does not hold a list of results.")
    if is_few_shot:
        rows = [row for row in rows if row.stage != FEW_SHOT]
    for number, row in enumerate(rows, start=1):
        if row.stage not in stages:
            raise UserError(
                f"Result {number} in {path} is of stage '{row.stage}', which run.json does not "
                f"name.{nearest(row.stage, stages)}"
            )
    return tuple(rows)


def _train_lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    if not path.exists():  # a run that restored this stage from elsewhere
        return []
    return [line for line in read_metrics(path) if line.get("split") == "train"]


def sample_files(folder: pathlib.Path, stage: str) -> list[SampleFile]:
    """Returns the files with predictions in a stage's folder."""
    files = []
    for path in sorted((folder / stage / EVALUATIONS).glob("*.jsonl")):
        if match := _SAMPLES.fullmatch(path.name):
            files.append(SampleFile(stage, int(match["step"]), match["task"], path))
    return files
