"""The configs under gin_configs/models have the published models' numbers of parameters."""

import math

import gin
import pytest

from robust_ft import gin_config, trainable
from robust_ft.models.model import Model
from robust_ft.trainable import flatten

PUBLISHED = {
    "bart_base": 139_420_416,
    "bart_large": 406_291_456,
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    """Computed from shapes alone; nothing is drawn."""
    file = f"{gin_config.CONFIGS}/models/{name}.gin"
    gin.clear_config()
    try:
        gin_config._prepare([""])
        gin.parse_config_files_and_bindings([file], "DROPOUT_RATE = 0.1")
        config = gin.query_parameter("%MODEL_CONFIG").scoped_configurable_fn()
        model = gin.get_configurable("Model")(config)
    finally:
        gin.clear_config()
    shapes = flatten(Model(config).shapes())
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == PUBLISHED[name]
    assert (config.pad_id, config.attention_dropout_rate) == (model.pad_id, 0.1)


@pytest.mark.parametrize(("name", "prompt"), [("gpt2", "decoder"), ("bart_base", "encoder")])
def test_recipes_run_on_these_models(name, prompt):
    files = ["gin_configs/promot_rte.gin", f"gin_configs/models/{name}.gin"]
    recipe = gin_config.load(files, ["DROPOUT_RATE=0.1"]).recipe
    tuned, trained = (
        trainable.trainable_paths(stage.model.shapes(), stage.trainable) for stage in recipe.stages
    )
    assert tuned == {f"{prompt}/prompt"} and not tuned & trained
    config = recipe.stages[0].model.config
    assert config.dropout_rate == config.attention_dropout_rate == 0.1
