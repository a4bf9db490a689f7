"""The import rules and size limits of docs/architecture.md, checked on the sources."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up; a module imports from its own layer and the ones below it.
LAYERS = [
    {"errors", "types", "assets", "fingerprint", "multihost", "xla_flags", "cpu_settings"}
    | {
        "files",
        "buckets",
        "bucket_path",
        "full_disk",
        "ranges",
        "task_names",
        "bundled",
        "compiling",
        "decoder_start",
    },
    {"console", "bucket_copies", "vocabulary", "metrics", "metric_writer", "partitioning"},
    {"models", "decoding", "data"},
    {"objectives", "optim", "trainable", "checkpoints_io"},
    {"half_finetuning", "train_step", "text_batches", "ranking", "predictor", "model_info"},
    {"stage_checkpoints", "restore", "outcome", "export", "summary", "evaluator", "sweep_file"}
    | {"scoring", "evaluate", "analysis_results"},
    {
        "analysis",
        "finished_run",
        "finite",
        "first_batch",
        "initial_checkpoint",
        "loading",
        "stage",
        "stage_anchor",
        "stage_step",
        "run_context",
        "stage_evaluator",
        "training_log",
    },
    {"flow_scale"},
    {"trainer", "ensembles", "few_shot"},
    {"recipe", "few_shot_tasks", "few_shot_results"},
    {"few_shot_tuning"},
    {"stage_start", "recorded_settings", "overlap_file"},
    {"recorded_content"},
    {"run_record"},
    {"checks"},
    {"claiming"},
    {"few_shot_run"},
    {"runner"},
    {"inference", "analysis_run", "gin_types", "report"},
    {"seeds", "sweeps"},
    {"gin_builders"},
    {"gin_config", "preflight"},
    {"command_line", "from_gin", "settings"},
    {"model_directory"},
    {"train", "sweep", "eval", "infer", "generate", "convert", "soup", "__main__"},
]
SOURCES = sorted([*ROOT.glob("robust_ft/**/*.py"), *ROOT.glob("tasks/**/*.py")])
LIBRARY = [path for path in SOURCES if path.is_relative_to(ROOT / "robust_ft")]


def part(path):
    """Returns the module's name below robust_ft: `data` for robust_ft/data/cache.py.

    What makes a package a command line is not part of the package.
    """
    if path.name == "__main__.py":
        return "__main__"
    return path.relative_to(ROOT / "robust_ft").parts[0].removesuffix(".py")


def imports(path, runtime_only=False):
    """Returns the dotted names that a file imports, `from a import b` as both a and a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    if runtime_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                skipped |= {inner for child in node.body for inner in ast.walk(child)}
    names = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path):
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    name = part(path)
    if name == "__init__":  # what it offers is imported when it is asked for
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert [node.module for node in at_once] == ["typing"]
        return
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert name in level, f"say in which layer {name} is"
    for imported in imports(path, runtime_only=True):
        if imported.startswith("robust_ft.") and (below := imported.split(".")[1]) != name:
            assert level[below] <= level[name], f"{name} imports {below}"


def test_parts_import_each_other_in_no_circle():
    edges: dict[str, set[str]] = {}
    for path in LIBRARY:
        names = {n.split(".")[1] for n in imports(path, True) if n.startswith("robust_ft.")}
        edges.setdefault(part(path), set()).update(names - {part(path)})
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError, which shows the circle


def test_only_data_and_tasks_import_tensorflow():
    for path in LIBRARY:
        if part(path) != "data":
            assert not packages(path) & {"tensorflow", "seqio", "tensorflow_datasets", "tasks"}
            assert "tensorflow_text" not in packages(path)


def test_only_models_import_linen():
    for path in LIBRARY:
        if part(path) != "models":
            flax = {name for name in imports(path) if name.split(".")[0] == "flax"}
            assert flax <= {"flax", "flax.traverse_util"}, path


def test_one_module_imports_gin():
    assert {part(path) for path in SOURCES if "gin" in packages(path)} == {"gin_config"}


def test_packages_that_nothing_imports():
    for path in SOURCES:
        assert not packages(path) & {"pickle", "transformers", "clu", "t5x"}, path


def statements_length(node):
    """Returns the lines of a function's body, without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes_and_leftovers(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    for word in ("TO" + "DO", "FIX" + "ME", "XX" + "X"):
        assert word not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert statements_length(node) <= 60, node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec")
