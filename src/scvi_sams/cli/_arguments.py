"""Arguments of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from scvi_sams._versions import __version__
from scvi_sams.interpretation._export import FORMATS
from scvi_sams.labels._presets import PRESETS

MODELS = ("SAMSVAE", "CPAVAE", "SVAEPlus", "ConditionalVAE")
OPTIONS = {
    "perturbation_key": "--perturbation",
    "control": "--control",
    "delimiter": "--delimiter",
    "preset": "--preset",
    "layer": "--layer",
    "batch_key": "--batch",
    "categorical_covariate_keys": "--covariate",
    "guide_key": "--guide",
    "context_key": "--context",
    "size_factor_key": "--size-factor",
    "perturbation_features": "--features",
    "n_latent": "--n-latent",
}
"""Options by the arguments of Python that they set."""
_EPILOG = """\
examples:
  scvi-sams fit screen.h5ad --perturbation gene --control NT --out results/
  scvi-sams fit screen.h5ad --perturbation gene --control 'NT*' --delimiter _ --layer counts \\
      --batch lane --guide sgRNA --out results/

files in the folder:
  summary.html   settings and results on one page
  tables/        hits, differential genes, masks, effects, programs and more, as csv (or xlsx)
  figures/       the figures of the page, as png
  model/         the model: scvi_sams.SAMSVAE.load("results/model", adata)
  results.h5ad   the screen with all results in obs, obsm, varm and uns
"""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and the help option, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help)\n")


def make_parser() -> OneLineParser:
    """All commands and their options."""
    parser = OneLineParser(
        prog="scvi-sams",
        description="SAMS-VAE for perturbation screens: what does each perturbation do to a cell?",
    )
    parser.add_argument("--version", action="version", version=f"scvi_sams {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    fit = commands.add_parser(
        "fit",
        help="train a model on a screen; write tables, figures and a summary",
        description="Train a model on a screen and write its results: tables, figures, the model,"
        " the annotated screen, and a summary page.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fit.add_argument("screen", type=Path, help="cells x genes: an .h5ad file, or a .zarr folder")
    fit.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where results are written"
    )
    _add_screen(fit.add_argument_group("screen (columns of obs)"))
    _add_model(fit.add_argument_group("model"))
    _add_output(fit.add_argument_group("output"))
    return parser


def _add_screen(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--perturbation",
        metavar="COLUMN",
        help="labels of cells, such as KLF1 or KLF1+MAP2K6 (default: perturbation)",
    )
    group.add_argument(
        "--control",
        nargs="+",
        metavar="LABEL",
        help="labels of control cells, a pattern such as 'NT*', or a column of true and false "
        "(default: control)",
    )
    group.add_argument(
        "--delimiter",
        metavar="TEXT",
        help="separator between the names of a combination (default: +); '' to never split labels",
    )
    group.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="labelling convention of a known collection or package, instead of these three",
    )
    group.add_argument(
        "--layer", metavar="NAME", help="layer with raw counts (default: X has them)"
    )
    group.add_argument("--batch", metavar="COLUMN", help="batch: lane, replicate or donor")
    group.add_argument(
        "--covariate",
        action="append",
        metavar="COLUMN",
        help="a further categorical covariate; may be repeated",
    )
    group.add_argument("--guide", metavar="COLUMN", help="guide of each cell")
    group.add_argument(
        "--context",
        metavar="COLUMN",
        help="cell type, donor or line, between which effects may differ",
    )
    group.add_argument(
        "--size-factor",
        metavar="COLUMN",
        help="size of each cell, if the genes are a panel (default: the sum of its counts)",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", choices=MODELS, default="SAMSVAE", help="(default: SAMSVAE)")
    group.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help="prior knowledge of perturbations: gene sets (.gmt) or vectors (.csv, .tsv, .npz, "
        ".h5ad, .parquet); SAMSVAE only",
    )
    group.add_argument(
        "--n-latent",
        type=_whole(1),
        metavar="N",
        help="latent dimensions; 20 are enough for a few dozen perturbations (default: 50)",
    )
    group.add_argument(
        "--max-epochs",
        type=_whole(1),
        metavar="N",
        help="passes over the cells (default: held-out cells decide)",
    )
    group.add_argument(
        "--seed", type=_whole(0), default=0, metavar="N", help="random seed (default: 0)"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fdr",
        type=_share,
        default=0.05,
        metavar="RATE",
        help="false discovery rate of calls (default: 0.05)",
    )
    group.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["csv"],
        help="format of tables; xlsx requires openpyxl (default: csv)",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace the results of an earlier run"
    )
    group.add_argument(
        "--quiet",
        action="store_true",
        help="no progress and no notes, only warnings and errors",
    )


def _whole(at_least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = at_least - 1
        if value < at_least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {at_least}, not {text!r}"
            )
        return value

    return parse


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, not {text!r}")
    return value
