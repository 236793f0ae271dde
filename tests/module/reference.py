"""The plated ELBO written once more: plain loops in float64, one cell and particle at a time.

It takes the random numbers that a module drew, and the values of its parameters; nothing else of
the package takes part. Formulas: sections 3 and appendix A.1 of Bereket and Karaletsos (2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from scipy import stats
from scipy.special import betaln, expit, gammaln, log_softmax

from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.module import SAMSVAEModule

_VARIANCE_FLOOR = 1e-4


def negative_binomial_log_pmf(x: np.ndarray, log_mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Textbook formula in float64, with logarithms that stay exact for small means."""
    log_fail = -np.log1p(np.exp(log_mean) / theta)
    log_success = log_mean - np.log(theta) + log_fail
    choices = gammaln(x + theta) - gammaln(theta) - gammaln(x + 1)
    return choices + theta * log_fail + x * log_success


@dataclass
class Draws:
    """Random numbers of one pass through a module."""

    masks: list[np.ndarray] = field(default_factory=list)
    """Zeros and ones, particles x perturbations of the batch (ascending) x latent."""
    probabilities: list[np.ndarray] = field(default_factory=list)
    """Inclusion probabilities of a Beta prior, of the same shape, where they are drawn."""
    noise: list[np.ndarray] = field(default_factory=list)
    """Standard normals: of the effects, then of the basal states."""


@contextmanager
def recorded_draws(module: SAMSVAEModule) -> Iterator[Draws]:
    """Write down what the module draws inside the block."""
    draws = Draws()

    def recording(function, kept):
        def record(*args, **kwargs):
            values = function(*args, **kwargs)
            kept.append(values.detach().double().numpy())
            return values

        return record

    with (
        mock.patch.object(module.masks, "sample", recording(module.masks.sample, draws.masks)),
        mock.patch.object(torch, "randn", recording(torch.randn, draws.noise)),
        mock.patch.object(
            torch.distributions.Beta,
            "rsample",
            recording(torch.distributions.Beta.rsample, draws.probabilities),
        ),
    ):
        yield draws


class ReferenceELBO:
    """Every term of the objective for one mini-batch, given the draws.

    Attributes
    ----------
    reconstruction
        Negative log-likelihood per cell, mean over particles, ``(n_cells,)``.
    kl
        Divergences per cell by name, global ones as the cell's share, mean over particles.
    loss
        Of the mini-batch.
    """

    def __init__(
        self,
        module: SAMSVAEModule,
        tensors: dict[str, torch.Tensor],
        draws: Draws,
        kl_weight: float = 1.0,
    ) -> None:
        self.module = module
        self.closed_form = module.kl_estimator == "closed_form"
        self.parameters = {
            name: value.double().numpy() for name, value in module.state_dict().items()
        }
        self.tensors = {name: value.double().numpy() for name, value in tensors.items()}
        (self.masks,) = draws.masks
        self.effect_noise, self.basal_noise = draws.noise
        self.probabilities = draws.probabilities[0] if draws.probabilities else None

        n_particles, n_cells, _ = self.basal_noise.shape
        names = ("z_basal", "masks", "effects")
        kl = {name: np.zeros((n_particles, n_cells)) for name in names}
        log_px = np.zeros((n_particles, n_cells))
        for particle in range(n_particles):
            for cell in range(n_cells):
                shift = self._shift(particle, cell)
                z_basal, kl["z_basal"][particle, cell] = self._basal(particle, cell, shift)
                log_px[particle, cell] = self._log_likelihood(cell, z_basal + shift)
                for code, _ in self._given(cell):
                    n_t = self.parameters["cells_per_perturbation"][code]
                    if n_t == 0:
                        continue
                    kl["masks"][particle, cell] += self._mask_kl(particle, code) / n_t
                    kl["effects"][particle, cell] += self._effect_kl(particle, code) / n_t
        total_kl = kl["z_basal"] + module.global_kl_weight * (kl["masks"] + kl["effects"])
        self.loss = -np.mean(log_px - kl_weight * total_kl)
        self.reconstruction = -log_px.mean(axis=0)
        self.kl = {f"kl_{name}": value.mean(axis=0) for name, value in kl.items()}

    # Perturbations ------------------------------------------------------------------------------

    def _given(self, cell: int) -> list[tuple[int, float]]:
        codes, doses = np.split(self.tensors[REGISTRY_KEYS.PERTURBATIONS][cell], 2)
        return [(int(c), float(d)) for c, d in zip(codes, doses, strict=True) if d != 0]

    def _row(self, code: int) -> int:
        """Place of a perturbation among those of the batch, which are drawn in ascending order."""
        cells = range(len(self.tensors[REGISTRY_KEYS.X]))
        return sorted({c for cell in cells for c, _ in self._given(cell)}).index(code)

    def _shift(self, particle: int, cell: int) -> np.ndarray:
        shift = np.zeros(self.module.n_latent)
        for code, dose in self._given(cell):
            loc, sd = self._effect_posterior(particle, code)
            effect = loc + sd * self.effect_noise[particle, self._row(code)]
            shift += dose * effect * self.masks[particle, self._row(code)]
        return shift

    def _effect_posterior(self, particle: int, code: int) -> tuple[np.ndarray, np.ndarray]:
        parameters = self.parameters
        if "effects.loc" in parameters:
            return parameters["effects.loc"][code], np.exp(parameters["effects.log_scale"][code])
        mask = self.masks[particle, self._row(code)]
        one_hot = np.eye(len(parameters["cells_per_perturbation"]))[code]
        weight = np.concatenate(
            [
                parameters["effects.from_mask.weight"],
                parameters["effects.from_perturbation.weight"].T,
            ],
            axis=1,
        )
        first = weight @ np.concatenate([mask, one_hot]) + parameters["effects.from_mask.bias"]
        return self._normal("effects.head", self._hidden("effects.hidden_layers", first))

    def _effect_kl(self, particle: int, code: int) -> float:
        loc, sd = self._effect_posterior(particle, code)
        effect = loc + sd * self.effect_noise[particle, self._row(code)]
        return self._normal_kl(loc, sd, self.module.effect_prior_scale, effect)

    def _mask_kl(self, particle: int, code: int) -> float:
        logit = self.parameters["masks.logits"][code]
        on = expit(logit)
        mask = self.masks[particle, self._row(code)]
        log_q = np.log(np.where(mask == 1, on, 1 - on))
        negative_entropy = on * np.log(on) + (1 - on) * np.log(1 - on)
        prior = self.module.mask_prior
        if not hasattr(prior, "a"):
            log_on, log_off = prior.log_on, prior.log_off
            if self.closed_form:
                return float(np.sum(negative_entropy - on * log_on - (1 - on) * log_off))
            return float(np.sum(log_q - np.where(mask == 1, log_on, log_off)))
        a, b = prior.a, prior.b
        if self.closed_form:
            return float(np.sum(negative_entropy - betaln(a + on, b + 1 - on) + betaln(a, b)))
        probability = self.probabilities[particle, self._row(code)]
        log_conditional = np.log(np.where(mask == 1, probability, 1 - probability))
        log_q = log_q + stats.beta.logpdf(probability, a + on, b + 1 - on)
        return float(np.sum(log_q - log_conditional - stats.beta.logpdf(probability, a, b)))

    # Basal states and expression ----------------------------------------------------------------

    def _basal(self, particle: int, cell: int, shift: np.ndarray) -> tuple[np.ndarray, float]:
        parameters = self.parameters
        x = self.tensors[REGISTRY_KEYS.X][cell]
        values = np.log1p(x) if self.module.likelihood.is_count_likelihood else x
        inputs = [(values - parameters["input_mean"]) / parameters["input_sd"]]
        weights = [parameters["encoder.from_x.weight"]]
        sees_shift = "encoder.from_shift.weight" in parameters
        if sees_shift:
            inputs.append(shift)
            weights.append(parameters["encoder.from_shift.weight"])
        if "encoder.from_covariates.weight" in parameters:
            inputs.append(self._covariates(cell))
            weights.append(parameters["encoder.from_covariates.weight"])
        first = np.concatenate(weights, axis=1) @ np.concatenate(inputs)
        first = first + parameters["encoder.from_x.bias"]
        loc, sd = self._normal("encoder.head", self._hidden("encoder.hidden_layers", first))
        if sees_shift:
            loc = loc - shift  # the encoder predicts the whole state
        z_basal = loc + sd * self.basal_noise[particle, cell]
        return z_basal, self._normal_kl(loc, sd, 1.0, z_basal)

    def _covariates(self, cell: int) -> np.ndarray:
        keys = (REGISTRY_KEYS.BATCH, REGISTRY_KEYS.CATEGORICAL_COVARIATES)
        parts = [
            np.eye(size)[int(self.tensors[key][cell, 0])]
            for key, size in zip(keys, self.module.covariates.category_counts, strict=True)
        ]
        return np.concatenate([*parts, self.tensors[REGISTRY_KEYS.CONTINUOUS_COVARIATES][cell]])

    def _log_likelihood(self, cell: int, z: np.ndarray) -> float:
        parameters = self.parameters
        first = parameters["decoder.from_z.weight"] @ z + parameters["decoder.from_z.bias"]
        if "decoder.from_covariates.weight" in parameters:
            first = first + parameters["decoder.from_covariates.weight"] @ self._covariates(cell)
        hidden = self._hidden("decoder.hidden_layers", first)
        logits = self._linear("decoder.to_genes", hidden)
        x = self.tensors[REGISTRY_KEYS.X][cell]
        if "likelihood.log_scale" in parameters:
            scale = np.exp(parameters["likelihood.log_scale"])
            return float(stats.norm.logpdf(x, logits, scale).sum())
        if self.module.uses_size_factor:
            log_mean = np.log(self.tensors[REGISTRY_KEYS.SIZE_FACTOR][cell, 0]) + logits
        else:
            log_mean = np.log(x.sum()) + log_softmax(logits)
        if "likelihood.log_inverse_dispersion" not in parameters:
            return float(np.sum(x * log_mean - np.exp(log_mean) - gammaln(x + 1)))
        theta = np.exp(parameters["likelihood.log_inverse_dispersion"])
        return float(negative_binomial_log_pmf(x, log_mean, theta).sum())

    # Pieces of networks and densities -----------------------------------------------------------

    def _normal_kl(self, loc: np.ndarray, sd: np.ndarray, scale: float, draw: np.ndarray) -> float:
        """KL from Normal(0, scale), or its estimate from a single draw."""
        if self.closed_form:
            ratio = (sd / scale) ** 2
            return float(0.5 * np.sum(ratio + (loc / scale) ** 2 - 1 - np.log(ratio)))
        log_q = stats.norm.logpdf(draw, loc, sd)
        return float(np.sum(log_q - stats.norm.logpdf(draw, 0, scale)))

    def _linear(self, name: str, values: np.ndarray) -> np.ndarray:
        return self.parameters[f"{name}.weight"] @ values + self.parameters[f"{name}.bias"]

    def _hidden(self, name: str, first: np.ndarray) -> np.ndarray:
        hidden = _leaky_relu(first)
        block = 0
        while f"{name}.blocks.{block}.weight" in self.parameters:
            hidden = hidden + _leaky_relu(self._linear(f"{name}.blocks.{block}", hidden))
            block += 1
        return hidden

    def _normal(self, name: str, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        variance = np.exp(self._linear(f"{name}.log_variance", hidden)) + _VARIANCE_FLOOR
        return self._linear(f"{name}.loc", hidden), np.sqrt(variance)


def _leaky_relu(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, 0.01 * values)
