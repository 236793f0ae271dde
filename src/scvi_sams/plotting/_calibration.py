"""Whether inclusion probabilities mean what they say."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from scvi_sams._checks import check_axes
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.metrics._recovery import Calibration

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LARGEST_POINT = 120
_SMALLEST_POINT = 12


def mask_calibration(
    calibration: Calibration | Mapping[str, Calibration], *, ax: Axes | None = None
) -> Axes:
    """Reliability diagram: inclusion probability against the share of entries that are true.

    Probabilities that mean what they say lie on the diagonal; below it they promise too much.

    Parameters
    ----------
    calibration
        From :func:`~scvi_sams.evaluation.mask_calibration`, or several by name.
    ax
        Axes to draw on; ``None`` makes a figure.

    Returns
    -------
    The axes. A point is a bin, its area grows with the logarithm of the number of entries in it;
    the legend gives expected calibration errors.

    Examples
    --------
    >>> truth = adata.uns["simulation"]
    >>> calibration = scvi_sams.evaluation.mask_calibration(
    ...     model.get_perturbation_masks(),
    ...     pd.DataFrame(truth["true_masks"], index=truth["perturbations"]),
    ... )
    >>> ax = scvi_sams.pl.mask_calibration({"small screen": calibration})
    """
    check_axes(ax=ax)
    several = {"": calibration} if isinstance(calibration, Calibration) else calibration
    if not isinstance(several, Mapping) or not all(
        isinstance(one, Calibration) for one in several.values()
    ):
        raise InvalidArgumentError(
            "`calibration` must be what scvi_sams.evaluation.mask_calibration returned, or a dict "
            f"of several, not {type(calibration).__name__}."
        )
    if ax is None:
        _, ax = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    ax.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--", zorder=1)
    most = max((one.bins["n_entries"].max() for one in several.values()), default=1)
    for number, (name, one) in enumerate(several.items()):
        bins = one.bins[one.bins["n_entries"] > 0]
        colour = _COLOURS[number % len(_COLOURS)]
        label = f"{name}: " if name else ""
        area = np.log1p(bins["n_entries"]) / np.log1p(most) * _LARGEST_POINT
        ax.plot(bins["predicted"], bins["observed"], color=colour, linewidth=1)
        ax.scatter(
            bins["predicted"],
            bins["observed"],
            s=area.clip(lower=_SMALLEST_POINT),
            color=colour,
            edgecolors="white",
            zorder=3,
            label=f"{label}calibration error {one.expected_calibration_error:.3f}",
        )
    ax.set(
        xlabel="inclusion probability",
        ylabel="share of entries that are true",
        xlim=(-0.04, 1.04),
        ylim=(-0.04, 1.04),
        aspect="equal",
    )
    ax.legend(frameon=False, loc="best", fontsize="small")
    return ax
