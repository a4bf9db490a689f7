"""What `import robust_ft` offers, and what it costs; the one command in front of all others."""

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import robust_ft
from robust_ft import __main__ as command
from robust_ft import gin_config
from robust_ft.errors import UserError

PROMOT = "gin_configs/promot_rte.gin"


def python(code, **settings):
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **settings
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_type_checkers_and_python_import_the_same():
    tree = ast.parse(Path(robust_ft.__file__).read_text("utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    submodules = {"metrics": "robust_ft", "vocabulary": "robust_ft"}
    assert typed == {n: f"robust_ft.{home}" for n, home in robust_ft._HOME.items()} | submodules
    assert sorted(typed) == robust_ft.__all__


@pytest.mark.parametrize("name", robust_ft.__all__)
def test_public_names(name):
    public = getattr(robust_ft, name)
    assert inspect.getdoc(public) and name in dir(robust_ft)
    # Importing a module of that name would put it in the place of the function or class.
    assert inspect.ismodule(public) or importlib.util.find_spec(f"robust_ft.{name}") is None


def test_other_names():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        robust_ft.trian  # noqa: B018


def test_importing_is_light():
    code = "import sys, robust_ft; print({m.split('.')[0] for m in sys.modules} & {'jax', 'numpy'})"
    assert python(code) == "set()\n"


def test_a_recipe_from_gin_files():
    recipe = robust_ft.load_recipe(
        PROMOT,
        Path("gin_configs/methods/lora.gin"),
        bindings={"lora/Stage.eval_period": 5, "TRAIN_STEPS": 3},
        TRAIN_STEPS=7,
        MODEL_DIR=Path("/tmp/7"),
        LIGHT_OPTIMIZER="%OPTIMIZER",
    )
    flags = ["lora/Stage.eval_period=5", "TRAIN_STEPS=7", "LIGHT_OPTIMIZER=%OPTIMIZER"]
    files = [PROMOT, "gin_configs/methods/lora.gin"]
    assert recipe == gin_config.load(files, [*flags, "MODEL_DIR=/tmp/7"]).recipe
    assert recipe.model_dir == "/tmp/7"


def test_texts_stay_texts():
    assert robust_ft.load_recipe(PROMOT, MODEL_DIR="7").model_dir == "7"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"TRIAN_STEPS": 1}, "'TRIAN_STEPS'.* Did you mean"),
        ({"TRAIN_STEPS": "ten"}, "must be a whole number"),
        ({"OPTIMIZER": object()}, "OPTIMIZER=<object.*> is not a plain value"),
    ],
)
def test_mistakes_in_settings(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        robust_ft.load_recipe(PROMOT, **settings)


def test_programs_are_kept_even_if_one_was_compiled_before(tmp_path):
    code = """
import jax
jax.jit(lambda x: x + 1)(1)
from robust_ft import compiling
compiling.use_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 2)(1)
"""
    python(code, env={"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)})
    assert any((tmp_path / ".cache" / "robust_ft" / "xla").iterdir())


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_is_a_module(name):
    assert importlib.util.find_spec(f"robust_ft.{name}") is not None


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_command(arguments, capsys):
    command._dispatch(arguments)
    assert "data.show" in capsys.readouterr().out


def test_a_misspelt_command():
    with pytest.raises(UserError, match=r"no command 'trian'.* Did you mean 'train'"):
        command._dispatch(["trian"])


def test_help_of_a_command_is_light():
    code = """
import sys
from robust_ft.__main__ import main
sys.argv[1:] = ["train", "--help"]
try:
    main()
finally:
    assert "jax" not in sys.modules
"""
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "JAX_PLATFORMS": "tpu"}
    assert "python -m robust_ft.train" in python(code, env=environment)


# The test session has imported what is run here.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_command_gets_its_arguments(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("yes\nno\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["robust_ft", "metrics", "exact_match"])
    sys.argv += [str(tmp_path / "a.txt")] * 2
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0 and '"exact_match": 100.0' in capsys.readouterr().out


def test_every_public_name_is_in_the_reference():
    pages = (Path(__file__).parent.parent / "docs" / "api").glob("*.md")
    listed = [name for page in pages for name in re.findall(r"^::: (.+)$", page.read_text(), re.M)]
    assert sorted(listed) == [f"robust_ft.{name}" for name in robust_ft.__all__]
