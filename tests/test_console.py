import io
import re
import subprocess
import sys

import pytest

from robust_ft import console


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def shared():
    """Restores the shared console after a test that replaces it."""
    before = console.get()
    yield
    console._shared = before


def make(**options):
    file, clock = io.StringIO(), Clock()
    return console.Console(file=file, clock=clock, **options), file, clock


def run_steps(printer, clock, steps, seconds=1.0, **options):
    with printer.progress("prompt", total=steps, **options) as progress:
        for step in range(1, steps + 1):
            clock.now += seconds
            progress.update(step, examples=32, loss=1 / step)


def test_plain_lines_every_interval():
    printer, file, clock = make()
    run_steps(printer, clock, 35)
    out = file.getvalue().splitlines()
    assert [re.search(r"(\d+)/35", line).group(1) for line in out[:-1]] == ["10", "20", "30", "35"]
    assert out[1] == "[prompt] 20/35 steps  loss 0.05  1 steps/s  32 examples/s  0:15 left"
    assert out[-1] == "[prompt] 35 steps in 0:35"


def test_plain_lines_every_n_steps():
    printer, file, clock = make()
    run_steps(printer, clock, 6, seconds=0.01, every=3)
    assert len(file.getvalue().splitlines()) == 3


def test_rate_forgets_compilation():
    printer, file, clock = make()
    with printer.progress("full", total=200, every=200) as progress:
        clock.now += 9.0
        progress.update(1)
        for step in range(2, 201):
            clock.now += 0.01
            progress.update(step)
    assert "100 steps/s  0:00 left" in file.getvalue().splitlines()[-2]


def test_resumed_progress_counts_from_where_it_was():
    printer, file, clock = make()
    with printer.progress("full", total=120, initial=100) as progress:
        clock.now += 10
        progress.update(110)
    assert "110/120 steps  1 steps/s  0:10 left" in file.getvalue()


def test_a_failing_stage_does_not_claim_its_end():
    printer, file, _ = make()
    with pytest.raises(KeyError), printer.progress("full", total=3) as progress:
        progress.update(1)
        raise KeyError
    assert " in " not in file.getvalue() and "1/3" in file.getvalue()


def test_a_terminal_gets_one_line(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    printer = console.Console(file=Terminal(), width=120, clock=(clock := Clock()))
    run_steps(printer, clock, 30)
    out = printer._file.getvalue()
    assert "\x1b[" in out and "30/30" in out and "loss 0.0333" in out and "0:00 left" in out
    assert out.rstrip().endswith("[prompt] 30 steps in 0:30")


def test_banner_lines_up():
    printer, file, _ = make()
    printer.banner("robust_ft: promot_rte", {"model": "mini", "parameters": "482,464 [f32]"})
    assert file.getvalue() == (
        "robust_ft: promot_rte\n  model       mini\n  parameters  482,464 [f32]\n"
    )


def test_table_holds_every_cell_and_no_markup():
    printer, file, _ = make()
    printer.print_table(
        "Results [test]", ["method", "acc"], [["[red]full", 90.04], ["promot", "–"]], caption="n=2"
    )
    out = file.getvalue()
    assert "Results [test]" in out and "[red]full" in out and " 90.0" in out and "n=2" in out
    assert re.search(r"promot +–", out)


def test_disabled_prints_nothing():
    printer, file, clock = make(enabled=False)
    run_steps(printer, clock, 30)
    printer.print("x")
    printer.banner("x", {"a": 1})
    printer.print_table("x", ["a"], [[1]])
    assert file.getvalue() == ""


def test_shared_console(shared):
    file = io.StringIO()
    console.configure(file=file)
    console.print_line("one")
    console.configure(enabled=False, file=file)
    console.print_line("two")
    console.banner("two", {})
    assert file.getvalue() == "one\n"


def test_long_lines_are_not_broken():
    printer, file, _ = make(width=20)
    printer.print("word " * 20)
    assert file.getvalue().count("\n") == 1


@pytest.mark.parametrize("seconds,text", [(0, "0:00"), (61.4, "1:01"), (3661, "1:01:01")])
def test_duration(seconds, text):
    assert console.duration(seconds) == text


def test_importing_is_light():
    code = "import sys, robust_ft.console\nassert not {'rich', 'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
