"""All meshes train as one device does, in one process and in two; so does every method."""

import json

import numpy as np
import pytest
import sharded_checkpoints
from every_method import METHODS
from sharded_training import CASES, run
from tiny_families import CONFIGS

ONE = {"devices": 1}
KINDS = {
    "data": {},
    "fully sharded": {"fully_sharded": -1},
    "tensor": {"model_parallel": 2},
    "sequence": {"sequence_parallel": 2},
    "hybrid": {"slices": 2, "fully_sharded": -1},
    "combined": {"fully_sharded": 2, "sequence_parallel": 2, "model_parallel": 2},
}
ON_8 = {name: {"devices": 8, **fields} for name, fields in KINDS.items()}
ON_FEWER = {
    f"{name} on {count}": {"devices": count, **fields}
    for count in (2, 4)
    for name, fields in KINDS.items()
    if name != "combined"
}
MORE = {
    "partly sharded": {"devices": 8, "fully_sharded": 2},
    "sharded tensors": {"devices": 8, "fully_sharded": -1, "model_parallel": 2},
    "sharded tensors on 4": {"devices": 4, "fully_sharded": 2, "model_parallel": 2},
    "long sequences": {"devices": 8, "sequence_parallel": 4},
    "slices of tensors": {"devices": 8, "slices": 2, "model_parallel": 2},
    "2-D activations": {**ON_8["combined"], "rules": [["activation_embed", "model"]]},
    "Megatron's sequences": {**ON_8["tensor"], "rules": [["length", "model"]]},
}
# Two processes hold one model together, and read the same rows.
ACROSS = {"devices": 8, "sequence_parallel": 4, "model_parallel": 2}
EXTRAS = ["adafactor", "cocktail", "asft", "eaft", "flow", "dropout", "remedies"]
OF_T5 = [f"t5 {method}" for method in METHODS] + EXTRAS
SOME = ["adafactor", "t5 task prompts", "cocktail"]


def trained(plan, folder, processes=1):
    """Returns what `sharded_training` makes of each pair of (mesh, cases), {name: array}."""
    output = folder / "trained.npz"
    patience = 60 + 20 * sum(len(cases) for _, cases in plan)
    arguments = ("sharded_training.py", output, json.dumps(plan))
    run(*arguments, processes=processes, patience=patience)
    results = [{} for _ in plan]
    with np.load(output) as arrays:
        for name in arrays:
            number, _, rest = name.partition("/")
            results[int(number)][rest] = arrays[name]
    return results


def check_alike(expected, results, meshes):
    """Checks losses and parameters on meshes against those on one device."""
    for mesh, actual in zip(meshes, results, strict=True):
        for name, array in actual.items():
            message = f"{mesh}: {name}"
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-5, err_msg=message)


def test_meshes_train_as_one_device_does(tmp_path):
    cases = ["adafactor"]
    meshes = {name: ON_8[name] for name in ("combined", "hybrid")}
    plan = [(mesh, cases) for mesh in (ONE, *meshes.values())]
    expected, *results = trained(plan, tmp_path)
    losses = expected["adafactor/loss"]
    assert losses[-1] < losses[0]
    check_alike(expected, results, meshes)


# --- All methods, all meshes


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What every case gives on one device."""
    return trained([(ONE, list(CASES))], tmp_path_factory.mktemp("one"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ON_8)
def test_every_method_on_every_kind_of_mesh(mesh, expected, tmp_path):
    check_alike(expected, trained([(ON_8[mesh], OF_T5)], tmp_path), [mesh])


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [ON_FEWER, MORE], ids=["on fewer", "more"])
def test_more_meshes(meshes, expected, tmp_path):
    plan = [(mesh, SOME) for mesh in meshes.values()]
    check_alike(expected, trained(plan, tmp_path), meshes)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "t5"])
def test_every_method_in_every_family(family, expected, tmp_path):
    mesh = {"devices": 4, "model_parallel": 2}
    cases = [f"{family} {method}" for method in METHODS]
    check_alike(expected, trained([(mesh, cases)], tmp_path), [family])


@pytest.mark.slow
def test_two_processes_train_as_one_device_does(expected, tmp_path):
    meshes = ON_8 | {"across": ACROSS}
    plan = [(mesh, ["t5 prompt and lora"]) for mesh in meshes.values()]
    plan[list(meshes).index("hybrid")] = (ON_8["hybrid"], OF_T5)
    check_alike(expected, trained(plan, tmp_path, processes=2), meshes)


# --- Decoding


@pytest.mark.parametrize(
    "family", [f if f == "t5" else pytest.param(f, marks=pytest.mark.slow) for f in CONFIGS]
)
def test_meshes_decode_as_one_device_does(family):
    run("sharded_decoding.py", family)


# --- Checkpoints


def check_restores(folder, kinds, processes=1):
    """Checks that what is written on 8 devices comes back bit by bit on 2 and on 1."""
    on_8 = [ON_8[kind] for kind in kinds]
    on_2 = [ON_FEWER[f"{kind} on 2"] for kind in kinds if kind != "combined"]
    run("sharded_checkpoints.py", "write", folder, json.dumps(on_8), processes=processes)
    run("sharded_checkpoints.py", "read", folder, json.dumps(on_2), devices=2)
    sharded_checkpoints.read(folder, [ONE])


@pytest.mark.slow
def test_checkpoints_of_8_devices_on_2_and_on_1(tmp_path):
    check_restores(tmp_path, ["fully sharded", "tensor"])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_checkpoints_of_every_mesh_on_2_and_on_1(processes, tmp_path):
    check_restores(tmp_path, KINDS, processes)
