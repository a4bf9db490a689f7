"""Task modules are found in a wheel's layout, from any folder, and hidden ones are named."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from robust_ft.data import fingerprints

REPOSITORY = Path(__file__).parent.parent
LIGHT = ("__init__.py", "bundled.py", "errors.py", "data/__init__.py", "data/fingerprints.py")
CODE = """
import importlib, sys
from robust_ft.data import fingerprints
from robust_ft.errors import UserError
assert "tasks" not in sys.modules
try:
    print(fingerprints.module_fingerprint(sys.argv[1]))
    print(importlib.import_module(sys.argv[1]).__file__)
except UserError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder like site-packages, with what finds modules and the tasks as a wheel has them."""
    folder = tmp_path_factory.mktemp("site-packages")
    for name in LIGHT:
        (folder / "robust_ft" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / "robust_ft" / name, folder / "robust_ft" / name)
    shutil.copytree(
        REPOSITORY / "tasks",
        folder / "robust_ft" / "_bundled" / "tasks",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return folder


@pytest.fixture
def find(installed, tmp_path):
    def run(module):
        ended = subprocess.run(
            [sys.executable, "-c", CODE, module],
            cwd=tmp_path,
            env={"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            check=True,
        )
        return ended.stdout.splitlines()

    return run


def test_an_empty_folder(find, installed):
    file = installed / "robust_ft" / "_bundled" / "tasks" / "mini_words.py"
    assert find("tasks.mini_words") == [
        fingerprints.module_fingerprint("tasks.mini_words"),
        str(file),
    ]


def test_a_folder_of_that_name_without_python_hides_nothing(find, tmp_path):
    (tmp_path / "tasks").mkdir()
    assert len(find("tasks.mini_words")) == 2


def test_tasks_of_a_users_own(find, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").touch()
    (tmp_path / "tasks" / "own.py").touch()
    assert find("tasks.own")[1] == str(tmp_path / "tasks" / "own.py")
    [sentence] = find("tasks.mini_words")
    assert sentence.startswith(
        f"The task module 'tasks.mini_words' of robust_ft is hidden by '{tmp_path / 'tasks'}'"
    )
    [sentence] = find("tasks.nobodys")
    assert sentence.startswith("There is no task module 'tasks.nobodys'")


def test_a_module_of_that_name(find, tmp_path):
    (tmp_path / "tasks.py").touch()
    [sentence] = find("tasks.mini_words")
    assert f"is hidden by '{tmp_path / 'tasks.py'}'" in sentence
