"""Draw the pictures of docs/identifiability.md.

python docs/figures/identifiability.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from scipy.optimize import linear_sum_assignment

from scvi_sams.module import sparsest_rotation

FOLDER = Path(__file__).parent
BLUE, ORANGE = "#0072B2", "#D55E00"


def simulated_effects(n_perturbations: int, n_latent: int, seed: int) -> np.ndarray:
    """Sparse effects: every perturbation moves about a fifth of the mechanisms, at least one."""
    rng = np.random.default_rng(seed)
    masks = rng.random((n_perturbations, n_latent)) < 0.2
    masks[np.arange(n_perturbations), rng.integers(n_latent, size=n_perturbations)] = True
    return masks * rng.normal(scale=2, size=masks.shape)


def clouds() -> Figure:
    """Two mechanisms, four perturbations, in two coordinate systems that fit equally well."""
    rng = np.random.default_rng(0)
    shifts = {"control": (0, 0), "A": (4, 0), "B": (0, 4), "A+B": (4, 4)}
    angle = np.deg2rad(35)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    colours = ["#777777", BLUE, ORANGE, "#009E73"]
    figure, axes = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    titles = ("Axes of the mechanisms:\neach knock-out moves one", "Turned axes:\neach moves both")
    for ax, turn, title in zip(axes, (np.eye(2), rotation), titles, strict=True):
        for (name, shift), colour in zip(shifts.items(), colours, strict=True):
            cells = (rng.normal(size=(150, 2)) + shift) @ turn.T
            ax.scatter(*cells.T, s=5, color=colour, label=name, linewidths=0)
            if name in "AB":
                ax.annotate(
                    "",
                    xy=np.array(shift) @ turn.T,
                    xytext=(0, 0),
                    arrowprops={"arrowstyle": "->", "color": "black", "lw": 2},
                )
        ax.set(title=title, xlabel="latent 1", ylabel="latent 2", aspect="equal")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, markerscale=2, loc="outside lower center", ncols=4
    )
    return figure


def heatmaps() -> Figure:
    """The same effects on true axes, on turned axes, and on the sparsest axes found from these."""
    true = simulated_effects(40, 12, seed=1)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 12)))[0]
    noise = np.random.default_rng(3).normal(scale=0.1, size=true.shape)
    turned = true @ turn + noise
    found = _in_order_of(true, turned @ sparsest_rotation(torch.tensor(turned)).numpy())
    figure, axes = plt.subplots(1, 3, figsize=(7, 3.6), layout="constrained", sharey=True)
    titles = ("simulated mechanisms", "before the rotation", "after the rotation")
    for ax, effects, title in zip(axes, (true, turned, found), titles, strict=True):
        image = _heatmap(ax, effects, title)
    axes[0].set_ylabel("perturbation")
    figure.colorbar(image, ax=axes, label="effect", shrink=0.7)
    return figure


def _in_order_of(true: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Give dimensions, whose order and sign are arbitrary, those of the truth."""
    likeness = true.T @ found
    rows, columns = linear_sum_assignment(np.abs(likeness), maximize=True)
    return found[:, columns] * np.sign(likeness[rows, columns])


def _heatmap(ax: Axes, effects: np.ndarray, title: str) -> AxesImage:
    image = ax.imshow(effects, cmap="RdBu_r", vmin=-4, vmax=4, aspect="auto")
    ax.set(title=title, xlabel="latent dimension", xticks=[], yticks=[])
    return image


def main() -> None:
    """Write both pictures beside this file."""
    plt.style.use(FOLDER / "print.mplstyle")
    for draw in (clouds, heatmaps):
        draw().savefig(FOLDER / f"identifiability_{draw.__name__}.png")


if __name__ == "__main__":
    main()
