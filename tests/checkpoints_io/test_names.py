"""Tables of names: strict both ways, copies checked."""

import numpy as np
import pytest
from tiny_models import tiny_config

from robust_ft.checkpoints_io import hf_t5
from robust_ft.checkpoints_io.names import Name, Redundant, expand, resolve, with_prefix
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.trainable import flatten

CONFIG = tiny_config()
REDUNDANT = hf_t5.REDUNDANT


def tensors_of(config, prefix=""):
    """Returns the tensors that Hugging Face would have, each with its own values."""
    shapes = flatten(Model(config).shapes())
    found = {}
    for i, (path, (theirs, transpose)) in enumerate(expand(hf_t5.NAMES, config).items()):
        shape = shapes[path].shape
        array = np.full(shape[::-1] if transpose else shape, i, np.float32)
        found[prefix + theirs] = Tensor.of(array, f"'{theirs}' in 'file'")
    return found


def test_layer_numbers_are_the_same_on_both_sides():
    name = Name("a/layers_{i}/{i}/kernel", "b.{i}.{i}.weight")
    assert name.match("a/layers_12/12/kernel") == "b.12.12.weight"
    assert name.match("a/layers_12/13/kernel") is None
    assert name.match("a/layers_1x/1x/kernel") is None
    assert Name("a.b", "c").match("aXb") is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activations", [("relu",), ("gelu", "linear")])
def test_every_parameter_has_one_name(tied, activations):
    config = tiny_config(logits_via_embedding=tied, mlp_activations=activations)
    table = expand(hf_t5.NAMES, config)
    assert table.keys() == flatten(Model(config).shapes()).keys()
    assert len({theirs for theirs, _ in table.values()}) == len(table)
    assert ("lm_head.weight", True) in table.values() or tied


def test_a_row_too_few_or_too_many_is_found():
    with pytest.raises(ValueError, match=r"0 rows .* token_embedder"):
        expand(hf_t5.NAMES[1:], CONFIG)
    with pytest.raises(ValueError, match=r"2 rows"):
        expand((*hf_t5.NAMES, hf_t5.NAMES[0]), CONFIG)


def test_matrices_come_transposed():
    tensors = tensors_of(CONFIG)
    found = resolve(hf_t5.NAMES, CONFIG, tensors, "x").tensors
    for path, leaf in flatten(Model(CONFIG).shapes()).items():
        assert found[path].shape == leaf.shape == found[path].load().shape


def test_both_lists_are_told():
    tensors = tensors_of(CONFIG)
    tensors["encoder.extra.weight"] = tensors.pop("shared.weight")
    with pytest.raises(UserError) as caught:
        resolve(hf_t5.NAMES, CONFIG, tensors, "some/dir", REDUNDANT)
    text = str(caught.value)
    assert "'some/dir'" in text and "1 tensors have no place in it, 1 places" in text
    assert "no place: encoder.extra.weight" in text and "no tensor: shared.weight" in text


def test_a_wrong_shape_names_the_tensor_as_its_file_has_it():
    tensors = tensors_of(CONFIG)
    name = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
    tensors[name] = Tensor.of(np.zeros((24, 17)), f"'{name}' in 'file'")
    with pytest.raises(UserError, match=r"wi_0.weight' in 'file' has shape \(24, 17\).*\(24, 16\)"):
        resolve(hf_t5.NAMES, CONFIG, tensors, "x", REDUNDANT)


def test_copies_are_checked_and_noted():
    tensors = tensors_of(CONFIG)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    found = resolve(hf_t5.NAMES, CONFIG, tensors, "x", REDUNDANT)
    assert found.duplicates == {"encoder.embed_tokens.weight": "shared.weight"}
    other = Tensor.of(tensors["shared.weight"].load() + 1, "'copy' in 'file'")
    tensors["encoder.embed_tokens.weight"] = other
    with pytest.raises(UserError, match=r"'copy' in 'file' differs from 'shared.weight'"):
        resolve(hf_t5.NAMES, CONFIG, tensors, "x", REDUNDANT)


def test_a_copy_stands_in_for_its_original():
    tensors = tensors_of(CONFIG)
    tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    found = resolve(hf_t5.NAMES, CONFIG, tensors, "x", REDUNDANT)
    assert found.stand_ins == {"shared.weight": "decoder.embed_tokens.weight"}


def test_a_head_of_its_own_never_stands_in_for_the_embedding():
    tensors = tensors_of(CONFIG)
    del tensors["shared.weight"]
    with pytest.raises(UserError, match=r"no tensor: shared.weight"):
        resolve(hf_t5.NAMES, CONFIG, tensors, "x", REDUNDANT)


def test_ignored_tensors_are_dropped():
    tensors = tensors_of(CONFIG)
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[name] = Tensor.of(np.zeros(3), name)
    assert not resolve(hf_t5.NAMES, CONFIG, tensors, "x", REDUNDANT).duplicates


def test_base_models_leave_out_a_prefix():
    names = tuple(
        Name(n.ours, n.theirs if n.theirs.startswith("lm_") else f"base.{n.theirs}", n.transpose)
        for n in hf_t5.NAMES
    )
    redundant = Redundant((("copy", "base.shared.weight"),), prefix="base.")
    bare = tensors_of(CONFIG)
    bare["copy"] = bare["shared.weight"]
    found, prefix = with_prefix(bare, names, redundant)
    whole = {n if n.startswith(("lm_", "copy")) else f"base.{n}": t for n, t in bare.items()}
    assert found == whole and prefix == "base."
    assert with_prefix(whole, names, redundant) == (whole, "")
    assert with_prefix(bare, names, Redundant()) == (bare, "")
    assert resolve(names, CONFIG, found, "x", redundant).duplicates
