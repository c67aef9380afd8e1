"""Hard-concrete gates over the units of a network: which of them stay is learned with its weights.

A gate z is drawn in every step: u uniform, s = sigmoid((ln u - ln(1 - u) + a) / b), z = 1.2 s - .1
cut to 0 to 1, so that it is 0 with a probability of its own and a is learned by the gradient
(Louizos et al. 2018; b = 2/3 as DPHuBERT and CoFi have it). It scales the weights that
``Group.gates`` names, by ``torch.func.functional_call``: any network with a ``Layout`` has gates. A
Lagrangian holds the expected size to a target (Wang et al. 2020, "Structured pruning of large
language models"). In the end ``cut`` takes the closed units out, which changes no output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data_specs.io.errors import UserError
from train.pruning.structured import LEAST_SHARE, Model, remove_units
from train.pruning.units import Group, Layout

SHARPNESS = 2 / 3
LOW, HIGH = -0.1, 1.1
EDGE = 1e-6
"""u is this far from 0 and 1."""

DROP = 0.01
"""The chance of a gate to be closed at the start, about (DPHuBERT)."""

SETTLED = 0.8
"""Of a, in a gate's value when nothing is drawn (flop, DPHuBERT)."""

RAMP, SETTLES = 0.5, 0.75
"""Shares of the steps: until the target is reached, until the choice is made."""

SQUARE, SLOWER = 10.0, 0.1
"""What m is at first, and the multipliers' learning rate as a share of the gates'. No gate closes
in the first steps, a being far up: an l that grew meanwhile would carry them far past the target
(of a tiny student in 200 steps to 21 % where 50 % were asked; so to 47 %)."""


class Gates(nn.Module):
    """A gate for every unit of a layout, end to end in one vector (N,) in the groups' order."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        units = sum(layout.counts.values())
        self.alphas_N = nn.Parameter(torch.full((units,), math.log((1 - DROP) / DROP)))

    def drawn(self) -> Tensor:
        """Gates (N,), 0 to 1, of one step."""
        u_N = torch.rand(self.alphas_N.shape)  # on the CPU: the same whatever the device is
        noise_N = torch.logit(u_N, EDGE).to(self.alphas_N.device)
        s_N = torch.sigmoid((noise_N + self.alphas_N) / SHARPNESS)
        return (s_N * (HIGH - LOW) + LOW).clamp(0, 1)

    def open_chance(self) -> Tensor:
        """The probability (N,) of each gate not to be zero."""
        return torch.sigmoid(self.alphas_N - SHARPNESS * math.log(-LOW / HIGH))

    def expected(self) -> dict[str, Tensor]:
        """Open units on average, by group name: what ``Layout.macs`` takes."""
        return {n: chance_U.sum() for n, chance_U in by_group(self.layout, self.open_chance())}

    @torch.no_grad()
    def settled(self, macs: float) -> Tensor:
        """Gates (N,) when nothing is drawn: zero but for those most likely open.

        As many as ``macs`` multiply-adds allow; ``UserError`` where it allows too few.
        """
        kept_N = most_likely(self.layout, self.alphas_N.cpu(), macs).to(self.alphas_N.device)
        return torch.sigmoid(SETTLED / SHARPNESS * self.alphas_N) * kept_N


class Budget(nn.Module):
    """The gates of a training of ``steps``, held to a share ``keep`` of ``macs`` multiply-adds.

    The loss l (s - t) + m (s - t)^2 of the sparsity s and its target t; l and m are learned by
    ascent. In step ``settles_at`` the choice is made, and the gates stay what they are then.
    ``UserError`` where the budget cannot be met.
    """

    fixed_N: Tensor
    """The gates that were chosen (ones before)."""

    def __init__(
        self, layout: Layout, macs: float, keep: float, steps: int, settles: float = SETTLES
    ) -> None:
        super().__init__()
        self.layout, self.gates = layout, Gates(layout)
        self.macs, self.keep = macs, keep
        self.rises_until, self.settles_at = RAMP * steps, max(1, int(settles * steps))
        self.multipliers_2 = nn.Parameter(torch.tensor([0.0, SQUARE]))
        self.register_buffer("fixed_N", torch.ones_like(self.gates.alphas_N))
        self.gates.settled(keep * macs)  # can it be met at all?

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """For AdamW: the gates go down, the multipliers up."""
        down = {"params": [self.gates.alphas_N], "lr": lr, "weight_decay": 0.0}
        up = {"params": [self.multipliers_2], "lr": SLOWER * lr, "weight_decay": 0.0}
        return [down, up | {"maximize": True}]

    def of_step(self, step: int) -> Tensor:
        """The gates (N,) of a training step, drawn while they are open."""
        if step == self.settles_at:
            self.fixed_N.copy_(self.chosen())
        return self.fixed_N if step >= self.settles_at else self.drawn()

    def after(self, steps: int) -> Tensor:
        """The gates (N,) without chance after so many steps."""
        return self.fixed_N if steps > self.settles_at else self.so_far()

    def loss(self, step: int) -> Tensor:
        """What is added to the loss of a step."""
        if step >= self.settles_at:
            return torch.zeros((), device=self.fixed_N.device)
        target = min(1.0, step / self.rises_until) * (1 - self.keep)
        beyond = 1 - self.share() - target
        found: Tensor = self.multipliers_2[0] * beyond + self.multipliers_2[1] * beyond.square()
        return found

    def left(self, steps: int) -> float:
        """The share of the multiply-adds after so many steps: what is left, or expected to be."""
        if steps > self.settles_at:
            return counted(self.layout, self.fixed_N) / self.macs
        return float(self.share().detach())

    def share(self) -> Any:
        """The share of the multiply-adds that is left on average, a tensor."""
        return self.layout.macs(self.gates.expected()) / self.macs

    def drawn(self) -> Tensor:
        return self.gates.drawn()

    def chosen(self) -> Tensor:
        """The gates (N,) that stay."""
        return self.gates.settled(self.keep * self.macs)

    def so_far(self) -> Tensor:
        """The gates (N,) without chance, of the size that is expected now."""
        return self.gates.settled(max(float(self.share().detach()), self.keep) * self.macs)


LOOKS = 0.1
"""Share of the steps over which importance is gathered, before the choice."""


class Importance(Budget):
    """No gate is learned: the squared slope of all losses by a gate, summed, says what stays."""

    importance_N: Tensor

    def __init__(self, layout: Layout, macs: float, keep: float, steps: int) -> None:
        super().__init__(layout, macs, keep, steps, LOOKS)
        self.register_buffer("importance_N", torch.zeros_like(self.fixed_N))

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return []

    def drawn(self) -> Tensor:
        """Open gates (N,) of which the backward pass tells what the losses would lose by each."""
        ones_N = torch.ones_like(self.importance_N).requires_grad_(True)

        def gather(slope_N: Tensor) -> None:
            self.importance_N += slope_N.square()

        ones_N.register_hook(gather)
        return ones_N

    def chosen(self) -> Tensor:
        importance = dict(by_group(self.layout, self.importance_N.cpu()))
        worth_N = for_its_cost(self.layout, importance)
        return most_likely(self.layout, worth_N, self.keep * self.macs).to(self.importance_N)

    def so_far(self) -> Tensor:
        return torch.ones_like(self.importance_N)

    def share(self) -> Any:
        return torch.tensor(counted(self.layout, self.so_far()) / self.macs)

    def loss(self, step: int) -> Tensor:
        return torch.zeros((), device=self.fixed_N.device)


def counted(layout: Layout, gates_N: Tensor) -> float:
    """Multiply-adds of the units whose gates are not zero."""
    counts = {name: int(gates_U.count_nonzero()) for name, gates_U in by_group(layout, gates_N)}
    return float(layout.macs(counts))


def by_group(layout: Layout, values_N: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Values of all units as (group name, its own (U,))."""
    parts = values_N.split(list(layout.counts.values()))
    return zip(layout.counts, parts, strict=True)


def gated(model: nn.Module, layout: Layout, gates_N: Tensor) -> dict[str, Tensor]:
    """The tensors of a model that gates scale, scaled: for ``torch.func.functional_call``."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    found: dict[str, Tensor] = {}
    for group, (_, gates_U) in zip(layout.groups, by_group(layout, gates_N), strict=True):
        # What makes a coordinate of the width is its output: the position codes too.
        for part in group.makes if group.kind == "width" else group.gates:
            tensor = found.get(part.tensor, tensors[part.tensor])
            places_UV = part.places(torch.arange(group.count)).to(tensor.device)
            scale = tensor.new_ones(tensor.shape[part.side])
            values = gates_U.repeat_interleave(places_UV.shape[1]).to(tensor.dtype)
            scale = scale.index_copy(0, places_UV.flatten(), values)
            shape = [-1 if side == part.side else 1 for side in range(tensor.ndim)]
            found[part.tensor] = tensor * scale.view(shape)
    return found


def for_its_cost(layout: Layout, importance: Mapping[str, Tensor]) -> Tensor:
    """Importance by group, end to end (N,), for the multiply-adds that one unit costs."""
    counts, macs = layout.counts, layout.macs
    costs = {name: macs(counts) - macs({**counts, name: counts[name] - 1}) for name in counts}
    return torch.cat([importance[name] / costs[name] for name in counts])


def most_likely(
    layout: Layout, worth_N: Tensor, macs: float, least: Mapping[str, int] | None = None
) -> Tensor:
    """Which units stay, bool (N,): those of most worth, for at most ``macs`` multiply-adds.

    By blocks as hardware computes them, what then is left of the budget by single units; of every
    group ``least`` stay (default: a part). ``UserError`` where these need more.
    """
    worth = {n: worth_U.sort(descending=True).values for n, worth_U in by_group(layout, worth_N)}
    counts = dict(least or {group.name: _least(group) for group in layout.groups})
    if layout.macs(counts) > macs:
        raise UserError(
            f"a budget of {macs:.3g} multiply-adds is too low: a part in {LEAST_SHARE} of every "
            f"group needs {layout.macs(counts):.3g}"
        )
    for in_blocks in (True, False):
        blocks: list[tuple[float, str, int]] = []
        for group in layout.groups:
            size = group.block if in_blocks else 1 + (group.kind == "width")
            parts = worth[group.name][counts[group.name] :].split(size)
            blocks += [(float(part.mean()), group.name, len(part)) for part in parts if len(part)]
        for _, name, units in sorted(blocks, key=lambda block: -block[0]):
            more = {**counts, name: counts[name] + units}
            counts = more if layout.macs(more) <= macs else counts
    kept = [_largest(worth_U, counts[name]) for name, worth_U in by_group(layout, worth_N)]
    return torch.cat(kept)


def _least(group: Group) -> int:
    """Units that stay in any case, in whole blocks."""
    return min(group.count, group.block * -(-group.count // (LEAST_SHARE * group.block)))


def _largest(values_U: Tensor, number: int) -> Tensor:
    kept_U = torch.zeros(len(values_U), dtype=torch.bool)
    kept_U[values_U.argsort(descending=True, stable=True)[:number]] = True
    return kept_U


@torch.no_grad()
def cut(model: Model, layout: Layout, gates_N: Tensor) -> Model:
    """The smaller model without the units whose gates are zero, the others scaled by theirs.

    It gives what the gated model gives; the model itself stays as it is.
    """
    whole = copy.deepcopy(model)
    whole.load_state_dict(model.state_dict() | gated(model, layout, gates_N))
    closed = {name: (gates_U == 0).cpu() for name, gates_U in by_group(layout, gates_N)}
    return remove_units(whole, closed, layout)
