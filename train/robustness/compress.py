"""A network's weights as a cell wants them: zeros first, then fewer bits; and back again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.audio import Wave
from train.models.bits import quantise_
from train.pruning.masks import Masks
from train.pruning.select import TaylorScores, remove_by_magnitude, remove_smallest, weights_at
from train.robustness.interface import Cell, Judged


class Compressor:
    """Compresses a model's network in place; every cell starts from the weights as they were.

    Magnitude takes of every matrix the smallest weights, of every convolution the smallest kernels;
    importance the lowest over all: the mean over ``waves`` of the squared change, to first order,
    of what the model says if the weight were zero. Nothing is trained afterwards.
    """

    def __init__(self, model: Judged, waves: Sequence[Wave]) -> None:
        self.model, self.network, self.waves = model, model.network, waves
        self.dense = {n: self.network.get_parameter(n).detach().clone() for n in model.names}
        self._importance: dict[str, Tensor] = {}

    @torch.no_grad()
    def apply(self, cell: Cell) -> None:
        """Give the network the weights of a cell."""
        for name, weight in self.dense.items():
            self.network.get_parameter(name).copy_(weight)
        if cell.sparsity:
            self._masks(cell).apply_(self.network)
        if cell.bits.isdigit():
            quantise_(self.network, self.dense, int(cell.bits))

    def _masks(self, cell: Cell) -> Masks:
        masks = Masks.full(self.network, self.dense)
        target = weights_at(100 - cell.sparsity, masks.total())
        if cell.by == "magnitude":
            remove_by_magnitude(self.network, masks, target)
        else:
            remove_smallest(self._importances(), masks, masks.total() - target)
        return masks

    @torch.enable_grad()
    def _importances(self) -> dict[str, Tensor]:
        """By name, of the dense weights, which the network has now."""
        if not self._importance:
            scores = TaylorScores(self.network, self.dense)
            for number, wave_T in enumerate(self.waves):
                scores.decay = number / (number + 1)  # a plain mean
                self.network.zero_grad(set_to_none=True)
                torch.autograd.backward(self.model.influence(wave_T))
                scores.gather(self.network)
            self.network.zero_grad(set_to_none=True)
            self._importance = scores.averages
        return self._importance
