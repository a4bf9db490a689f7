import dataclasses
import json
import math
import re
import statistics
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
from report_runs import HELD_OUT_TASKS, make_run, row, write_samples

from robust_ft import console
from robust_ft.errors import UserError
from robust_ft.report import __main__ as command_line
from robust_ft.report import (
    comparisons,
    figure,
    groups,
    page,
    results,
    samples,
    table,
    tradeoff,
    verdicts,
    write_report,
)
from robust_ft.report.runs import load_run, load_runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    names = [(method, seed) for method in ("full_rte", "promot_rte") for seed in range(3)]
    return [make_run(base / f"{method}_{seed}", method, seed) for method, seed in names]


@pytest.fixture(scope="module")
def runs(folders):
    return load_runs(folders)


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    before = console.get()
    console.configure(enabled=False)
    report = write_report(folders, tmp_path_factory.mktemp("report") / "new")
    console._shared = before
    return report


def rendered(runs):
    compared = comparisons.make_comparisons(runs)
    return page.render(runs, results.make_table(runs), tradeoff.make_tradeoff(runs), compared)


def by_hand(folders, method, stage, task, metric, split="test"):
    values = []
    for folder in folders:
        if folder.name.startswith(method):
            entries = json.loads((folder / "summary.json").read_text())
            found = [e["value"] for e in entries if e["stage"] == stage and e["task"] == task
                     and e["metric"] == metric and e["split"] == split and e["step"]]  # fmt: skip
            values += found
    return values


def test_table_is_mean_and_sample_sd_over_seeds(folders, runs):
    made = results.make_table(runs)
    assert [(line.method, line.stage) for line in made.lines] == [
        ("pretrained", "pretrained"), ("full_rte", "full"),
        ("promot_rte", "prompt"), ("promot_rte", "model"),
    ]  # fmt: skip
    for line in made.lines[1:]:
        cell = line.cells[results.Column("held_out", 1, "norm_avg")]
        values = by_hand(folders, line.method, line.stage, "held_out", "norm_avg")
        assert len(values) == cell.seeds == 3
        assert cell.mean == pytest.approx(sum(values) / 3)
        assert cell.sd == pytest.approx(statistics.stdev(values))
        assert cell.split == "test"
    share = made.lines[1].cells[results.Column("held_out", 1, "format_share")]
    assert share.mean == pytest.approx(57, abs=1)  # a share of 0.57


def test_columns_are_target_aggregates_tasks(runs):
    names = [column.task for column in results.make_table(runs).columns]
    assert names == ["mini_rte", "held_out", "held_out", *HELD_OUT_TASKS]
    assert results.make_table(runs).columns[1].metric == "norm_avg"


def test_one_seed_has_no_sd(runs):
    made = results.make_table(runs[:1])
    assert [line.checkpoint for line in made.lines] == ["step 0", "full, step 150"]
    assert all(cell.sd is None for line in made.lines for cell in line.cells.values())
    assert "±" not in made.lines[1].cells[made.columns[0]].text()


def edited(tmp_path, change, method="full_rte"):
    folder = make_run(tmp_path / "run", method, 0)
    entries = change(json.loads((folder / "summary.json").read_text()))
    (folder / "summary.json").write_text(json.dumps(entries))
    return load_run(folder)


def test_different_pretrained_models_stay_apart(tmp_path, runs):
    def worse(entries):
        return [e | ({"value": 50.0} if e["step"] == 0 else {}) for e in entries]

    made = results.make_table([edited(tmp_path, worse), runs[3]])
    assert [line.method for line in made.lines if line.stage == "pretrained"] == [
        "full_rte", "promot_rte",
    ]  # fmt: skip


def test_a_validation_value_in_the_table_is_marked(tmp_path):
    def drop(entries):
        return [e for e in entries if e["step"] or e["split"] == "validation"]

    made = results.make_table([edited(tmp_path, drop)])
    assert made.lines[0].cells[made.columns[0]].text() == "0.1 †"
    assert "†" in table.markdown(made).split("\n\n")[1]


def test_selected_steps_of_seeds_may_differ(tmp_path, runs):
    def other(entries):
        return [e | ({"step": 100} if e["split"] == "test" and e["step"] else {}) for e in entries]

    (tmp_path / "a").mkdir()
    one = dataclasses.replace(edited(tmp_path / "a", other), selected={"full": 100})
    made = results.make_table([one, *runs[1:3]])
    assert made.lines[1].checkpoint == "full, step 100–150"
    curve = results.curves([one, *runs[1:3]], "target")[0]
    assert curve.selected is None


def test_curves_are_validation_means(folders, runs):
    found = {(c.method, c.stage): c for c in results.curves(runs, "norm_avg")}
    assert set(found) == {("full_rte", "full"), ("promot_rte", "prompt"), ("promot_rte", "model")}
    full = found["full_rte", "full"]
    assert full.steps == (0, 10, 25, 50, 100, 150) and full.selected == 150 and full.last
    assert not found["promot_rte", "prompt"].last
    values = by_hand(folders, "full_rte", "full", "held_out", "norm_avg", "validation")[4::5]
    assert full.mean[-1] == pytest.approx(sum(values) / 3)
    assert full.sd[-1] == pytest.approx(statistics.stdev(values))
    assert len(results.curves(runs, "loss")) == 3


def test_curves_keep_steps_common_to_all_seeds(tmp_path, runs):
    def fewer(entries):
        return [e for e in entries if e["step"] != 25]

    curve = results.curves([edited(tmp_path, fewer), *runs[1:3]], "target")[0]
    assert curve.steps == (0, 10, 50, 100, 150) and curve.seeds == 3


def test_one_shot_is_preferred(tmp_path):
    def four(entries):
        extra = [e | {"shots": 4, "value": 1.0} for e in entries if e["task"] == "held_out"]
        return extra + entries

    run = edited(tmp_path, four)
    assert results.held_out_column(run, "norm_avg").shots == 1
    assert {c.shots for c in results.make_table([run]).columns if c.task == "held_out"} == {1, 4}


@pytest.mark.parametrize(
    "before,after,word",
    [(17.5, 15.4, "loses"), (17.5, 20.1, "improves"), (98, 93, "keeps"), (0, 5, ""), (9, None, "")],
)
def test_verdict_words(before, after, word):
    assert verdicts.Verdict("m", "t", 0, 1, before, after).word == word


def test_headline(runs):
    found = verdicts.verdicts(runs)
    assert re.fullmatch(
        r"full_rte loses the other tasks \(98 → 4\d\); promot_rte keeps the other tasks "
        r"\(98 → 9\d\)", verdicts.headline(found)
    )  # fmt: skip
    assert verdicts.headline(found * 2) == "2 of 4 methods keep the other tasks"


@pytest.fixture(scope="module")
def switched_off(tmp_path_factory):
    """A run of full_rte and one of LoRA, whose held-out tasks were evaluated without it."""
    base = tmp_path_factory.mktemp("lora")
    folder = make_run(base / "lora_0", "full_rte", 0)
    entries = json.loads((folder / "summary.json").read_text())
    made = []
    for entry in entries:
        if entry["shots"] == 1 and entry["step"]:
            value = 0.9 if entry["metric"] == "format_share" else 2.0
            if entry["split"] == "test":
                made.append(entry | {"role": "kept", "value": value})
            pretrained = 0.0 if entry["metric"] == "format_share" else 98.0
            entry |= {"role": "held_out", "value": pretrained, "without": ["lora"]}
        made.append(entry)
    (folder / "summary.json").write_text(json.dumps(made))
    about = json.loads((folder / "run.json").read_text()) | {"name": "lora"}
    (folder / "run.json").write_text(json.dumps(about))
    write_samples(folder / "full", "mini_qa_1shot_kept-test", 150, "kept answer")
    return [folder, make_run(base / "full_0", "full_rte", 0)]


def test_what_an_analysis_is_without_says_nothing_of_held_out_tasks(tmp_path):
    folder = make_run(tmp_path / "full_0", "full_rte", 0)
    entries = json.loads((folder / "summary.json").read_text())
    last = entries[-1]
    analysis = {"task": "gradient_alignment_without_prompt", "role": "analysis", "shots": 0}
    analysis |= {"metric": "cosine", "value": 0.25, "without": ["prompt"]}
    (folder / "summary.json").write_text(json.dumps([*entries, last | analysis]))
    made = results.make_table(load_runs([folder]))
    assert made.columns[-1].analysis and made.lines[-1].text(made.columns[-1]).startswith("0.250")
    assert not any(line.without for line in made.lines)
    assert "held-out tasks evaluated" not in table.markdown(made)
    assert "| gradient alignment without prompt: cosine |" in table.markdown(made)


def test_a_method_that_is_switched_off_is_said_to_be_with_both_numbers(switched_off):
    runs = load_runs(switched_off)
    made = results.make_table(runs)
    lora, full = made.lines[1:]
    average = results.Column("held_out", 1, "norm_avg")
    assert lora.cells[average].mean == 98.0 and lora.text(average) == "98.0 (2.0)"
    assert lora.without == ("lora",) and full.without == ()
    assert not any(column.kept for column in made.columns)
    rows = table.markdown(made).splitlines()
    assert "| held-out tasks evaluated | – | without lora (with) | – |" in rows
    assert table.WITHOUT in table.markdown(made)
    assert "| held-out format share %, 1-shot | 0.0 | 0.0 (90.0) |" in table.markdown(made)
    found = verdicts.verdicts(runs)
    assert (found[0].without, found[0].others_kept) == (("lora",), 2.0)
    sentence = "lora keeps the other tasks, evaluated without lora"
    assert f"{sentence} (98 → 98; 2 with lora)" in verdicts.headline(found)
    assert sentence in verdicts.headline(found, numbers=False)
    many = verdicts.headline(found * 2)
    assert (
        many == "2 of 4 methods keep the other tasks, 2 of them evaluated without what they trained"
    )
    # Curves and samples are those of the headline number.
    (curve,) = results.curves(runs[:1], "norm_avg")
    assert set(curve.mean[1:]) == {98.0}
    assert not any("kept" in sample.task for sample in samples.samples(runs).rows)


def test_page_and_picture_say_what_is_switched_off(switched_off, tmp_path):
    runs = load_runs(switched_off)
    text = rendered(runs)
    for words in (
        "Other tasks, evaluated without lora", "Other tasks with lora",
        "keeps the other tasks, evaluated without lora", "98.0 (2.0)", "lora without lora",
    ):  # fmt: skip
        assert words in Page(text).text, words
    figure.save_picture(runs, tmp_path / "a.png")
    bars = figure._bars(runs, "norm_avg", figure.LIGHT)
    assert [(bar.name, bar.kept) for bar in bars] == [
        ("pretrained", False), ("lora without lora", False), ("with lora", True),
        ("full_rte", False),
    ]  # fmt: skip


def test_samples_stand_side_by_side(runs):
    found = samples.samples(runs)
    assert found.models == ("pretrained", "full_rte", "promot_rte")
    assert [sample.task for sample in found.rows] == ["mini_qa_1shot"] * 2 + ["mini_rte_0shot"] * 2
    assert found.rows[1].outputs == ("city1", "True", "city1")
    assert found.rows[1].target == "city1"


WANTED = ("the cat sat on a mat", "a dog")


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("the cat sat on a mat", [("the cat sat on a mat", "same")]),
        (
            "the big cat sat on the mat",
            [("the", "same"), ("big", "extra"), ("cat sat on", "same"), ("a", "missing"),
             ("the", "extra"), ("mat", "same")],
        ),
        ("a dog ran", [("a dog", "same"), ("ran", "extra")]),
        ("True", [("True", "extra")]),  # all of it, and not the whole reference struck out
        ("", []),
    ],
)  # fmt: skip
def test_words_that_differ_from_the_nearest_reference(output, found):
    assert samples.pieces(output, WANTED) == found


def test_differences_are_marked_and_escaped():
    sample = samples.Sample("a_b", "<i>|x|", ("a <b> c",), ("a <b> c", "a *d* c", None))
    text = table.samples_markdown(samples.Samples(("x", "y", "z"), (sample,)))
    assert text.splitlines()[4] == (
        r"| a\_b | &lt;i&gt;\|x\| | a &lt;b&gt; c | a &lt;b&gt; c ✓ "
        r"| a ~~&lt;b&gt;~~ **\*d\*** c ✗ | – |"
    )
    html = page._output("y", "a <d> c", sample)
    assert "a <del>&lt;b&gt;</del> <mark>&lt;d&gt;</mark> c" in html and "✗" in html
    assert page._output("x", "a <b> c", sample).count("<mark>") == 0


def test_samples_know_all_references_and_leave_analyses_out(tmp_path):
    folder = make_run(tmp_path / "run", "full_rte", 0)
    entries = json.loads((folder / "summary.json").read_text())
    entries.append(row("full", 150, "prompt_neighbors", "shared", 0.0) | {"role": "analysis"})
    (folder / "summary.json").write_text(json.dumps(entries))
    for step in (0, 150):
        write_samples(folder / "full", "prompt_neighbors-none", step)
    file = folder / "full" / "inference_eval" / "mini_qa_1shot-000150.jsonl"
    lines = [json.loads(line) | {"references": ["b", "c"]} for line in file.open()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "full" / "inference_eval" / "mini_qa_1shot-000000.jsonl").unlink()
    found = samples.samples([load_run(folder)]).rows
    assert {sample.task for sample in found} == {"mini_rte_0shot"}  # the other has one model now
    write_samples(folder / "full", "mini_qa_1shot", 0)
    before = folder / "full" / "inference_eval" / "mini_qa_1shot-000000.jsonl"
    before.write_text(file.read_text())
    found = samples.samples([load_run(folder)]).rows
    assert found[0].references == ("b", "c") and found[0].target == "b | c"


def test_markdown_has_one_row_a_task_and_one_column_a_model(runs):
    made = results.make_table(runs)
    lines = [line for line in table.markdown(made).splitlines() if line.startswith("|")]
    assert len(lines) == 3 + len(made.columns) and {line.count("|") for line in lines} == {1 + 5}
    assert "| full_rte<br>full, step 150 |" in lines[0] and lines[2].startswith("| seeds | ")
    accuracy = lines[3].split(" | ")
    assert accuracy[0] == "| mini_rte accuracy" and accuracy[2].startswith("90.")
    assert "±" in accuracy[2]


class Page(HTMLParser):
    """Collects what a page would load, its ids and its text; checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.ids, self.open, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "path", "use", "rect", "circle"):
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            outside = name in ("src", "href", "xlink:href", "srcset", "data", "action")
            if tag in ("script", "link", "iframe") or (outside and not value.startswith("#")):
                self.loads.append((tag, value))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in ("path", "use", "rect", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_self_contained(written):
    text = written.html.read_text()
    parsed = Page(text)
    assert parsed.loads == [] and "@import" not in text and "http" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.open == []
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "MODEL = '<mini>'" in parsed.text  # escaped in the source
    assert "full_rte loses the other tasks" in parsed.text
    assert text.count("<svg") == 6
    assert not re.search(r"#01020\d", text)  # every stand-in colour became the page's


def test_picture_is_a_png(written):
    from matplotlib.image import imread

    height, width = imread(written.png).shape[:2]
    assert (width, height) == (1950, 1260)


def test_report_without_curves_samples_or_held_out_tasks(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    about = {"name": "a<b", "seed": 1, "target": "mini_rte", "stages": [{"name": "full"}]}
    (folder / "run.json").write_text(json.dumps(about))
    rows = [row("full", 5, "mini_rte", "accuracy", 50.0)]
    (folder / "summary.json").write_text(json.dumps(rows))
    (folder / "full").mkdir()
    (folder / "full" / "outcome.json").write_text('{"step": 5}')
    run = load_run(folder)
    text = rendered([run])
    assert "a&lt;b" in text and "a<b" not in text and text.count("<svg") == 1
    figure.save_picture([run], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_values_that_are_not_finite(tmp_path):
    def broken(entries):
        return [e | ({"value": None} if e["step"] == 150 else {}) for e in entries]

    run = edited(tmp_path, broken)
    assert math.isnan(run.rows[-1].value)
    assert results.curves([run], "target")[0].steps[-1] == 100
    rendered([run])
    figure.save_picture([run], tmp_path / "a.png")


def test_mistakes_are_one_sentence(tmp_path, folders):
    good = make_run(tmp_path / "promot_0", "promot_rte", 0)
    with pytest.raises(UserError, match=r"no folder .*promt_0\. Did you mean 'promot_0'\?"):
        load_run(tmp_path / "promt_0")
    with pytest.raises(UserError, match=r"is not a run: .*Did you mean '.*promot_0'\?"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="promot_rte with seed 0"):
        groups.by_settings(load_runs([good, good]))
    rows = json.loads((good / "summary.json").read_text())
    for content, message in [
        ("[", "is not JSON: .* in line 1"),
        ("{}", "does not hold a list"),
        (json.dumps([{"stage": "model"}]), "Result 1 in .* has no 'value'"),
        (json.dumps([rows[0] | {"value": "x"}]), "Result 1 in .* cannot be understood"),
        (json.dumps([rows[0] | {"stage": "promt"}]), "'promt', .* Did you mean 'prompt'"),
    ]:
        (good / "summary.json").write_text(content)
        with pytest.raises(UserError, match=message):
            load_run(good)
    (good / "summary.json").unlink()
    with pytest.raises(UserError, match=r"has no summary\.json"):
        load_run(good)
    (good / "run.json").write_text('{"name": "a", "targt": "t"}')
    (good / "summary.json").write_text("[]")
    with pytest.raises(UserError, match=r"has no 'target'\. Did you mean 'targt'"):
        load_run(good)


def test_command_line(tmp_path, folders, capsys):
    assert command_line.main([str(folders[0]), f"--output={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "full_rte" in out and str(tmp_path / "out" / "report.html") in out
    assert command_line.main([str(tmp_path / "nothing"), "--output=x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("There is no folder") and error.count("\n") == 1
    with pytest.raises(SystemExit) as exit_info:
        command_line.main(["a", "b"])
    assert exit_info.value.code == 2


def test_help_is_quick_and_light():
    took = []
    for _ in range(3):  # the best of three, since other programs may hold the machine up
        start = time.monotonic()
        command = [sys.executable, "-m", "robust_ft.report", "--help"]
        subprocess.run(command, check=True, capture_output=True)
        took.append(time.monotonic() - start)
    code = (
        "import sys, robust_ft.report, robust_ft.report.__main__, robust_ft.report.page\n"
        "assert not {'jax', 'tensorflow', 'matplotlib', 'rich', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert min(took) < 1.0
