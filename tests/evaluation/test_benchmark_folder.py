"""Finished fits are kept, found again, and whole."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from evaluation.benchmark_builders import LOG, PairSplit, additive, logged, small_screen
from scvi_sams import evaluation
from scvi_sams.benchmark import _store
from scvi_sams.exceptions import SavingError


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


# Damage ------------------------------------------------------------------------------------------


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_the_status(path):
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


DAMAGES = {
    "scores cut": ("scores-*.csv", cut_in_half),
    "scores changed": ("scores-*.csv", flip_a_bit),
    "record cut": ("status.json", cut_in_half),
    "record empty": ("status.json", lambda path: path.write_text("")),
    "record of a list": ("status.json", lambda path: path.write_text("[]")),
    "record changed": ("status.json", change_the_status),
    "record lost": ("status.json", Path.unlink),
    "prediction cut": ("prediction.h5ad", cut_in_half),
    "prediction changed": ("prediction.h5ad", flip_a_bit),
    "prediction lost": ("prediction.h5ad", Path.unlink),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_fit_is_made_again_and_told(screen, log, tmp_path, caplog, name, damage):
    caplog.set_level(logging.WARNING, logger="scvi.sams")
    first = run(screen, tmp_path, seeds=(0,))
    assert caplog.text == ""
    (place,) = tmp_path.glob("fits/logged-*")
    (path,) = place.glob(name)
    damage(path)
    again = run(screen, tmp_path, seeds=(0,))
    assert "damaged" in caplog.text
    assert place.name in caplog.text
    pd.testing.assert_frame_equal(again.scores, first.scores)
    assert log.read_text().split() == ["0"] * (1 if name.startswith("scores") else 2)
    caplog.clear()
    assert run(screen, tmp_path, seeds=(0,)).runs["from_folder"].all()
    assert caplog.text == ""


def test_a_fit_under_the_name_of_another_is_not_taken_for_it(screen, log, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="scvi.sams")
    run(screen, tmp_path)
    first, second = (next(tmp_path.glob(f"fits/logged-seed{seed}-*")) for seed in (0, 1))
    shutil.rmtree(first)
    shutil.copytree(second, first)
    runs = run(screen, tmp_path).runs.set_index(["method", "seed"])
    assert "it belongs to other data or settings" in caplog.text
    assert not runs.loc[("logged", 0), "from_folder"]
    assert runs.loc[("logged", 1), "from_folder"]


# A full disk -------------------------------------------------------------------------------------


def test_what_a_full_disk_cannot_keep_is_returned(screen, log, tmp_path, monkeypatch, caplog):
    def write_half(adata, path, **arguments):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left")

    caplog.set_level(logging.WARNING, logger="scvi.sams")
    with monkeypatch.context() as full_disk:
        full_disk.setattr(_store, "write_h5ad", write_half)
        result = run(screen, tmp_path, seeds=(0,))
    assert not list(tmp_path.glob("fits/*"))
    not_kept = result.runs.set_index("method").loc["logged"]
    assert not_kept["status"] == "ok"
    assert "not kept" in not_kept["message"]
    assert "no space left" in not_kept["message"].lower()
    assert "logged, seed 0: not kept" in caplog.text
    pd.testing.assert_frame_equal(result.scores, run(screen, None, seeds=(0,)).scores)


def test_scores_that_a_full_disk_cannot_keep_leave_the_fit(screen, log, tmp_path, monkeypatch):
    write = Path.write_bytes

    def write_half(path, content):
        write(path, content[:3])
        raise OSError(28, "No space left")

    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "write_bytes", write_half)
        result = run(screen, tmp_path, seeds=(0,))
    assert result.runs["message"].str.contains("not kept").sum() >= 3
    assert not list(tmp_path.glob("fits/*/*.csv")) + list(tmp_path.glob("fits/*/.partial*"))
    again = run(screen, tmp_path, seeds=(0,))
    assert again.runs.set_index("method").loc["logged", "from_folder"]
    pd.testing.assert_frame_equal(again.scores, result.scores)
    assert log.read_text().split() == ["0"]


def test_a_folder_that_cannot_be_written_to_is_an_error_before_anything_is_fitted(
    screen, log, tmp_path
):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SavingError, match="cannot be written"):
        run(screen, tmp_path / "file")
    assert not log.exists()


def test_a_table_or_split_that_cannot_be_written_leaves_the_earlier_one(
    screen, tmp_path, monkeypatch
):
    result, split = run(screen, None, seeds=(0,), methods=[]), PairSplit(screen)(0)
    table, saved = tmp_path / "scores.csv", tmp_path / "split.json"
    result.to_csv(table)
    split.save(saved)
    before = table.read_bytes(), saved.read_bytes()

    def write_half(path_or_frame, *arguments, **keywords):
        target = path_or_frame if isinstance(path_or_frame, Path) else arguments[0]
        with Path(target).open("w") as file:
            file.write("half")
        raise OSError(28, "No space left")

    monkeypatch.setattr(pd.DataFrame, "to_csv", write_half)
    monkeypatch.setattr(Path, "write_text", write_half)
    for write, path in ((result.to_csv, table), (split.save, saved)):
        with pytest.raises(SavingError, match="No space left"):
            write(path)
    assert (table.read_bytes(), saved.read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 2
