"""The paper's claims about promptability are told from the runs, whichever way they come out."""

import itertools
import sys
from pathlib import Path

from few_shot_runs import make_few_shot_run

from robust_ft.report.promptability import make_promptability
from robust_ft.report.runs import load_runs

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import mini_world
import promptability_claims as claims

AS_IN_THE_PAPER = {"p3_none": 0.0, "p3_mtl_p": 0.02, "p3_reptile": 0.1, "p3_fomaml": 0.13,
                   "p3_mtl_t": 0.2, "p3_mtl_tp": 0.4}  # fmt: skip


def table(folder, skills):
    folders = [
        make_few_shot_run(folder / f"{arm}{added}_{seed}", arm + added, seed, skill + more)
        for arm, skill in skills.items() for added, more in (("", 0.0), (claims.DEEP, 0.2))
        for seed in range(3)
    ]  # fmt: skip
    found = make_promptability(load_runs(folders))
    return {text: (here, held) for text, _, here, held in claims.rows(found)[1:]}


def test_held_and_the_reverse(tmp_path):
    arms = list(AS_IN_THE_PAPER)
    held = table(tmp_path / "a", AS_IN_THE_PAPER)
    assert held["T+P above T: shallow, 16-shot"][1] == "held"
    assert held["FOMAML below T+P: deep, 16-shot"][1] == "held"
    assert held["deep above shallow, 16-shot: T"][1] == "held"
    # The made runs gain with shots, and more with a deep prompt.
    assert held["T: 16 shots below 0 shots, shallow"][1] == "not held: the reverse"
    backwards = dict(zip(arms, reversed(AS_IN_THE_PAPER.values()), strict=True))
    other = table(tmp_path / "b", backwards)
    assert other["T+P above T: shallow, 16-shot"][1] == "not held: the reverse"
    assert other["T+P above T: shallow, 16-shot"][0].startswith("−")


def test_equal_arms_are_not_told_apart_and_missing_ones_not_measured(tmp_path):
    found = table(tmp_path, {"p3_mtl_t": 0.2, "p3_mtl_tp": 0.2})
    assert found["T+P above T: shallow, 16-shot"][1] == "not held: no significant difference"
    assert found["T above P: deep, 0-shot"] == ("–", "not measured")


def test_the_papers_differences():
    by_text = {claim.text: claim.paper for claim in claims.claims()}
    assert by_text["T+P above T: shallow, 16-shot"] == "+7.1, +3.5"
    assert by_text["T+P above T: deep, 16-shot"] == "+4.8, +0.3"
    assert by_text["T above P: deep, 0-shot"] == "–"  # the paper has no deep prompt there
    assert len(by_text) == len(claims.claims()) == 27


def test_a_comparison_names_gin_files():
    assert len(mini_world.COMPARISONS["promptability"]) == 12
    assert mini_world.gin_files("p3_mtl_t+deep_prompt") == [
        "--gin_file=gin_configs/p3_mtl_t.gin", "--gin_file=gin_configs/methods/deep_prompt.gin",
    ]  # fmt: skip
    root = Path(__file__).parent.parent
    for names in mini_world.COMPARISONS.values():
        for flag in itertools.chain(*map(mini_world.gin_files, names)):
            assert (root / flag.removeprefix("--gin_file=")).exists(), flag
    assert mini_world.gin_files("full_rte") == ["--gin_file=gin_configs/full_rte.gin"]
