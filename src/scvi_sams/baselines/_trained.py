"""The trained baselines of PerturBench: linear additive, latent additive and decoder only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from scvi_sams._torch import global_seed
from scvi_sams.baselines._base import BaselineMethod, Expression, multi_hot
from scvi_sams.exceptions import SAMSError
from scvi_sams.labels._labels import Labels


@dataclass(kw_only=True, eq=False)
class NetworkBaseline(BaselineMethod):
    """A network of control expression and perturbations, trained on the squared error.

    Each perturbed training cell is paired in every epoch with a random control cell; the network
    maps the control cell and the perturbations to the perturbed cell. The prediction is the mean of
    its outputs over all training control cells.
    """

    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 5e-3
    weight_decay: float = 1e-8
    softplus: bool = True
    seed: int = 0
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise SAMSError(
                f"epochs is {self.epochs} and batch_size {self.batch_size}; both must be at least "
                "1."
            )
        self.device = torch.device(self.device)

    @abstractmethod
    def _build(self, n_genes: int, n_perturbations: int) -> nn.Module:
        """Build the network before training."""

    @abstractmethod
    def _combine(self, network: Any, controls: Tensor, indicators: Tensor) -> Tensor:
        """Map control cells and perturbations to perturbed cells, before softplus."""

    def _learn(self, expression: Expression, labels: Labels, genes: pd.Index) -> None:
        self._controls = expression[labels.is_control]
        perturbed = expression[~labels.is_control]
        self._vocabulary = labels.carried
        indicators = multi_hot(labels[~labels.is_control], self._vocabulary)
        with global_seed(self.seed):
            network = self._build(perturbed.shape[1], indicators.shape[1]).to(self.device)
            self._train(network, perturbed, indicators)
        self._network = network.eval()

    def _train(self, network: nn.Module, perturbed: Expression, indicators: np.ndarray) -> None:
        optimizer = torch.optim.Adam(
            network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        network.train()
        for _ in range(self.epochs):
            for batch in torch.randperm(len(indicators)).split(self.batch_size):
                rows = batch.numpy()
                partners = torch.randint(self._controls.shape[0], (len(rows),)).numpy()
                output = self._output(
                    network, self._tensor(self._controls[partners]), self._tensor(indicators[rows])
                )
                loss = functional.mse_loss(output, self._tensor(perturbed[rows]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    @torch.no_grad()
    def _profiles(self, labels: Labels) -> np.ndarray:
        indicators = multi_hot(labels, self._vocabulary)
        n_controls, n_genes = self._controls.shape
        sums = np.zeros((len(labels), n_genes))
        for start in range(0, n_controls, self.batch_size):
            controls = self._tensor(self._controls[start : start + self.batch_size])
            for row, indicator in enumerate(self._tensor(indicators)):
                repeated = indicator.expand(len(controls), -1)
                output = self._output(self._network, controls, repeated)
                sums[row] += output.sum(dim=0, dtype=torch.float64).cpu().numpy()
        return sums / n_controls

    def _output(self, network: nn.Module, controls: Tensor, indicators: Tensor) -> Tensor:
        output = self._combine(network, controls, indicators)
        return functional.softplus(output) if self.softplus else output

    def _tensor(self, rows: Expression) -> Tensor:
        dense = rows if isinstance(rows, np.ndarray) else rows.toarray()
        return torch.as_tensor(dense, dtype=torch.float32, device=self.device)


class LinearAdditive(NetworkBaseline):
    """PerturBench's linear additive model: a control cell plus a linear map of the perturbations.

    ``softplus(x_control + W d + b)``, with ``d`` the perturbations of a cell, 0 or 1 each. The
    bias ``b`` is common to all perturbed cells: it enters a combination once. A perturbation in no
    training label raises :class:`~scvi_sams.exceptions.UnknownPerturbationError`.

    Parameters
    ----------
    epochs
        Passes over the perturbed training cells. There is no early stopping.
    batch_size
        Cells per step.
    learning_rate, weight_decay
        Parameters of Adam.
    softplus
        Whether the output passes through softplus, as in PerturBench, which keeps it positive.
        Without it the model is exactly linear in the expression.
    seed
        Seed of initial weights, batches and control cells. The global random state is unchanged.
    device
        Where to train, for example ``"cuda"``.
    perturbation_key, control, delimiter
        As for :class:`BaselineMethod`.

    Notes
    -----
    PerturBench (Wu et al., arXiv 2408.10609v4). Control cells are sampled from all training cells,
    not from the same covariate level: fit one model per level if there are several.
    """

    def _build(self, n_genes: int, n_perturbations: int) -> nn.Module:
        return nn.Linear(n_perturbations, n_genes)

    def _combine(self, network: Any, controls: Tensor, indicators: Tensor) -> Tensor:
        return controls + network(indicators)


@dataclass(kw_only=True, eq=False)
class LatentAdditive(NetworkBaseline):
    """PerturBench's latent additive model: encoded control plus encoded perturbations, decoded.

    ``softplus(decoder(encoder(x_control) + perturbation_encoder(d)))``, three multilayer
    perceptrons. All perturbations of a cell enter the perturbation encoder together, so that
    effects need not add up, even in latent space. A perturbation in no training label raises
    :class:`~scvi_sams.exceptions.UnknownPerturbationError`.

    Parameters
    ----------
    n_hidden
        Width of the hidden layers.
    n_latent
        Dimensions of the latent space.
    n_layers
        Hidden layers of each perceptron: linear, layer norm, ReLU, dropout.
    dropout
        Dropout rate of hidden units in training.
    epochs, batch_size, learning_rate, weight_decay, softplus, seed, device
        As for :class:`LinearAdditive`.
    perturbation_key, control, delimiter
        As for :class:`BaselineMethod`.

    Notes
    -----
    PerturBench (Wu et al., arXiv 2408.10609v4). The defaults train quickly. Their best model for
    Norman has ``n_hidden=5376, n_latent=64, n_layers=1, dropout=0.1, learning_rate=6.8e-5,
    weight_decay=1e-8`` and up to 500 epochs with early stopping. Control cells as for
    :class:`LinearAdditive`.
    """

    n_hidden: int = 256
    n_latent: int = 64
    n_layers: int = 1
    dropout: float = 0.1
    epochs: int = 50
    learning_rate: float = 1e-3

    def _build(self, n_genes: int, n_perturbations: int) -> nn.Module:
        hidden = [self.n_hidden] * self.n_layers
        sizes = [
            [n_genes, *hidden, self.n_latent],
            [n_perturbations, *hidden, self.n_latent],
            [self.n_latent, *hidden, n_genes],
        ]
        return nn.ModuleList(_perceptron(widths, self.dropout) for widths in sizes)

    def _combine(self, network: Any, controls: Tensor, indicators: Tensor) -> Tensor:
        encoder, perturbation_encoder, decoder = network
        return decoder(encoder(controls) + perturbation_encoder(indicators))


@dataclass(kw_only=True, eq=False)
class DecoderOnly(NetworkBaseline):
    """PerturBench's decoder-only model: the perturbations alone, decoded, without control cells.

    ``softplus(decoder(d))``, one multilayer perceptron of the perturbations ``d`` of a cell, 0 or 1
    each. It shows the benefit of control cells: a model that does not beat it makes no use of them.
    All perturbations of a cell enter together, so that effects need not add up. A
    :class:`~scvi_sams.exceptions.UnknownPerturbationError`.

    Parameters
    ----------
    n_hidden
        Width of the hidden layers.
    n_layers
        Hidden layers: linear, layer norm, ReLU, dropout.
    dropout
        Dropout rate of hidden units in training.
    epochs, batch_size, learning_rate, weight_decay, softplus, seed, device
        As for :class:`LinearAdditive`.
    perturbation_key, control, delimiter
        As for :class:`BaselineMethod`.

    Notes
    -----
    The ablation of PerturBench (Wu et al., arXiv 2408.10609v4). Theirs also receives the covariate
    level of a cell: fit one model per level if there are several.
    """

    n_hidden: int = 256
    n_layers: int = 1
    dropout: float = 0.1
    epochs: int = 50
    learning_rate: float = 1e-3

    def _build(self, n_genes: int, n_perturbations: int) -> nn.Module:
        return _perceptron(
            [n_perturbations, *[self.n_hidden] * self.n_layers, n_genes], self.dropout
        )

    def _combine(self, network: Any, controls: Tensor, indicators: Tensor) -> Tensor:
        return network(indicators)


def _perceptron(sizes: Sequence[int], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes[:-1]):
        layers += [
            nn.Linear(n_in, n_out),
            nn.LayerNorm(n_out, elementwise_affine=False),
            nn.ReLU(),
            nn.Dropout(dropout),
        ]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
