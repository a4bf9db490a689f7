"""The papers' claims are told from runs, whichever way they come out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from few_shot_runs import make_few_shot_run
from report_runs import make_cocktail_run, make_run

from robust_ft import gin_config
from robust_ft.errors import UserError
from robust_ft.metrics.significance import Bootstrap

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import claims
import mini_world
import papers
import runs
from papers import table
from papers.claim import ARG_0, BEST_OOD, OOD, TARGET, Claim, Model
from papers.promptability import DEEP
from papers.verdict import CANNOT_SHOW, HELD, NOT_HELD, Measured, tell

ONE, TWO = (Model(runs.arm(name)) for name in ("full_rte", "promot_rte"))


def claim(above=ONE, below=TWO, quantity=TARGET, **fields):
    return Claim("name", "words", "–", "Table 1", above, below, quantity, **fields)


def told(above, below, interval=None, margin=0.0, bounded=True):
    bootstrap = None
    if interval:
        bootstrap = Bootstrap(sum(above) / len(above) - sum(below) / len(below), *interval, 0.0)
    found = tell(claim(margin=margin), Measured(above, below, bootstrap, bounded))
    return found.status, found.why


def test_both_tests_have_to_agree():
    assert told([80, 81, 82], [60, 61, 62], (15, 25)) == (HELD, "")
    assert told([80, 81, 82], [60, 61, 62], (-1, 25)) == (NOT_HELD, "no significant difference")
    assert told([50, 90, 70], [45, 85, 60], (4, 9)) == (NOT_HELD, "no significant difference")
    assert told([60, 61, 62], [80, 81, 82], (-25, -15)) == (NOT_HELD, "the reverse")


def test_the_one_test_that_there_is():
    assert told([80, 81, 82], [60, 61, 62]) == (HELD, "")
    assert told([80], [60], (15, 25)) == (HELD, "")
    assert told([80], [60]) == (CANNOT_SHOW, "one run, and no interval over examples")


def test_no_worse_is_above_with_a_margin():
    near = [80.0, 80.1, 80.2], [80.1, 80.2, 80.3]
    assert told(*near, (-1, 1), margin=2) == (HELD, "")
    assert told(*near, (-3, 1), margin=2) == (NOT_HELD, "may be worse by 2 or more")
    assert told([60, 61, 62], [80, 81, 82], (-25, -15), margin=2) == (
        NOT_HELD, "worse by 2 or more",
    )  # fmt: skip
    found = tell(claim(margin=2), Measured(*near, Bootstrap(-0.1, -1, 1, 0.5)))
    assert found.text.startswith("−0.1, p = 0.000") or found.text.startswith("−0.1, p < 0.001")
    assert found.text.endswith("[−1.0, +1.0]")  # the difference itself, without the margin


def test_scores_without_room_show_nothing():
    assert told([100, 100], [100, 99.9]) == (CANNOT_SHOW, "both are at 100")
    assert told([0, 0], [0, 0.2], margin=1) == (CANNOT_SHOW, "both are at 0")
    assert told([50, 51], [100, 100]) == (CANNOT_SHOW, "promot_rte is at 100")
    assert told([50, 51], [100, 100], margin=1)[0] == NOT_HELD
    assert told([150, 151], [100, 100], bounded=False) == (HELD, "")


def finish(runner, arm, replicate, make, *arguments):
    make(runner.folder(arm, replicate), *arguments)
    about = {"arm": arm.name, "finished": True, "seconds": 60.0, "made": "a", "checked": "b"}
    path = runner.output / f"{runner.folder(arm, replicate).name}.json"
    path.write_text(json.dumps(about))


def test_rows_of_made_runs(tmp_path):
    runner, replicates = runs.Runner(tmp_path / "runs"), runs.replicates(3)
    for replicate in replicates:
        for model in (ONE, TWO):
            name = model.arm.files
            finish(runner, model.arm, replicate, make_run, name, replicate.seed)
    names = ("forgetting", "format_share", "keeps", "less_format", "transfer", "joint")
    chosen = {f"promot.{name}": papers.claims()[f"promot.{name}"] for name in names}
    rows = table.make_rows(chosen, runner, replicates)
    found = {row.name: row.verdict and (row.verdict.status, row.verdict.why) for row in rows}
    assert found == {
        "promot.forgetting": (HELD, ""),
        "promot.format_share": (HELD, ""),
        "promot.keeps": (HELD, ""),
        "promot.less_format": (HELD, ""),
        "promot.transfer": (NOT_HELD, found["promot.transfer"][1]),
        "promot.joint": None,
    }
    assert rows[0].command == "python benchmarks/claims.py --only promot.forgetting --seeds 3"
    table.write(rows, tmp_path)
    text = (tmp_path / "claims.md").read_text()
    assert "4 held, 1 not held, 0 cannot show" in text
    assert "- Training prompt and model together forgets more than ProMoT: no finished runs" in text
    assert text == table.markdown(table.make_rows(chosen, runner, replicates))
    first = json.loads((tmp_path / "claims.json").read_text())[0]
    assert (first["verdict"], first["seeds"], first["checkpoints"]) == (
        HELD, [0, 1, 2], ["asset:mini"],
    )  # fmt: skip
    assert first["above"][0] == 98.0 and first["difference"] > 40
    # A run without its counterpart does not count.
    (tmp_path / "runs" / "promot_rte_seed2.json").unlink()
    (row,) = table.make_rows({"promot.keeps": chosen["promot.keeps"]}, runner, replicates)
    assert row.seeds == (0, 1) and row.command.endswith("--seeds 2")


def test_models_of_a_selection(tmp_path):
    runner, replicates = runs.Runner(tmp_path), runs.replicates(2)
    arm = runs.arm("table2_webnlg")
    for replicate in replicates:
        finish(runner, arm, replicate, make_cocktail_run, replicate.seed)
    selected = Model(arm, "ensemble")
    made = {
        "a.selected": claim(selected, Model(arm, "full"), OOD),
        "a.best": claim(selected, Model(arm, "ensemble", BEST_OOD), OOD, margin=1),
        "a.zero": claim(selected, Model(arm, "ensemble", 0.0), OOD),
        "a.none": claim(selected, Model(arm, "ensemble", 0.3), OOD),
        "a.typo": claim(selected, Model(arm, "ensembel"), OOD),
    }
    found = {row.name: row for row in table.make_rows(made, runner, replicates)}
    # Right answers OOD are 30 + 40 λ %, of which λ = 0.5 is selected, and λ = 1 the best.
    assert found["a.selected"].verdict.difference == pytest.approx(20)
    assert found["a.best"].verdict.difference == pytest.approx(-20)
    assert found["a.best"].verdict.bootstrap.high < 0
    assert found["a.zero"].verdict.difference == pytest.approx(20)
    assert found["a.zero"].verdict.bootstrap.low > 0
    assert "ensemble has no λ = 0.3, but [0.0, 0.5, 1.0]" in found["a.none"].missing
    assert "no stage or selection 'ensembel', but light, full" in found["a.typo"].missing


# ARG of arms in the order that the paper found.
AS_IN_THE_PAPER = {
    "p3_none": 0.0, "p3_mtl_p": 0.0, "p3_reptile": 0.1, "p3_fomaml": 0.13, "p3_mtl_t": 0.2,
    "p3_mtl_tp": 0.4,
}  # fmt: skip


def promptability(folder, skills):
    """Returns the verdict of each claim about promptability."""
    runner, replicates = runs.Runner(folder), runs.replicates(3)
    for files, skill in skills.items():
        for added, more in (("", 0.0), (DEEP, 0.2)):
            arm = runs.arm(files + added)
            for each in replicates:
                finish(runner, arm, each, make_few_shot_run, arm.files, each.seed, skill + more)
    chosen = claims.chosen([], ["promptability"])
    rows = table.make_rows(chosen, runner, replicates)
    return {row.name.partition(".")[2]: row.verdict and row.verdict.status for row in rows}


def test_promptability(tmp_path):
    held = promptability(tmp_path / "a", AS_IN_THE_PAPER)
    assert held["mtl_tp_mtl_t_16"] == held["mtl_tp_deep_fomaml_deep_16"] == HELD
    assert held["deep_mtl_t"] == HELD
    assert held["t_16_below_0"] == NOT_HELD  # the made runs gain with shots
    other = promptability(tmp_path / "b", {"p3_mtl_t": 0.4, "p3_mtl_tp": 0.1})
    assert other["mtl_tp_mtl_t_16"] == NOT_HELD
    few = promptability(tmp_path / "c", {"p3_mtl_t": 0.2, "p3_mtl_tp": 0.2})
    assert few["mtl_tp_mtl_t_16"] == NOT_HELD and few["mtl_t_mtl_p_0"] is None
    figures = {claim.name: claim.figure for claim in papers.PAPERS["promptability"].claims}
    assert figures["mtl_tp_mtl_t_16"] == "+7.1, +3.5"
    assert figures["mtl_tp_deep_mtl_t_deep_16"] == "+4.8, +0.3"


def test_propositions(monkeypatch):
    def experiments():
        made = [(0.0, 70.0, 99.8), (0.0, 72.0, 99.9), (1.0, 71.0, 100.0)]
        return [
            {"teacher": (100, 100), "hard labels": (98, hard), "cocktail 0.5": (99, half),
             "cocktail 1": (100, soft)}
            for hard, half, soft in made
        ]  # fmt: skip

    monkeypatch.setattr(papers.theory, "_experiments", experiments)
    chosen = claims.chosen(["cocktails.proposition_1", "cocktails.proposition_2"], [])
    rows = table.make_rows(chosen, runs.Runner(Path("/nowhere")), runs.replicates(1))
    assert [row.verdict.status for row in rows] == [HELD, HELD]
    assert rows[0].command == "python benchmarks/claims.py --only cocktails.proposition_1"


def test_claims_are_complete():
    for paper in papers.PAPERS.values():
        assert len({each.name for each in paper.claims}) == len(paper.claims), paper.name
        for arm in paper.arms:
            assert len(arm.gin_files) == 1 + arm.files.count("+")
        for each in paper.claims:
            assert each.words and each.figure and each.source, each.name
            assert ARG_0 not in each.quantities or each.above.arm.files.startswith("p3_")
    arms = table.arms(papers.claims().values())
    assert len({arm.folder for arm in arms}) == len(arms)
    assert set(papers.IMPORTANT) <= set(papers.claims()) and len(papers.IMPORTANT) == 10
    for names in mini_world.COMPARISONS.values():
        for name in names:
            assert runs.arm(name).gin_files


def test_every_arm_has_a_config(tmp_path):
    runner = runs.Runner(tmp_path)
    for arm in table.arms(papers.claims().values()):
        flags = runner.command(arm, runs.Replicate())[3:]
        files = [flag.partition("=")[2] for flag in flags if flag.startswith("--gin_file=")]
        bindings = [flag.removeprefix("--gin.") for flag in flags if flag.startswith("--gin.")]
        assert gin_config.load(files, bindings, []).recipe.seed == 0, arm.name


def test_a_run_is_made_once(tmp_path, monkeypatch, capsys):
    started, codes = [], [1, 0, 0]

    def run(command, **_):
        started.append(command)
        return subprocess.CompletedProcess(command, codes.pop(0))

    monkeypatch.setattr(runs.subprocess, "run", run)
    arm, replicate = runs.arm("prefix_webnlg", PREFIX_LENGTH=1), runs.Replicate(1, "/models/two")
    runner = runs.Runner(tmp_path, {"": ["BATCH_SIZE=8"], "prefix_webnlg": ["LIGHT_TRAIN_STEPS=5"]})
    assert not runner.run(arm, replicate) and not runner.is_finished(arm, replicate)
    assert runner.run(arm, replicate) and runner.run(arm, replicate) and len(started) == 2
    assert started[0][3:] == [
        "--gin_file=gin_configs/prefix_webnlg.gin", "--gin.PREFIX_LENGTH=1",
        "--gin.INITIAL_CHECKPOINT_PATH='/models/two'",
        f"--gin.MODEL_DIR='{tmp_path}/prefix_webnlg,PREFIX_LENGTH=1_two_seed1'",
        "--gin.RANDOM_SEED=1", "--gin.BATCH_SIZE=8", "--gin.LIGHT_TRAIN_STEPS=5",
    ]  # fmt: skip
    made = runner.about(arm, replicate)["made"]
    monkeypatch.setattr(runs, "version", lambda: "another")
    assert runner.run(arm, replicate) and len(started) == 3  # the run itself checks its record
    assert runner.about(arm, replicate)["made"] == made
    out = capsys.readouterr().out
    assert "failed, see" in out and "prefix_webnlg,PREFIX_LENGTH=1 two_seed1: 0 s" in out


def test_command_line(tmp_path, capsys):
    output = ["--output", str(tmp_path)]
    for flags, sentence in (
        (["--only", "promot.forgeting"], "no claim 'promot.forgeting'. Did you mean 'promot.forg"),
        (["--papers", "promott"], "There is no paper 'promott'. Did you mean 'promot'?"),
        (["--seeds", "0"], "--seeds=0 must be from 1 to 100."),
        (["--jobs", "0"], "--jobs=0 must be at least 1."),
        (["--checkpoints", "/no/where"], "There is no checkpoint /no/where."),
    ):
        assert claims.main([*output, *flags]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    runner = runs.Runner(tmp_path / "runs")
    finish(runner, ONE.arm, runs.Replicate(), make_run, "full_rte", 0)
    assert (
        claims.main([*output, "--list", "--jobs", "1", "--only", "promot.keeps", "--seeds", "2"])
        == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        "promot_rte seed0: unknown", "full_rte seed0: finished", "promot_rte seed1: unknown",
        "full_rte seed1: 1.0 min",
        "4 runs, 3 left; the 1 whose arms have run before take about 1 minutes, 1 at a time.",
    ]  # fmt: skip


def test_checkpoints_need_names_of_their_own(tmp_path):
    for name in ("a/seed1", "b/seed1"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match="have the same name"):
        runs.replicates(1, [str(tmp_path / "a/seed1"), str(tmp_path / "b/seed1")])
    found = runs.replicates(2, ["asset:mini", str(tmp_path / "a/seed1")])
    assert [each.name for each in found] == ["seed0", "seed1_seed100", "seed1", "seed1_seed101"]
