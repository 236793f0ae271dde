"""Read cells in mini-batches, and compute results for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi import settings
from scvi.data import AnnDataManager
from torch import Tensor
from torch.distributions import Normal

from scvi_sams._checks import as_names, check_integer
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.counts._block_reader import is_on_disk
from scvi_sams.data._block_loader import BlockLoader
from scvi_sams.data._contexts import registered_contexts
from scvi_sams.data._field import registered_labels
from scvi_sams.data._manager import ADATA_LOCK
from scvi_sams.exceptions import MissingKeyError
from scvi_sams.model._noise import CellNoise, by_blocks, keys_of_cells, new_seed, sample_of_cells
from scvi_sams.model._record import is_result_of
from scvi_sams.model._screen_model import ScreenModel
from scvi_sams.module._minibatch import CellBatch, positions_in, sum_over_slots
from scvi_sams.module._perturbation_module import GlobalDraw
from scvi_sams.module._scored_cells import FEW_SAMPLES, N_SAMPLES

_FIRST_OF_RESPONSES = 2**40
"""First random number of a cell that is used for responses: other uses need fewer."""

_MAX_ELEMENTS = 2**23
"""Numbers in the largest array (particles x cells x genes) of a step: 32 MB in float32."""


class EncodedCells(NamedTuple):
    """Some cells with their shifts and posteriors."""

    place: np.ndarray
    """Places in the positions that are read, ``(B,)``."""
    cells: CellBatch
    shift: Tensor
    """``(P or 1, B, S)``."""
    qz: Normal
    """Posterior of the basal states, batch shape ``(P or 1, B, L)``."""
    direct: Tensor | None
    """Direct effects, ``(B, G)`` or ``(P or 1, B, G)``."""


class CellReader:
    """Some cells of registered data, as mini-batches of input tensors of the module.

    They are read in ascending order, which requires the fewest accesses on disk; each mini-batch
    comes with the places of its cells in ``positions``, ``(n_cells,)``. ``adata`` has been checked
    before; ``batch_size=None`` stands for ``scvi.settings.batch_size``.
    """

    def __init__(
        self, model: ScreenModel, adata: AnnData, positions: np.ndarray, batch_size: int | None
    ) -> None:
        self.model = model
        self.module = model.module
        self.adata = adata
        self.positions = positions
        self.batch_size = settings.batch_size if batch_size is None else batch_size
        check_integer(batch_size=self.batch_size)
        self.batch_size = int(self.batch_size)
        self.manager = model.get_anndata_manager(adata, required=True)

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.positions)

    @cached_property
    def effects(self) -> Tensor:
        """Rows of the effects of the cells' perturbations, ascending, on the module's device."""
        codes = torch.as_tensor(registered_labels(self.manager).codes[self.positions]).long()
        contexts = registered_contexts(self.manager)
        if contexts is None:
            rows = codes
        else:
            of_cells = torch.as_tensor(contexts.codes[self.positions])
            rows = self.module.effect_rows.of_cells(codes, of_cells)
        return rows[rows >= 0].unique().to(self.module.device)

    @cached_property
    def contexts(self) -> tuple[Tensor | None, np.ndarray]:
        """Contexts of the cells by number, ascending, and the position of each cell's among them.

        Without contexts ``None``, and zeros.
        """
        contexts = registered_contexts(self.manager)
        if contexts is None:
            return None, np.zeros(len(self), dtype=np.int64)
        found, place = np.unique(contexts.codes[self.positions], return_inverse=True)
        return torch.as_tensor(found, device=self.module.device), place

    @cached_property
    def seed(self) -> int:
        """Seed of the samples for these cells and their perturbations."""
        return new_seed()

    @cached_property
    def noise(self) -> CellNoise:
        """Random numbers of each cell, independent of other cells."""
        keys = keys_of_cells(self.adata.obs_names, self.positions)
        return CellNoise(self.seed, keys, self.module.device)

    def drawn(self, n_draws: int) -> GlobalDraw:
        """Sample the shifts of :attr:`effects`, with their divergences."""
        names: list[str] = []

        def draw(rows: Tensor) -> list[Tensor]:
            shifts, kl = self.module.global_posterior(rows, n_draws)
            names[:] = kl
            return [shifts, *kl.values()]

        shifts, *kl = by_blocks(draw, self.effects, self.module.effect_rows, self.seed)
        return GlobalDraw(shifts, dict(zip(names, kl, strict=True)))

    def basal_states(self, qz: Normal, place: np.ndarray, n_draws: int) -> Tensor:
        """Sample from the posterior of the basal states of the cells at ``place``."""
        return qz.loc + qz.scale * self.noise.normals(place, n_draws, qz.loc.shape[-1])

    def batches(self) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """Yield places, and tensors on the module's device."""
        order = np.argsort(self.positions, kind="stable")
        cells, device = self.positions[order], self.module.device
        if is_on_disk(self.manager.get_from_registry(REGISTRY_KEYS.X)):
            loader = BlockLoader(self.manager, cells, self.batch_size)
        else:
            loader = self.model._make_data_loader(
                self.adata, indices=cells, batch_size=self.batch_size
            )
        # The loader samples a number even without shuffling: not from the global generator, which
        # other threads use.
        loader.generator = torch.Generator()
        start = 0
        for tensors in loader:
            place = order[start : start + len(tensors[REGISTRY_KEYS.X])]
            yield place, {key: value.to(device) for key, value in tensors.items()}
            start += len(place)

    def cells(self) -> Iterator[tuple[np.ndarray, CellBatch]]:
        """Yield places, and the cells."""
        for place, tensors in self.batches():
            yield place, self.module.read_batch(tensors)

    def encoded(self, shifts: Tensor, *, sampled: bool = False) -> Iterator[EncodedCells]:
        """Yield cells, their shifts, and the posteriors of their basal states.

        ``shifts`` are those of :attr:`effects`, ``(n_particles or 1, R, S)``. If cells may have
        escaped, cells with a response probability below 0.5 have no shift; with several particles,
        or with ``sampled``, responses are sampled.
        """
        rows, module = self.effects, self.module
        for place, cells in self.cells():
            shift = sum_over_slots(shifts, positions_in(rows, cells.effects), cells.doses)
            direct = module.direct_effect(cells)
            if module.has_branches:
                n_samples = len(shifts) if sampled or len(shifts) > 1 else 0
                responds = self._respond(cells, place, n_samples)
                shift = shift * responds
                direct = None if direct is None else direct * responds
            qz = module.encode(cells.x, shift, cells.covariates)
            yield EncodedCells(place, cells, shift, qz, direct)

    def response_probabilities(self) -> Iterator[tuple[np.ndarray, CellBatch, Tensor]]:
        """Yield places, cells, and the posterior probability that each responded, ``(B,)``."""
        for place, cells in self.cells():
            yield place, cells, self._probability(cells)

    def _probability(self, cells: CellBatch, n_samples: int = N_SAMPLES) -> Tensor:
        """Posterior probability of a response, given mean shifts."""
        slots = positions_in(self.effects, cells.effects)
        shift = sum_over_slots(self._mean_shifts, slots, cells.doses)
        return torch.sigmoid(self.module.response_log_odds(cells, shift, n_samples))

    @cached_property
    def _mean_shifts(self) -> Tensor:
        """Posterior means of the shifts of :attr:`effects`, ``(1, R, S)``."""
        return self.module.shift_moments(self.effects)[0][None]

    def _respond(self, cells: CellBatch, place: np.ndarray, n_samples: int) -> Tensor:
        """Whether cells respond, ``(n_samples, B, 1)``; 0 samples: the more likely case, once."""
        probability = self._probability(cells, FEW_SAMPLES)
        level = torch.full_like(probability, 0.5)[None]
        if n_samples:
            level = self.levels_of_responses(place, n_samples)
        return (level <= probability)[..., None].to(probability)

    def levels_of_responses(self, place: np.ndarray, n_samples: int) -> Tensor:
        """Uniform numbers ``(n_samples, B)``: a cell responds if its probability is at least this.

        In single precision 1 is among them.
        """
        normals = self.noise.normals(place, n_samples, 1, first=_FIRST_OF_RESPONSES)
        return torch.special.ndtr(normals[..., 0])

    def write(self, values: np.ndarray, slot: Literal["obs", "obsm", "layers"], key: str) -> None:
        """Write results of the cells into the AnnData, as a copy.

        Other rows keep what this model wrote there since its last training; otherwise they are
        NaN: a result is never a mixture of two models.
        """
        with ADATA_LOCK:
            self._write(values, slot, key)

    def report(
        self, values: np.ndarray, return_mean: bool, key_added: str | None
    ) -> float | np.ndarray:
        """Write values per cell into obs, and return them or their mean."""
        if key_added is not None:
            self.write(values, "obs", key_added)
        return float(values.mean()) if return_mean else values

    def _write(self, values: np.ndarray, slot: str, key: str) -> None:
        table = getattr(self.adata, slot)
        full = np.full((self.adata.n_obs, *values.shape[1:]), np.nan, dtype=values.dtype)
        if key in table and is_result_of(self.model, self.adata, key):
            earlier = table[key]
            if np.shape(earlier) == full.shape:
                full[:] = earlier
        full[self.positions] = values
        table[key] = full
        self.model.keep_provenance(self.adata, key)


def posterior_moments(cells: CellReader) -> np.ndarray:
    """Mean and variance of the posterior of basal states, ``(2, n_cells, n_latent)``."""
    moments = np.empty((2, len(cells), cells.module.n_latent), dtype=np.float32)
    shifts = cells.module.shift_moments(cells.effects)[0][None]
    for place, _, _, qz, _ in cells.encoded(shifts):
        moments[0, place] = qz.loc[0].cpu().numpy()
        moments[1, place] = qz.variance[0].cpu().numpy()
    return moments


def predictive_samples(cells: CellReader, n_samples: int, genes: np.ndarray) -> np.ndarray:
    """Samples of the posterior predictive distribution, ``(n_cells, n_genes, n_samples)``."""
    module = cells.module
    drawn = np.empty((len(cells), len(genes), n_samples), dtype=np.float32)
    for place, read, shift, qz, direct in cells.encoded(
        cells.drawn(n_samples).shifts, sampled=True
    ):
        z_basal = cells.basal_states(qz, place, n_samples)
        logits = module.decode(z_basal, shift, read.covariates, direct)
        seeds = cells.noise.seeds(place, 0)
        sample = sample_of_cells(module.likelihood, logits, read.size, seeds)[..., genes]
        drawn[place] = sample.permute(1, 2, 0).cpu().numpy()
    return drawn


def negative_log_terms(cells: CellReader, n_samples: int) -> np.ndarray:
    """Reconstruction error and divergences per cell, ``(2, n_cells)``."""
    module, rows = cells.module, cells.effects
    draw = cells.drawn(n_samples)
    terms = np.empty((2, len(cells)), dtype=np.float64)
    for place, tensors in cells.batches():
        read = module.read_batch(tensors)
        slots = positions_in(rows, read.effects)
        shift = sum_over_slots(draw.shifts, slots, read.doses)
        shift, qz = module.in_branches(read, shift, n_samples)
        noise = cells.noise.normals(place, n_samples, qz.loc.shape[-1])
        z_basal = module.basal_states(qz, noise)
        explained = module.explained(read, rows, slots, draw, shift, qz, z_basal)
        output = module.loss(tensors, explained, module.generative(z_basal, shift, read.covariates))
        terms[0, place] = output.reconstruction_loss["reconstruction_loss"].cpu().numpy()
        terms[1, place] = sum(output.kl_local.values()).cpu().numpy()
    return terms


def importance_weighted_bounds(cells: CellReader, n_samples: int) -> np.ndarray:
    """Importance-weighted bound per cell, ``(n_cells,)``."""
    module, rows = cells.module, cells.effects
    n_chunk = max(1, min(n_samples, _MAX_ELEMENTS // (cells.batch_size * cells.adata.n_vars)))
    chunks = [min(n_chunk, n_samples - start) for start in range(0, n_samples, n_chunk)]
    shifts = cells.drawn(n_samples).shifts
    tables = shifts.split(n_chunk) if len(shifts) > 1 else [shifts] * len(chunks)
    bound = np.empty(len(cells), dtype=np.float64)
    for place, read in cells.cells():
        slots = positions_in(rows, read.effects)
        weights = []
        for number, (table, size) in enumerate(zip(tables, chunks, strict=True)):
            shift = sum_over_slots(table, slots, read.doses)
            noise = cells.noise.normals(place, size, module.n_latent, first=number * n_chunk)
            weights.append(module.log_importance_weights(read, shift, noise))
        bounds = torch.logsumexp(torch.cat(weights), 0) - math.log(n_samples)
        bound[place] = bounds.cpu().numpy()
    return bound


def positions_of_genes(
    gene_list: Sequence[str] | None, known: Sequence[str] | np.ndarray
) -> np.ndarray:
    """Positions of genes among those of the model; ``None`` for all."""
    genes = pd.Index(known)
    if gene_list is None:
        return np.arange(len(genes))
    asked = as_names("gene_list", gene_list)
    found = genes.get_indexer(pd.Index(asked, dtype=object))
    if (found < 0).any():
        unknown = [gene for gene, place in zip(asked, found, strict=True) if place < 0]
        raise MissingKeyError(
            f"Genes {unknown[:5]} are not among those of the model, such as {list(genes[:3])}."
        )
    return found


def batch_code(batch: str, manager: AnnDataManager) -> int:
    """Number of a batch of the training data."""
    mapping = manager.get_state_registry(REGISTRY_KEYS.BATCH)["categorical_mapping"]
    matches = np.flatnonzero(np.asarray(mapping) == batch)
    if not len(matches):
        raise MissingKeyError(f"Batch {batch!r} is not one of {list(mapping)}.")
    return int(matches[0])
