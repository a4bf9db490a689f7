"""The mean of several runs' parameters, and which runs have none."""

import dataclasses

import numpy as np
import pytest
import toy
from test_export import write_base

import robust_ft
from robust_ft import runner, soup
from robust_ft.errors import UserError
from robust_ft.models.peft import Lora
from robust_ft.recipe import Recipe
from robust_ft.trainable import flatten

QUIET = {"evaluations": (), "final_evaluations": (), "steps": 1, "microbatches": 1}
FULL = {"model": toy.PLAIN, "trainable": ["base"], **QUIET}
LORA = Lora(rank=2)


def trained(directory, seed=0, **changes):
    stage = toy.stage(**{**FULL, **changes})
    runner.run(Recipe("toy", str(directory), (stage,), seed))
    return str(directory)


def parameters(directory):
    return {
        p: np.asarray(x, np.float64) for p, x in flatten(robust_ft.load(directory).params).items()
    }


def test_one_run_is_no_soup(tmp_path):
    for runs in ([str(tmp_path)], [str(tmp_path), f"{tmp_path}/."]):
        with pytest.raises(UserError, match="two or more different runs"):
            soup.soup(runs, str(tmp_path / "soup"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(UserError, match=r"is there already"):
        soup.main(["a", "b", f"--output={tmp_path / 'there'}"])


@pytest.mark.slow
def test_the_mean_and_what_has_none(tmp_path):
    base = write_base(tmp_path / "base")
    runs = [trained(tmp_path / f"seed_{seed}", seed, restore=base) for seed in range(3)]
    output = tmp_path / "soup"
    assert soup.main([*runs, f"--output={output}"]) == 0
    each = [parameters(run) for run in runs]
    for path, found in parameters(output).items():
        expected = np.mean([flat[path] for flat in each], axis=0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=path)
    assert any(np.any(each[0][path] != each[1][path]) for path in each[0])

    model = dataclasses.replace(toy.PLAIN, peft=(LORA,))
    peft = {"model": model, "trainable": ["peft"], "restore": base}
    loras = [trained(tmp_path / f"lora_{seed}", seed, **peft) for seed in range(2)]
    soup.soup(loras, str(output), overwrite=True)
    merged = [flatten(LORA.merge(robust_ft.load(run).params)) for run in loras]
    for path, found in parameters(output).items():
        expected = np.mean([np.asarray(flat[path], np.float64) for flat in merged], axis=0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=path)

    other = trained(tmp_path / "other", restore=write_base(tmp_path / "another", seed=1))
    scratch = trained(tmp_path / "scratch", restore="scratch")
    prompted = trained(tmp_path / "prompt", model=toy.MODEL, trainable=["peft"], restore=base)
    for run, message in (
        (other, "another'.*whose content is another"),
        (scratch, "started from scratch"),
        (prompted, "holds a Prompt, which cannot be merged"),
    ):
        with pytest.raises(UserError, match=message):
            soup.soup([runs[0], run], str(tmp_path / "none"))
        assert not (tmp_path / "none").exists()
