"""Fingerprints of molecules."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from scvi_sams._checks import check_integer
from scvi_sams.exceptions import InvalidArgumentError, MissingPackageError
from scvi_sams.features._table import FeatureTable


def from_smiles(
    smiles: Mapping[str, str] | pd.Series, *, radius: int = 2, n_bits: int = 1024
) -> pd.DataFrame:
    """Compute Morgan fingerprints of drugs from their structures.

    A bit is 1 if the molecule contains an atom environment that is hashed to that bit (Rogers and
    Hahn 2010; with a radius of 2 these are the bits of ECFP4). Requires RDKit:
    ``pip install "scvi-sams[chem]"``.

    Parameters
    ----------
    smiles
        SMILES of each perturbation, by name. Salts and charges are kept as written; stereochemistry
        is ignored.
    radius
        Radius of atom environments, in bonds.
    n_bits
        Number of columns.

    Returns
    -------
    0 or 1, perturbations x bits, float32. Bits that no molecule has are kept, so that other drugs
    have the same columns.

    Raises
    ------
    MissingPackageError
        If RDKit is not installed.
    InvalidArgumentError
        If a SMILES is missing or invalid, or ``smiles`` is not a mapping.

    References
    ----------
    Rogers and Hahn, "Extended-Connectivity Fingerprints", Journal of Chemical Information and
    Modeling 50, 2010.

    Examples
    --------
    >>> structures = {"ethanol": "CCO", "methanol": "CO"}
    >>> scvi_sams.features.from_smiles(structures).sum(axis=1)  # doctest: +SKIP
    """
    check_integer(at_least=0, radius=radius)
    check_integer(n_bits=n_bits)
    if not isinstance(smiles, Mapping | pd.Series) or not len(smiles):
        raise InvalidArgumentError(
            "`smiles` must be a dict or Series of SMILES by the names of perturbations, such as "
            f"{{'ethanol': 'CCO'}}, not {type(smiles).__name__}."
        )
    names = list(smiles.keys())
    texts = list(smiles.values()) if isinstance(smiles, Mapping) else smiles.tolist()
    rdkit = _rdkit()
    generator = rdkit.GetMorganGenerator(radius=radius, fpSize=n_bits)
    with rdkit.BlockLogs():  # the error names invalid SMILES
        molecules = [_molecule(rdkit, text) for text in texts]
    pairs = zip(names, texts, molecules, strict=True)
    invalid = [f"{text!r} ({name})" for name, text, molecule in pairs if molecule is None]
    if invalid:
        raise InvalidArgumentError(
            f"{len(invalid)} of {len(names)} SMILES are missing or invalid: "
            f"{', '.join(invalid[:5])}. Correct them, or remove these perturbations."
        )
    bits = np.array([generator.GetFingerprintAsNumPy(molecule) for molecule in molecules])
    columns = tuple(f"bit_{i}" for i in range(n_bits))
    return FeatureTable(tuple(names), columns, bits, "smiles").to_frame(np.float32)


def _molecule(rdkit: Any, smiles: object) -> Any:
    """Return a molecule, or ``None``; RDKit would accept empty text as one without atoms."""
    if not isinstance(smiles, str) or not smiles.strip():
        return None
    return rdkit.MolFromSmiles(smiles)


def _rdkit() -> Any:
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdFingerprintGenerator
    except ImportError as error:
        raise MissingPackageError(
            "from_smiles computes fingerprints with RDKit, which cannot be imported "
            f'({error}): pip install "scvi-sams[chem]" (or pip install rdkit).'
        ) from error
    return SimpleNamespace(
        MolFromSmiles=Chem.MolFromSmiles,
        BlockLogs=rdBase.BlockLogs,
        GetMorganGenerator=rdFingerprintGenerator.GetMorganGenerator,
    )
