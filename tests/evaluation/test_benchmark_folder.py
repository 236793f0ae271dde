"""Finished fits are kept, found again, and whole."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from evaluation.benchmark_builders import LOG, PairSplit, additive, logged, small_screen
from scvi_sams import evaluation


@pytest.fixture(scope="module")
def screen():
    return small_screen()


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    monkeypatch.setenv(LOG, str(path))
    return path


def run(screen, folder, **changes):
    arguments = {
        "methods": {"logged": logged},
        "split": PairSplit(screen),
        "seeds": (0, 1),
        "modes": ("perturbench",),
        "progress_bar": False,
    }
    return evaluation.benchmark(screen, folder=folder, **(arguments | changes))


def test_a_killed_run_is_taken_up_where_it_stopped(screen, log, tmp_path):
    folder = tmp_path / "kept"
    tests = Path(__file__).parents[1]
    code = "import sys; from evaluation.benchmark_builders import *; run_until_killed(sys.argv[1])"
    killed = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path[1:]])},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert log.read_text().split() == ["0", "1"]
    assert list(folder.glob("fits/.partial-*"))

    result = run(screen, folder)
    assert log.read_text().split() == ["0", "1", "1"]
    assert not list(folder.glob("**/.partial-*"))
    kept = result.runs.set_index(["method", "seed"])["from_folder"]
    assert kept[("logged", 0)]
    assert not kept[("logged", 1)]
    pd.testing.assert_frame_equal(result.scores, run(screen, None).scores)

    again = run(screen, folder)
    assert again.runs["from_folder"].all()
    pd.testing.assert_frame_equal(again.scores, result.scores)


def test_only_what_changed_is_fitted_again(screen, log, tmp_path):
    def fits(**changes):
        log.write_text("")
        run(screen, tmp_path / "kept", **changes)
        return log.read_text().split()

    once = {"seeds": (0,)}
    assert fits(**once) == ["0"]
    assert fits(**once, modes=("systema",)) == []
    assert fits(**once, target_genes={"P001": "gene_0001"}) == []
    assert fits(seeds=(0, 1)) == ["1"]
    assert fits(**once, versions={"logged": "2"}) == ["0"]
    assert fits(**once, target_sum=1e4) == ["0"]
    fewer = screen[:, :40].copy()
    log.write_text("")
    run(fewer, tmp_path / "kept", **once)
    assert log.read_text().split() == ["0"]


def test_other_modes_are_scored_from_kept_predictions(screen, log, tmp_path):
    run(screen, tmp_path, seeds=(0,))
    kept = run(screen, tmp_path, seeds=(0,), modes=("systema", "sams"))
    fresh = run(screen, None, seeds=(0,), modes=("systema", "sams"))
    pd.testing.assert_frame_equal(kept.scores, fresh.scores)


def test_settings_of_a_baseline_count(screen, tmp_path):
    def kept(alpha):
        result = run(
            screen,
            tmp_path,
            seeds=(0,),
            methods={"ridge": evaluation.PCARidge(n_components=5, alpha=alpha)},
        )
        return result.runs.set_index("method")["from_folder"]["ridge"]

    assert [kept(alpha) for alpha in (1.0, 2.0, 1.0)] == [False, False, True]


def test_a_fit_that_failed_is_tried_again(screen, tmp_path):
    calls = []

    def fails_once(train, perturbations):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("disk full")
        return additive(train, perturbations)

    runs = [
        run(screen, tmp_path, seeds=(0,), methods={"m": fails_once}).runs.set_index("method")
        for _ in range(3)
    ]
    assert [r.loc["m", "status"] for r in runs] == ["failed", "ok", "ok"]
    assert len(calls) == 2
