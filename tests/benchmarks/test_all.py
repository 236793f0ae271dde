"""Benchmarks at a small size: all scripts are listed, ratios compared, failures seen."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
NO_BENCHMARKS = {"all", "_common"}


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("all")


@pytest.fixture
def script(tmp_path):
    """Write a script that prints or fails."""

    def write(text):
        file = tmp_path / "script.py"
        file.write_text(text)
        return file

    return write


def test_every_script_is_listed(module):
    scripts = {file.stem for file in FOLDER.glob("*.py")} - NO_BENCHMARKS
    assert set(module.BENCHMARKS) == scripts | {"paper/run"}


def test_expected_ratios_are_of_scripts_that_print_them(module):
    assert module.EXPECTED
    for name, ratios in module.EXPECTED.items():
        assert "print_ratio" in (FOLDER / f"{name}.py").read_text()
        for expected in ratios.values():
            assert 0 < expected["tolerance"] < 1
            assert expected["section"] in (FOLDER / "RECORD.md").read_text()


@pytest.mark.parametrize(
    ("ratio", "verdict", "is_good"),
    [
        ("1.51", "ABOVE THE RECORD", False),
        ("1.49", "as recorded", True),
        ("0.76", "as recorded", True),
        ("0.74", "below the record", True),
    ],
)
def test_a_ratio_fails_above_the_record_and_its_tolerance(
    module, monkeypatch, ratio, verdict, is_good
):
    expected = {"a to b": {"recorded": [1.2, 1.0], "tolerance": 0.25}}
    monkeypatch.setattr(module, "EXPECTED", {"script": expected})
    printed = f"a table\nratio of a to b: {ratio} (0.10-9.00)\n"
    lines, found = module.compared("script", printed)
    assert lines == [f"ratio of a to b: {ratio}, recorded 1.0-1.2: {verdict}"]
    assert found is is_good


def test_a_ratio_that_is_not_printed_fails(module, monkeypatch):
    expected = {"a to b": {"recorded": [1.0], "tolerance": 0.2}}
    monkeypatch.setattr(module, "EXPECTED", {"script": expected})
    assert module.compared("script", "ratio of b to a: 1.00 (1.00-1.00)")[1] is False
    assert module.compared("another", "") == ([], True)


def test_ratios_are_read_as_they_are_printed(module, capsys):
    importlib.import_module("_common").print_ratio("a, x to b", [1.0, 3.0, 1.5])
    printed = capsys.readouterr().out
    assert printed == "ratio of a, x to b: 1.50 (1.00-3.00)\n"
    assert module.RATIO.findall(printed) == [("a, x to b", "1.50")]


def test_outcomes_of_scripts(module, script, tmp_path):
    good = module.run(script("import sys; print(sys.argv[1:])"), ["a b"], tmp_path, 60)
    assert (good.status, good.printed) == (0, "['a b']\n")
    assert module.report("script", good, 60, 5).endswith(" s, ok")
    bad = module.run(script("raise ValueError('no')"), [], tmp_path, 60)
    assert bad.status == 1
    assert "ValueError: no" in bad.errors
    assert module.report("script", bad, 60, 5).endswith("FAILED: exit status 1")
    endless = module.run(script("while True: pass"), [], tmp_path, 0.5)
    assert endless.status is None
    assert module.report("script", endless, 0.5, 5).endswith("FAILED: past 0 s")


def test_exit_status_and_scripts_that_are_skipped(module, script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.delenv("SCVI_SAMS_DATA_DIR", raising=False)
    benchmarks = {"script": module.Benchmark(), "real": module.Benchmark(needs="data")}
    monkeypatch.setattr(module, "BENCHMARKS", benchmarks)
    monkeypatch.setattr(module, "print_conditions", lambda: None)
    monkeypatch.setattr(sys, "argv", ["all.py", "--quick"])
    script("print(1)")
    assert module.main() == 0
    assert "skipped: needs real screens: set SCVI_SAMS_DATA_DIR" in capsys.readouterr().out
    script("raise SystemExit(3)")
    assert module.main() == 1
