"""Label conventions of well-known collections and packages: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from scvi_sams._checks import check_choice


@dataclass(frozen=True)
class Preset:
    """The arguments of ``setup_anndata`` that a convention sets."""

    perturbation_key: str
    control: str
    delimiter: str | None


PRESETS: Final = {
    "scperturb": Preset("perturbation", "control", "_"),
    "pertpy": Preset("perturbation", "control", "_"),
    "gears": Preset("condition", "ctrl", "+"),
    "perturbench": Preset("condition", "control", "+"),
    "state": Preset("gene", "non-targeting", None),
    "xatlas": Preset("gene_target", "Non-Targeting", "|"),
    "tahoe": Preset("drug", "DMSO_TF", None),
}


class Default(str):
    """A default that a preset replaces, distinguishable from the same text passed by a user."""

    __slots__ = ()


PERTURBATION_KEY = Default("perturbation")
CONTROL = Default("control")
DELIMITER = Default("+")


def with_preset(preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Replace defaults by the arguments of a preset; remaining defaults become plain text."""
    values: dict[str, Any] = {}
    if preset is not None:
        check_choice("preset", preset, list(PRESETS))
        values = asdict(PRESETS[preset])
    return {
        name: values.get(name, str(value)) if isinstance(value, Default) else value
        for name, value in given.items()
    }
