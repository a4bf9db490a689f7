"""A machine that has a cache of tokenized examples needs neither tensorflow nor seqio nor torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import toy

from robust_ft.data import cache

FORBIDDEN = ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "torch", "t5")
# As if they were not installed: no finder finds them.
FORBID = f"""
import sys

class Hiding:
    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {FORBIDDEN!r}:
            return self._finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def start(code, *arguments):
    command = [sys.executable, "-c", FORBID + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def ready_cache():
    pytest.importorskip("seqio")
    stage = toy.stage()
    cache.ensure(stage.data)
    for evaluation in (*stage.evaluations, *stage.final_evaluations):
        cache.ensure(evaluation.task_data)


@pytest.mark.parametrize("name", ["seqio", "tensorflow"])
def test_the_hook_forbids(name):
    ended = start(f"import jax\nimport {name}")
    assert ended.returncode == 1 and f"No module named '{name}'" in ended.stderr


def test_every_module_but_the_cache_builder_imports():
    code = """
import importlib, pkgutil, robust_ft
for module in pkgutil.walk_packages(robust_ft.__path__, "robust_ft."):
    if "__main__" not in module.name:
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            print(module.name)
"""
    ended = start(code)
    assert ended.returncode == 0, ended.stderr
    builders = ["build", "derived", "own_files", "preview"]
    builders += ["seqio_tasks", "task_functions", "task_rows", "tokenization"]
    assert ended.stdout.split() == [f"robust_ft.data.{name}" for name in builders]


def test_a_run_from_a_ready_cache(ready_cache, tmp_path):
    code = """
from robust_ft import command_line, train
command_line.run(train.main, sys.argv[1:])
"""
    flags = [
        f"--gin_file={Path(__file__).parent / 'toy_promot.gin'}",
        f"--gin.MODEL_DIR={tmp_path}",
        "--gin.PROMPT_TRAIN_STEPS=2",
        "--gin.TRAIN_STEPS=2",
    ]
    ended = start(code, *flags)
    assert ended.returncode == 0, ended.stderr
    assert "report.html" in ended.stdout
    for name in ("report.html", "report.png", "summary.json", "config.gin"):
        assert (tmp_path / name).stat().st_size
    for stage in ("prompt", "model"):
        assert list((tmp_path / stage / "train").glob("events.*"))
        assert (tmp_path / stage / "outcome.json").exists()


def test_without_a_cache_it_says_what_is_missing(tmp_path):
    code = """
from robust_ft import command_line, train
command_line.run(train.main, sys.argv[1:])
"""
    flags = [
        f"--gin_file={Path(__file__).parent / 'toy_promot.gin'}",
        f"--gin.MODEL_DIR={tmp_path / 'run'}",
        f"--gin.CACHE_DIR={tmp_path / 'cache'}",
    ]
    ended = start(code, *flags)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1 and "seqio" in ended.stderr and "toy" in ended.stderr
