"""What a PEFT method of one's own costs: its file, its gin file, two lines in `models/peft`."""

import difflib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOY = Path(__file__).parent / "toy_promot.gin"
METHOD = '''"""A gain of each MLP's output."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from robust_ft.models.peft.base import Peft


@dataclasses.dataclass(frozen=True)
class Gain(Peft):
    """One number a layer, `<layer>/gain`, times what the MLP adds to the residual stream."""

    name: str = "gain"
    start: float = 1.0

    def residual(
        self, scope: nn.Module, site: str, x: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length embed"]:
        if site != "mlp":
            return x
        gain = scope.param(self.name, nn.with_partitioning(nn.initializers.ones, ()), ())
        return x * (self.start * gain).astype(x.dtype)
'''
CONFIG = """# A gain of each MLP's output trains.

Model.gain = @Gain()
Gain.start = 2.0

gain/Stage:
  name = 'gain'
  trainable = ['peft']
  optimizer = %LIGHT_OPTIMIZER
  steps = %LIGHT_TRAIN_STEPS
  eval_period = %LIGHT_EVAL_PERIOD

Recipe:
  stages = [@gain/Stage()]
  selections = []
"""
# Line in `models/peft/__init__.py` -> the line that it stands behind.
LINES = {
    "from robust_ft.models.peft.gain import Gain": "from robust_ft.models.peft.base import Peft",
    '    "gain": Gain,': '    "ia3": IA3,',
}


@pytest.fixture
def checkout(tmp_path):
    """A copy of the program with a new method, added as docs/howto/choose_a_method.md says."""
    for folder in ("robust_ft", "gin_configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "robust_ft/models/peft/gain.py").write_text(METHOD)
    (tmp_path / "gin_configs/methods/gain.gin").write_text(CONFIG)
    file = tmp_path / "robust_ft/models/peft/__init__.py"
    text = file.read_text()
    for line, before in LINES.items():
        text = text.replace(f"{before}\n", f"{before}\n{line}\n")
    changes = list(difflib.ndiff(file.read_text().splitlines(), text.splitlines()))
    assert [change for change in changes if change[0] != " "] == [f"+ {line}" for line in LINES]
    file.write_text(text)
    return tmp_path


@pytest.mark.slow
def test_a_new_method_trains_and_is_exported(checkout):
    flags = [
        f"--gin_file={TOY}",
        "--gin_file=gin_configs/methods/gain.gin",
        f"--gin.MODEL_DIR={checkout / 'run'}",
        "--gin.Model.prompt=None",
        "--gin.LIGHT_TRAIN_STEPS=2",
        "--gin.LIGHT_EVAL_PERIOD=2",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), str(TOY.parent)])}
    ended = subprocess.run(
        [sys.executable, "-m", "robust_ft.train", *flags],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    outcome = json.loads((checkout / "run/gain/outcome.json").read_text())
    assert len(outcome["paths"]) == 2 and all(path.endswith("/gain") for path in outcome["paths"])
    assert '"Gain"' in (checkout / "run/gain/export/robust_ft_adapter.json").read_text()
