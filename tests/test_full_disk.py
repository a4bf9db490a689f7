"""A full disk is the last line of what a program prints, with the folder, and loses nothing."""

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from robust_ft import command_line, full_disk
from robust_ft.errors import UserError
from robust_ft.files import write_json

TESTS = Path(__file__).parent
TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing local file "/tmp/run/checkpoint_2/d/x": Failed to write '
    "1999 bytes to file 15: No space left on device [os_error_code='28']"
)


def raising(error, cause=None):
    with full_disk.told("/runs/a"):
        raise error from cause


@pytest.mark.parametrize(
    ("error", "cause", "folder", "reason"),
    [
        (OSError(28, "No space", "/cache/task/x.part"), None, "/cache/task", "No space left"),
        (OSError(28, "No space", "/runs/a/model/x.jsonl"), None, "/runs/a", "No space left"),
        (OSError(28, "No space"), None, "/runs/a", "No space left"),
        (OSError(122, "Disk quota exceeded"), None, "/runs/a", "Disk quota exceeded"),
        (OSError(27, "File too large"), None, "/runs/a", "File too large"),
        (ValueError(TENSORSTORE), None, "/runs/a", "No space left"),
        (RuntimeError("a thread ended"), ValueError(TENSORSTORE), "/runs/a", "No space left"),
    ],
)
def test_who_says_it_does_not_matter(error, cause, folder, reason):
    sentence = rf"^The disk is full: '{folder}' cannot be written \({reason}"
    with pytest.raises(full_disk.FullDisk, match=sentence):
        raising(error, cause)


@pytest.mark.parametrize(
    "error", [OSError(13, "Permission denied"), ValueError("RESOURCE_EXHAUSTED: out of memory")]
)
def test_other_errors_stay(error):
    with pytest.raises(type(error)) as caught:
        raising(error)
    assert caught.value is error
    mistake = UserError("A mistake.")
    with pytest.raises(UserError) as caught:
        raising(mistake, OSError(28, "No space"))
    assert caught.value is mistake


def test_a_file_that_grows_too_large_leaves_the_earlier_one(tmp_path):
    write_json(tmp_path / "a.json", "before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(full_disk.FullDisk), full_disk.told(tmp_path):
            write_json(tmp_path / "a.json", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == '"before"\n'


def test_the_program_ends_with_the_sentence():
    code = (
        "import threading, time; from robust_ft import command_line\n"
        "def main():\n"
        "    threading.Thread(target=lambda: (time.sleep(1), 1 / 0)).start()\n"
        "    open('/dev/full', 'w').write('x' * 100000)\n"
        "command_line.run(main)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == command_line.USER_ERROR
    [line] = ended.stderr.splitlines()
    assert line.startswith("Error: The disk is full: ")


@contextlib.contextmanager
def disk(folder, kilobytes):
    """Mounts a disk of that size, where that is allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(tmp_path):
    folder = tmp_path / "disk"
    command = [sys.executable, "-m", "robust_ft.train", f"--gin_file={TESTS / 'toy_promot.gin'}"]
    command += [f"--gin.MODEL_DIR={folder / 'run'}"]
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    with disk(folder, 200):  # full at the first checkpoint
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert ended.returncode == command_line.USER_ERROR, ended.stderr
        last = ended.stderr.splitlines()[-1]
        assert last.startswith(f"Error: The disk is full: '{folder / 'run'}' cannot be written")
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert ended.returncode == 0, ended.stderr
