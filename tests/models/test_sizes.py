"""The configs under gin_configs/models have the published models' numbers of parameters."""

import math

import gin
import pytest

from robust_ft import gin_config
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
