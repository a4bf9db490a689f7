"""The six arms of continued pretraining for promptability: what they are at every size."""

import pytest

from robust_ft import gin_config
from robust_ft.gin_config import CONFIGS
from robust_ft.objectives.meta_learning import MetaLearning
from tasks import p3

ARMS = sorted(path.stem for path in CONFIGS.glob("p3_*.gin"))


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("scale", ["scale/mini", "scale/t5_large_p3", "scale/t5_xl_p3"])
@pytest.mark.parametrize("arm", ARMS)
def test_arms_of_continued_pretraining(arm, scale, deep):
    files = [arm, scale, *(["methods/deep_prompt"] if deep else [])]
    recipe = gin_config.load([f"gin_configs/{file}.gin" for file in files]).recipe
    few_shot, stages, mini = recipe.few_shot, recipe.stages, scale == "scale/mini"
    (prompt,) = few_shot.model.peft
    assert (type(prompt).__name__, prompt.name) == ("Prefix" if deep else "Prompt", "prompt")
    assert prompt.length == (10 if mini else 20)
    assert few_shot.zero_shot_without == (("prompt",) if arm in ("p3_none", "p3_mtl_t") else ())
    assert (few_shot.examples, few_shot.epochs) == (16, 100)
    assert len(few_shot.evaluations) == (16 if mini else 116)
    assert len(stages) == (0 if arm == "p3_none" else 1)
    for stage in stages:
        assert (stage.name, few_shot.restore) == ("mtl", "stage:mtl")
        assert stage.model.peft == (() if arm == "p3_mtl_t" else few_shot.model.peft)
        assert not (stage.select_best or stage.evaluations or stage.final_evaluations)
        # One epoch: what remains is less than a batch.
        examples = stage.batch_size * stage.steps
        if isinstance(stage.gradient, MetaLearning):
            examples *= stage.gradient.tasks * stage.gradient.batches
        size = 25 * 384 if mini else sum(rate for _, rate in p3._paper_rates)
        assert 0 <= size - examples < examples / stage.steps
