"""The command line as a user meets it: a process, its files, its messages and its status."""

import html
import logging
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi

from scvi_sams import SAMSVAE, __version__
from scvi_sams.cli._command import main
from scvi_sams.datasets import simulate_screen

ROOT = Path(__file__).parents[2]
QUICK = ("--max-epochs", "3", "--n-latent", "4")


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """A small screen with labels, controls and counts under other names than the default ones."""
    adata = simulate_screen(
        n_genes=40, n_controls=80, n_perturbations=4, cells_per_perturbation=40,
        n_combinations=2, cells_per_combination=20, n_latent=3, mask_probability=0.5,
        guides_per_perturbation=2, n_cell_types=2,
    )  # fmt: skip
    adata.var_names = ["P001", *adata.var_names[1:]]
    adata.obs["gene"] = adata.obs.pop("perturbation").astype(str).replace("control", "NT")
    adata.obs["lane"] = np.where(np.arange(adata.n_obs) % 2, "a", "b")
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    adata.uns.clear()
    path = tmp_path_factory.mktemp("screen") / "my screen.h5ad"
    adata.write_h5ad(path)
    return path


def described(screen):
    return ["fit", str(screen), "--perturbation", "gene", "--control", "NT", "--layer", "counts"]


def process(*arguments):
    command = [sys.executable, "-m", "scvi_sams", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def finished(screen, tmp_path_factory):
    """Fit in a process of its own."""
    folder = tmp_path_factory.mktemp("run") / "results"
    options = ("--batch", "lane", "--guide", "guide", "--seed", "3", "--out", folder)
    done = process(*described(screen), *options, *QUICK)
    assert done.returncode == 0, done.stderr
    return done, folder


class Page(HTMLParser):
    """Texts of headings and cells, links, and tags that are open at the end."""

    VOID = ("meta", "br", "img", "path", "use", "rect", "image")

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.headings, self.links, self.ids, self.open, self.rows = [], [], set(), [], []
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids.add(attributes.get("id"))
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)
        if self.open[-1:] == ["td"]:
            self.rows[-1].append(data)


def test_it_tells_each_step_and_where_the_summary_is(finished):
    done, folder = finished
    assert done.stdout == f"Wrote {folder / 'summary.html'}\n"
    steps = re.findall(r"\[(\d)/5\]", done.stderr)
    assert steps == list("12345")
    assert "Traceback" not in done.stderr


def test_everything_that_help_names_is_written(finished):
    _, folder = finished
    assert {path.name for path in folder.iterdir()} == {
        "summary.html", "tables", "figures", "model", "results.h5ad",
    }  # fmt: skip
    assert {"hits.csv", "masks.csv", "guides.csv", "knockdown.csv", "settings.csv"} <= {
        path.name for path in (folder / "tables").iterdir()
    }
    for figure in (folder / "figures").iterdir():
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert figure.stat().st_size > 5000
    assert {"masks.png", "latent.png", "training.png", "volcanoes.png"} <= {
        path.name for path in (folder / "figures").iterdir()
    }


def test_the_screen_holds_the_results_and_its_own_data(finished, screen):
    _, folder = finished
    before, after = ad.read_h5ad(screen), ad.read_h5ad(folder / "results.h5ad")
    assert (after.layers["counts"] != before.layers["counts"]).nnz == 0
    assert (after.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(after.obs[before.obs.columns], before.obs)
    hits = pd.read_csv(folder / "tables" / "hits.csv", index_col="perturbation")
    np.testing.assert_allclose(after.uns["sams_hits"]["effect_norm"], hits["effect_norm"])
    assert {"sams_masks", "sams_effects", "sams_q_values", "sams_ate", "sams_tests"} <= set(
        after.uns
    )
    assert after.obsm["X_sams"].shape == after.obsm["X_sams_perturbed"].shape == (before.n_obs, 4)


def test_the_saved_model_is_the_one_that_was_reported(finished, screen):
    _, folder = finished
    model = SAMSVAE.load(folder / "model", adata=ad.read_h5ad(screen))
    masks = pd.read_csv(folder / "tables" / "masks.csv", index_col="perturbation")
    np.testing.assert_allclose(model.get_perturbation_masks(), masks, rtol=1e-5)
    record = model.provenance
    assert record["setup"]["batch_key"] == "lane"
    assert record["setup"]["layer"] == "counts"
    assert record["trainings"][0]["seed"] == 3
    assert record["trainings"][0]["n_epochs"] == 3


def test_the_page_is_whole_and_refers_to_nothing_outside_itself(finished):
    page = Page(finished[1] / "summary.html")
    assert page.open == []
    assert all(link.startswith(("#", "data:")) for link in page.links)
    sections = {link[1:] for link in page.links if link.startswith("#") and link[1:] in page.ids}
    assert {"what-was-run", "warnings", "perturbations", "files"} <= sections
    assert not re.search(r"(?<!data:)https?:|@import", page.text)
    assert page.headings[0] == "What was run"
    assert {"Target genes", "Latent mechanisms", "Guides", "Cells"} <= set(page.headings)
    assert "Contexts" not in page.headings
    assert page.text.count("<svg") >= 4


def test_the_page_says_what_was_run_and_found(finished):
    _, folder = finished
    page = Page(folder / "summary.html")
    hits = pd.read_csv(folder / "tables" / "hits.csv", index_col="perturbation")
    listed = [row[0] for row in page.rows if row and row[0] in hits.index]
    assert listed[:4] == hits.index.tolist()
    assert f"{hits['is_hit'].sum()} of 4 perturbations are hits" in page.text
    assert "--perturbation gene --control NT" in page.text
    assert "my screen.h5ad" in page.text
    # Thirty-six training cells carry each alone.
    assert re.search(r"<li>\d perturbations? ha\w+ fewer than 50 training cells", page.text)
    assert "All planned epochs were trained." in page.text


def test_an_error_is_one_line_with_status_two(screen, tmp_path):
    out = tmp_path / "out"
    done = process("fit", screen, "--perturbation", "gene", "--control", "none", "--out", out)
    assert done.returncode == 2
    assert done.stdout == ""
    *_, last = done.stderr.splitlines()
    assert last.startswith("scvi-sams fit: error: No control cell was found")
    assert "Traceback" not in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--perturbation", "guilde"], "adata.obs has no 'guilde'"),
        (["--layer", "raw"], "'raw'"),
        (["--features", "missing.gmt"], "'missing.gmt' cannot be read"),
        (["--features", "x.csv", "--model", "CPAVAE"], "--features are for SAMSVAE"),
        (["--context", "gene"], "gene"),
        (["--control", "none"], "of the control cells as --control."),
    ],
    ids=["column", "layer", "file", "model", "context", "option"],
)
def test_what_is_wrong_is_named(screen, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    status = main([*described(screen), "--quiet", "--out", str(out), *QUICK, *options])
    written = capsys.readouterr()
    assert status == 2
    assert written.out == ""
    line = written.err.strip().splitlines()[-1]
    assert line.startswith("scvi-sams fit: error: ")
    assert message in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["fit"], "screen"),
        (["fit", "a.h5ad"], "--out"),
        (["fit", "a.h5ad", "--out", "b", "--max-epochs", "0"], "at least 1, not '0'"),
        (["fit", "a.h5ad", "--out", "b", "--fdr", "5"], "between 0 and 1, not '5'"),
        (["fit", "a.h5ad", "--out", "b", "--model", "VAE"], "invalid choice: 'VAE'"),
        (["fit", "a.h5ad", "--out", "b", "--epochs", "5"], "unrecognized arguments: --epochs"),
    ],
    ids=["command", "screen", "folder", "epochs", "rate", "model", "option"],
)
def test_a_command_that_cannot_be_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "--help" in line


def test_files_that_are_no_screens_are_named(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no screen")
    for path, message in ((tmp_path / "none.h5ad", "no file"), (tmp_path / "notes.txt", "neither")):
        assert main(["fit", str(path), "--out", str(tmp_path / "out"), "--quiet"]) == 2
        assert message in capsys.readouterr().err


def test_results_are_replaced_only_if_asked_for(screen, tmp_path, capsys):
    (tmp_path / "guides.txt").write_text("mine")
    given = [*described(screen), "--quiet", "--out", str(tmp_path), *QUICK]
    assert main(given) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["guides.txt"]
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "contexts.png").write_text("of an earlier run")
    assert main([*given, "--overwrite"]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "guides.txt").read_text() == "mine"
    assert not (tmp_path / "figures" / "contexts.png").exists()


def test_other_models_contexts_and_features(screen, tmp_path, capsys):
    """A conditional VAE has neither masks nor programs; contexts have a table and a section."""
    plain = tmp_path / "conditional"
    given = [*described(screen), "--quiet", "--max-epochs", "2"]
    assert main([*given, "--model", "ConditionalVAE", "--out", str(plain)]) == 0
    tables = {path.stem for path in (plain / "tables").iterdir()}
    assert {"masks", "programs", "effects_mean"}.isdisjoint(tables)
    assert "Latent mechanisms" not in Page(plain / "summary.html").headings
    features = pd.DataFrame(
        np.random.default_rng(0).normal(size=(6, 3)),
        index=["P001", "P002", "P003", "P004", "NEW1", "NEW2"],
    )
    features.to_csv(tmp_path / "known.csv")
    informed = tmp_path / "informed"
    options = ["--context", "cell_type", "--features", str(tmp_path / "known.csv")]
    assert main([*given, *options, "--n-latent", "4", "--out", str(informed)]) == 0
    contexts = pd.read_csv(informed / "tables" / "contexts.csv")
    assert contexts["context"].unique().tolist() == ["type_1", "type_2"]
    assert "2, with features" in (informed / "summary.html").read_text(encoding="utf-8")


def test_warnings_name_options(screen, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, "scvi.sams")  # scripts of benchmarks silence it
    adata = ad.read_h5ad(screen)
    adata.obs["total_counts"] = 50.0 * np.asarray(adata.layers["counts"].sum(axis=1)).ravel()
    adata.write_h5ad(tmp_path / "panel.h5ad")
    out = tmp_path / "out"
    given = ["fit", str(tmp_path / "panel.h5ad"), *described(screen)[2:], "--max-epochs", "1"]
    assert main([*given, "--n-latent", "4", "--quiet", "--out", str(out)]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "Register the total counts: --size-factor 'total_counts'." in shown
    page = html.unescape((out / "summary.html").read_text(encoding="utf-8"))
    assert "Register the total counts: --size-factor 'total_counts'." in page


def test_the_state_of_the_process_is_as_before(screen, tmp_path):
    logger = logging.getLogger("scvi")
    before = logger.handlers[:], logger.level, scvi.settings.seed
    main([*described(screen), "--quiet", "--out", str(tmp_path / "out"), "--layer", "raw"])
    assert (logger.handlers, logger.level, scvi.settings.seed) == before


def test_version_and_script(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"scvi_sams {__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["scvi-sams"].partition(":")
    assert getattr(import_module(module), name) is main


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    for option in (
        "--perturbation", "--control", "--out", "--layer", "--batch", "--guide", "--context",
        "--features", "--max-epochs", "--seed", "--model", "--quiet",
    ):  # fmt: skip
        assert option in text
    assert "summary.html" in text
    assert "scvi-sams fit screen.h5ad --perturbation gene --control NT --out results/" in text
