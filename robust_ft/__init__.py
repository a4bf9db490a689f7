"""robust_ft: finetune pretrained language models without losing what they could already do.

A pretrained or finetuned model in Python, text in, text or scores out:

```python
model = robust_ft.load("asset:mini")
model.predict(["Q : what is the capital of Galdia ? A :"])  # ['Brell']
```

A recipe, from gin files (`robust_ft.load_recipe`) or in Python (`robust_ft.Recipe`, see
examples/promot.py), is run by `robust_ft.run`; `robust_ft.write_report` draws what came of it.

Importing this package imports nothing else: each name below is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_ft import metrics as metrics
    from robust_ft import vocabulary as vocabulary
    from robust_ft.data.cache import TaskData as TaskData
    from robust_ft.data.file_task import FileTask as FileTask
    from robust_ft.data.in_memory import pairs_task as pairs_task
    from robust_ft.data.in_memory import rows_task as rows_task
    from robust_ft.decoding import Decoder as Decoder
    from robust_ft.ensembles.interpolation import interpolate as interpolate
    from robust_ft.ensembles.predictor import Ensemble as Ensemble
    from robust_ft.ensembles.selection import CocktailSelection as CocktailSelection
    from robust_ft.ensembles.selection import EnsembleSelection as EnsembleSelection
    from robust_ft.ensembles.selection import students as students
    from robust_ft.ensembles.weight_interpolation import (
        InterpolationSelection as InterpolationSelection,
    )
    from robust_ft.errors import UserError as UserError
    from robust_ft.evaluate import Evaluation as Evaluation
    from robust_ft.evaluate import suite as suite
    from robust_ft.evaluator import EvalContext as EvalContext
    from robust_ft.evaluator import Evaluator as Evaluator
    from robust_ft.evaluator import Result as Result
    from robust_ft.few_shot import FewShot as FewShot
    from robust_ft.from_gin import load_recipe as load_recipe
    from robust_ft.loading import load as load
    from robust_ft.models.bart import BartConfig as BartConfig
    from robust_ft.models.gpt2 import GPT2Config as GPT2Config
    from robust_ft.models.llama import LlamaConfig as LlamaConfig
    from robust_ft.models.model import Model as Model
    from robust_ft.models.peft import IA3 as IA3
    from robust_ft.models.peft import Adapter as Adapter
    from robust_ft.models.peft import Lora as Lora
    from robust_ft.models.peft import OPLora as OPLora
    from robust_ft.models.peft import Peft as Peft
    from robust_ft.models.peft import Prefix as Prefix
    from robust_ft.models.peft import Prompt as Prompt
    from robust_ft.models.t5 import T5Config as T5Config
    from robust_ft.objectives import L2SP as L2SP
    from robust_ft.objectives import Cocktail as Cocktail
    from robust_ft.objectives import CrossEntropy as CrossEntropy
    from robust_ft.objectives import Ewc as Ewc
    from robust_ft.objectives import Fisher as Fisher
    from robust_ft.objectives import Objective as Objective
    from robust_ft.objectives import Teacher as Teacher
    from robust_ft.optim import Adafactor as Adafactor
    from robust_ft.optim import AdamW as AdamW
    from robust_ft.optim import Schedule as Schedule
    from robust_ft.partitioning import Partitioner as Partitioner
    from robust_ft.predictor import Predictor as Predictor
    from robust_ft.recipe import Recipe as Recipe
    from robust_ft.report import write_report as write_report
    from robust_ft.run_context import Callback as Callback
    from robust_ft.runner import run as run
    from robust_ft.seeds import run_seeds as run_seeds
    from robust_ft.stage import Stage as Stage
    from robust_ft.summary import Row as Row
    from robust_ft.summary import Summary as Summary
    from robust_ft.sweeps import run_sweep as run_sweep
    from robust_ft.trainable import above_bottom_layers as above_bottom_layers
    from robust_ft.trainable import bitfit as bitfit
    from robust_ft.trainable import top_layers as top_layers
    from robust_ft.trainer import Stopped as Stopped

# Where each public name lives; the imports above say the same to type checkers (a test compares).
_HOMES = {
    "data.cache": ["TaskData"],
    "data.file_task": ["FileTask"],
    "data.in_memory": ["pairs_task", "rows_task"],
    "decoding": ["Decoder"],
    "ensembles.interpolation": ["interpolate"],
    "ensembles.predictor": ["Ensemble"],
    "ensembles.weight_interpolation": ["InterpolationSelection"],
    "ensembles.selection": ["CocktailSelection", "EnsembleSelection", "students"],
    "errors": ["UserError"],
    "evaluate": ["Evaluation", "suite"],
    "evaluator": ["EvalContext", "Evaluator", "Result"],
    "few_shot": ["FewShot"],
    "from_gin": ["load_recipe"],
    "loading": ["load"],
    "models.bart": ["BartConfig"],
    "models.gpt2": ["GPT2Config"],
    "models.llama": ["LlamaConfig"],
    "models.model": ["Model"],
    "models.peft": ["IA3", "Adapter", "Lora", "OPLora", "Peft", "Prefix", "Prompt"],
    "models.t5": ["T5Config"],
    "objectives": [
        "L2SP",
        "Cocktail",
        "CrossEntropy",
        "Ewc",
        "Fisher",
        "Objective",
        "Teacher",
    ],
    "optim": ["Adafactor", "AdamW", "Schedule"],
    "partitioning": ["Partitioner"],
    "predictor": ["Predictor"],
    "recipe": ["Recipe"],
    "report": ["write_report"],
    "run_context": ["Callback"],
    "runner": ["run"],
    "seeds": ["run_seeds"],
    "stage": ["Stage"],
    "summary": ["Row", "Summary"],
    "sweeps": ["run_sweep"],
    "trainable": ["above_bottom_layers", "bitfit", "top_layers"],
    "trainer": ["Stopped"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, "metrics", "vocabulary"])


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOME:
        value = getattr(importlib.import_module(f"robust_ft.{_HOME[name]}"), name)
        globals()[name] = value  # so that this function is not asked again
        return value
    if name in __all__:
        return importlib.import_module(f"robust_ft.{name}")
    raise AttributeError(f"module 'robust_ft' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
