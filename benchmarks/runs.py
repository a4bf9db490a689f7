"""Runs of recipes, each in a process and a folder of its own: what the comparisons rest on.

An arm is a recipe with what is added to it; a replicate is a pretrained checkpoint and a seed. The
folders of one output are shared by all that ask for the same run.
"""

import dataclasses
import functools
import hashlib
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from robust_ft.errors import UserError
from robust_ft.files import read_json, write_json
from robust_ft.sweep_file import Sweep

ROOT = Path(__file__).parent.parent
SHIPPED = "asset:mini"  # the pretrained checkpoint that recipes take by themselves
SEEDS_EACH = 100  # a checkpoint's seeds begin at a multiple of it, so that no two runs share one
# In sweeps: the arm that chooses the rate of a stage that this one has, too, before it chooses its
# own; and what chooses where that is not what the recipe ends with.
CHOSEN_BEFORE = {"promot_rte": "prompt_rte", "table2_webnlg": "adapters_webnlg"}
CHOSEN_BY = {"table2_webnlg": "full"}
SOURCES = ("robust_ft/**/*", "tasks/**/*.py", "gin_configs/**/*.gin")  # what a run depends on


@dataclasses.dataclass(frozen=True)
class Arm:
    """A recipe, gin files behind it, and settings.

    Attributes:
        files: Names of gin files: a recipe, and what methods/, data/ or analyses/ add to it, such
            as "p3_mtl_t+deep_prompt". Runs are called after them.
        settings: Gin macros and bindings, in order.
    """

    files: str
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The files and the settings."""
        return ",".join([self.files, *(f"{name}={value}" for name, value in self.settings)])

    @property
    def folder(self) -> str:
        """The name without what shells and file systems trip over."""
        return re.sub(r"[^\w.+,=-]+", "-", self.name).rstrip("-")

    @property
    def gin_files(self) -> list[str]:
        """Returns the flags for the files.

        Raises:
            UserError: There is no such file.
        """
        recipe, *added = self.files.split("+")
        found = [Path(f"gin_configs/{recipe}.gin")]
        for name in added:
            folders = (f"gin_configs/{folder}" for folder in ("methods", "data", "analyses"))
            paths = [Path(f"{folder}/{name}.gin") for folder in folders]
            found.append(next((path for path in paths if (ROOT / path).exists()), paths[0]))
        for path in found:
            if not (ROOT / path).exists():
                raise UserError(
                    f"There is no gin file {path}, which the runs of {self.files} need."
                )
        return [f"--gin_file={path}" for path in found]


def arm(files: str, **settings: Any) -> Arm:
    """Returns an arm."""
    return Arm(files, tuple(settings.items()))


@dataclasses.dataclass(frozen=True, order=True)
class Replicate:
    """What the runs of an arm differ in: the seed and the pretrained checkpoint."""

    seed: int = 0
    checkpoint: str = SHIPPED

    @property
    def name(self) -> str:
        """It as the end of a folder's name."""
        shipped = self.checkpoint == SHIPPED
        return f"seed{self.seed}" if shipped else f"{Path(self.checkpoint).name}_seed{self.seed}"


def replicates(seeds: int, checkpoints: Sequence[str] = (SHIPPED,)) -> list[Replicate]:
    """Returns every checkpoint with its seeds, all checkpoints with their first seed first.

    Seeds are 0, 1, ... for the first checkpoint, 100, 101, ... for the second.

    Raises:
        UserError: There are no seeds or checkpoints, too many seeds, one that is missing, or two
            of the same name.
    """
    if not 1 <= seeds <= SEEDS_EACH:
        raise UserError(f"--seeds={seeds} must be from 1 to {SEEDS_EACH}.")
    for checkpoint in checkpoints:
        if checkpoint != SHIPPED and not Path(checkpoint).exists():
            raise UserError(f"There is no checkpoint {checkpoint}.")
    if len({Path(checkpoint).name for checkpoint in checkpoints}) < len(checkpoints):
        raise UserError("Two checkpoints have the same name, but runs are called after it.")
    return [
        Replicate(SEEDS_EACH * number + seed, checkpoint)
        for seed in range(seeds)
        for number, checkpoint in enumerate(checkpoints)
    ]


@functools.cache
def version() -> str:
    """Returns a hash of all that a run depends on in this repository."""
    paths = sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)})
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Runner:
    """Makes runs, in folders below `output`.

    Beside a run's folder are its log and `<run>.json`: how long it took, whether it has finished,
    and the versions of the code that made it and that checked it last.

    Attributes:
        output: Where the folders of runs are.
        settings: Gin settings beside those of an arm, such as "TRAIN_STEPS=10": those of all arms
            under "", others under the arm's files.
    """

    output: Path
    settings: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def folder(self, arm: Arm, replicate: Replicate) -> Path:
        """Returns MODEL_DIR of a run."""
        return self.output / f"{arm.folder}_{replicate.name}"

    def about(self, arm: Arm, replicate: Replicate) -> Mapping[str, Any]:
        """Returns what `<run>.json` says, nothing if there is none."""
        found: Mapping[str, Any] = read_json(self._file(arm, replicate, ".json"), default={})
        return found

    def is_finished(self, arm: Arm, replicate: Replicate) -> bool:
        """Whether a run has finished, with this code or another."""
        return bool(self.about(arm, replicate).get("finished"))

    def command(self, arm: Arm, replicate: Replicate) -> list[str]:
        """Returns the command of a run."""
        settings = [f"{name}={_gin(value)}" for name, value in (*arm.settings, *self.chosen(arm))]
        if replicate.checkpoint != SHIPPED:
            settings.append(f"INITIAL_CHECKPOINT_PATH={replicate.checkpoint!r}")
        settings += [
            f"MODEL_DIR={str(self.folder(arm, replicate))!r}",
            f"RANDOM_SEED={replicate.seed}",
        ]
        for place in ("", arm.files):
            settings += self.settings.get(place, ())
        flags = [f"--gin.{setting}" for setting in settings]
        return [sys.executable, "-m", "robust_ft.train", *arm.gin_files, *flags]

    def chosen(self, arm: Arm) -> tuple[tuple[str, Any], ...]:
        """Returns the settings that were chosen for an arm on ID validation.

        All of an arm's runs have them. Without a sweep of the arm there are none: it has the rates
        of its recipe.
        """
        found = Sweep.read(self.sweep_folder(arm))
        own = found.chosen if found is not None else None
        return (*self._chosen_before(arm), *(own.values.items() if own is not None else ()))

    def _chosen_before(self, arm: Arm) -> tuple[tuple[str, Any], ...]:
        before = CHOSEN_BEFORE.get(arm.files)
        return self.chosen(Arm(before)) if before is not None else ()

    def sweep_folder(self, arm: Arm) -> Path:
        """Returns MODEL_DIR of an arm's sweep."""
        return self.output / f"{arm.folder}_sweep"

    def sweep(self, arm: Arm, seeds: int) -> bool:
        """Chooses an arm's learning rates, or goes on with it; returns whether it has."""
        folder = self.sweep_folder(arm)
        settings = [f"{name}={_gin(v)}" for name, v in (*arm.settings, *self._chosen_before(arm))]
        for place in ("", arm.files):
            settings += self.settings.get(place, ())
        settings.append(f"MODEL_DIR={str(folder)!r}")
        command = [sys.executable, "-m", "robust_ft.sweep", *arm.gin_files, f"--seeds={seeds}"]
        command += [f"--by={CHOSEN_BY[arm.files]}"] if arm.files in CHOSEN_BY else []
        command += [f"--gin.{setting}" for setting in settings]
        self.output.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(folder.name + ".log")
        with open(log, "a", encoding="utf-8") as file:
            ended = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
            )
        chosen = ", ".join(f"{name} {value}" for name, value in self.chosen(arm))
        print(
            f"{arm.name}: {chosen if ended.returncode == 0 else f'failed, see {log}'}", flush=True
        )
        return ended.returncode == 0

    def sweep_all(self, arms: Sequence[Arm], seeds: int, jobs: int) -> None:
        """Chooses the learning rates of arms, `jobs` at a time.

        Raises:
            UserError: A sweep failed.
        """
        before = [Arm(files) for each in arms if (files := CHOSEN_BEFORE.get(each.files))]
        before = list(dict.fromkeys(before))
        done = [self.sweep(arm, seeds) for arm in before]
        with ThreadPoolExecutor(jobs) as pool:
            rest = [arm for arm in arms if arm not in before]
            done += pool.map(lambda arm: self.sweep(arm, seeds), rest)
        if not all(done):
            raise UserError(
                f"{done.count(False)} of {len(done)} sweeps failed; the same command goes on."
            )

    def run(self, arm: Arm, replicate: Replicate) -> bool:
        """Makes a run, or goes on with it; returns whether it has finished.

        One that finished with the code as it is now is skipped at once. One that finished with
        other code is given to `robust_ft.train`, which refuses other settings and data.
        """
        about = self.about(arm, replicate)
        command = self.command(arm, replicate)
        key = hashlib.sha256(" ".join([version(), *command]).encode()).hexdigest()[:12]
        if about.get("finished") and about["checked"] == key:
            return True
        self.output.mkdir(parents=True, exist_ok=True)
        start, log = time.monotonic(), self._file(arm, replicate, ".log")
        with open(log, "a", encoding="utf-8") as file:
            ended = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
            )
        seconds = time.monotonic() - start
        finished = ended.returncode == 0
        made = about["made"] if about.get("finished") else version()
        total = about.get("seconds", 0.0) + (0.0 if about.get("finished") else seconds)
        found = {
            "arm": arm.name,
            "finished": finished,
            "seconds": round(total, 1),
            "made": made,
            "checked": key,
        }
        write_json(self._file(arm, replicate, ".json"), found)
        how = f"{seconds:.0f} s" if finished else f"failed, see {log}"
        print(f"{arm.name} {replicate.name}: {how}", flush=True)
        return finished

    def run_all(
        self, todo: Sequence[tuple[Arm, Replicate]], jobs: int
    ) -> Iterator[tuple[Arm, Replicate, bool]]:
        """Makes runs, `jobs` at a time; yields each in the order given, with whether it finished.

        The first one fills the caches of data and compiled programs for the others.
        """
        if not todo:
            return
        yield *todo[0], self.run(*todo[0])
        pool = ThreadPoolExecutor(jobs)
        try:
            futures = [pool.submit(self.run, *each) for each in todo[1:]]
            for each, future in zip(todo[1:], futures, strict=True):
                yield *each, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def minutes(self, todo: Iterable[tuple[Arm, Replicate]]) -> list[float | None]:
        """Returns how long runs will take, as others of their arms did; None where none has run."""
        finished = [
            about for path in self.output.glob("*.json") if (about := read_json(path))["finished"]
        ]
        means: dict[str, float] = {}
        for name in {about["arm"] for about in finished}:
            means[name] = statistics.fmean(a["seconds"] / 60 for a in finished if a["arm"] == name)
        return [0.0 if self.is_finished(*each) else means.get(each[0].name) for each in todo]

    def _file(self, arm: Arm, replicate: Replicate, suffix: str) -> Path:
        folder = self.folder(arm, replicate)
        return folder.with_name(folder.name + suffix)


def _gin(value: Any) -> str:
    """Returns a value as gin reads it; "%NAME" is a macro."""
    return value if isinstance(value, str) and value.startswith("%") else repr(value)


def default_jobs() -> int:
    """Returns how many runs go at a time: one uses about two cores in its heavier parts."""
    return max(1, (os.cpu_count() or 1) // 2)
