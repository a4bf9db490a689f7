"""What the documents name exists: links, files, gin files, commands and Python imports."""

import ast
import fnmatch
import pkgutil
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from robust_ft import gin_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
# The log tells of the code as it was on a day.
CURRENT = [path for path in DOCUMENTS if path.name != "log.md"]
ROOMS = ("robust_ft", "tasks", "gin_configs", "launch", "benchmarks", "examples", "docs", "tests")
SUFFIXES = {"gin", "html", "json", "jsonl", "md", "npy", "png", "py", "safetensors"}
# Files that readers write, or that runs and checkpoints hold.
NOT_OURS = {"config.gin", "more.gin", "my_qa.gin", "my_tasks.py"}
# Of every file in the rooms.
NAMES = {path.name for room in ROOMS for path in (ROOT / room).rglob("*")}
SOURCES = list(ROOT.glob("robust_ft/**/*.py"))


def named(document, pattern):
    """Returns the distinct first groups of a pattern's matches, in order."""
    return list(dict.fromkeys(re.findall(pattern, document.read_text(encoding="utf-8"))))


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def document(request):
    return request.param


@pytest.fixture(params=CURRENT, ids=lambda path: str(path.relative_to(ROOT)))
def current(request):
    return request.param


def test_links(document):
    for link in named(document, r"\]\(([^)\s#]+)[^)]*\)"):
        assert "://" in link or (document.parent / link).exists(), link


def test_paths(current):
    for path in named(current, rf"(?<![\w./<-])((?:{'|'.join(ROOMS)})/[\w./*<>-]*[\w/*>])"):
        pattern = re.sub(r"<\w+>", "*", path)  # `<family>` stands for any
        assert any(ROOT.glob(pattern)), path


def test_file_names(current):
    for name in named(current, r"(?<![\w./*<>-])([\w<>*]+\.(?:gin|py|sh))\b"):
        pattern = re.sub(r"<\w+>", "*", name)
        assert name in NOT_OURS or fnmatch.filter(NAMES, pattern), name


def test_commands(current):
    for module in named(current, r"python -m\s+(robust_ft\.[\w.]*\w)"):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_dotted_names(current):
    for name in named(current, r"`(robust_ft(?:\.\w+)+)(?<!\.json)[`(]"):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_names_in_modules(document):
    for module, name in named(ROOT / document, r"`(\w+)\.(\w+)[`(]"):
        paths = [path for path in SOURCES if path.stem == module and name not in SUFFIXES]
        texts = [path.read_text(encoding="utf-8") for path in paths]
        assert not paths or any(re.search(rf"\b{name}\b", text) for text in texts), module + name


def test_the_map_is_whole():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = set(re.findall(r"\S+", "".join(re.findall(r"(?m)^  (?:\S+ )+ ", text))))
    modules = {path.name for path in ROOT.glob("robust_ft/*.py") if path.stem != "__init__"}
    packages = {f"{path.parent.name}/" for path in ROOT.glob("robust_ft/*/__init__.py")}
    assert not (modules | packages) - tree


def test_imports(current):
    blocks = re.findall(r"```python\n(.*?)```", current.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("robust_ft"):
                for alias in node.names:
                    assert is_importable(node.module, alias.name), f"{node.module}.{alias.name}"


def is_importable(module, name):
    """Whether `from module import name` works, found out without importing tensorflow."""
    path = ROOT / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    defined = re.search(rf"\b{name}\b", source.read_text(encoding="utf-8"))
    return defined is not None or (path / f"{name}.py").exists()


def commands_with_configs():
    """Returns the words of every documented command that names gin files."""
    commands = []
    for document in CURRENT:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"(?ms)^ *```\w*\n(.*?)^ *```", text):
            lines = [line for line in block.splitlines() if "--gin_file=" in line]
            commands += [shlex.split(line, comments=True) for line in lines]
    return commands


@pytest.mark.parametrize("words", commands_with_configs(), ids=" ".join)
def test_configs_of_commands_build(words):
    files = [word.removeprefix("--gin_file=") for word in words if word.startswith("--gin_file=")]
    bindings = [word.removeprefix("--gin.") for word in words if word.startswith("--gin.")]
    # Models of a reader's own are somewhere below /models.
    bindings = [re.sub(r"=/models/.*", "=asset:mini", binding) for binding in bindings]
    if NOT_OURS.isdisjoint(files):
        gin_config.load(files, bindings)
