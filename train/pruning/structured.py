"""Structured pruning: whole units are taken out of a network, so that it is faster.

Two ways to say which. ``dead_units``: those whose weights are gone, so that scores stay what they
are. A unit is dead if nothing reads it, or if nothing reaches it: then it gives a constant, which
goes into the bias of what reads it. A convolution pads its input with zeros along time, where a
constant is not constant: there all constant channels of a layer become one. ``choose_units``: those
that change the score least for what they cost.

A unit of the width is dead only if its position codes are zero too; weights alone never kill one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_specs.io.errors import UserError
from train.models.encoders.conformer import Conformer
from train.models.student import Student
from train.models.xlsr import Encoder
from train.pruning.units import NORM_TENSORS, Group, Layout, Slices, State, layout_of

Model = TypeVar("Model", bound=nn.Module)

Units = Mapping[str, Tensor]
"""Group name to bool (units,), True where a unit goes. Groups that keep all may be left out."""

LEAST_SHARE = 8
"""Of a group at least one unit in so many is left by ``choose_units``."""

NORM_EPS = 1e-5
"""Of ``nn.BatchNorm1d``."""


# --- which units are dead -------------------------------------------------------------------------


@torch.no_grad()
def dead_units(model: Student | Encoder | Conformer) -> dict[str, Tensor]:
    """Which units can go without changing a score, of a model whose dead weights are zero.

    A unit that dies may leave others without anything that reaches or reads them: repeated until
    there are no more. Of every group one unit is left, of the width an even number. What is living
    and zero counts as dead.
    """
    state, groups = _copy(model), layout_of(model).groups
    gone = {group.name: torch.zeros(group.count, dtype=torch.bool) for group in groups}
    found = True
    while found:
        found = False
        for group in groups:
            new_U = _spared(group, _dead(state, group) & ~gone[group.name], gone[group.name])
            if new_U.any():
                _release(state, group, new_U)
                gone[group.name] |= new_U
                found = True
    return gone


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _any(state: State, parts: Iterable[Slices], count: int) -> Tensor:
    """Which units have a value that is not zero in any of the parts."""
    found_U = torch.zeros(count, dtype=torch.bool)
    for part in parts:
        found_U |= part.of(state, count).ne(0).any(dim=1)
    return found_U


def _dead(state: State, group: Group) -> Tensor:
    reached_U = _any(state, group.makes, group.count)
    if group.kind == "width":
        return ~reached_U
    unread_U = ~_any(state, group.reads, group.count)
    if group.kind in ("units", "rank"):
        return unread_U | ~reached_U
    left_U = ~reached_U & ~unread_U
    carrier = _carrier(state, group, left_U)
    if carrier is not None:
        left_U[carrier] = False
    return unread_U | left_U


def _carrier(state: State, group: Group, among_U: Tensor) -> int | None:
    """Of constant channels the one that can be all of them; none where all of them are zero."""
    size_U = group.act(group.bias.of(state, group.count)).abs().amax(dim=1) * among_U
    number = int(size_U.argmax())
    return number if size_U[number] > 0 else None


def _spared(group: Group, new_U: Tensor, gone_U: Tensor) -> Tensor:
    """The new dead units without those that must stay: a layer of nothing is none."""
    step = 2 if group.kind == "width" else 1
    left = group.count - int((gone_U | new_U).sum())
    missing = (step - left) if left < step else left % step
    new_U[new_U.nonzero().flatten()[:missing]] = False
    return new_U


def _release(state: State, group: Group, gone_U: Tensor) -> None:
    """Make up for constants among units that go, then set all that they have to zero."""
    constant_U = gone_U & ~_any(state, group.makes, group.count)
    if group.kind == "width":
        _fold_width(state, group, gone_U)
    elif group.kind == "units":
        _fold_into_bias(state, group, constant_U)
    elif group.kind == "channels":
        _fold_into_channel(state, group, constant_U, gone_U)
    numbers = gone_U.nonzero().flatten()
    for part in group.parts:
        part.clear(state, numbers)


def _fold_into_bias(state: State, group: Group, constant_U: Tensor) -> None:
    (reads,) = group.reads
    values_UK = group.act(group.bias.of(state, group.count)).expand(-1, reads.size)
    for norm in group.norms:
        scale, shift = _affine(state, norm)
        values_UK = values_UK * scale.view_as(values_UK) + shift.view_as(values_UK)
    columns = reads.places(constant_U.nonzero().flatten()).flatten()
    # Of a convolution over single states the kernel's one tap is flattened away.
    added = state[reads.tensor][:, columns].flatten(1) @ values_UK[constant_U].flatten()
    into = reads.tensor.removesuffix("weight") + "bias"
    state[into] = state[into] + added


def _fold_into_channel(state: State, group: Group, constant_U: Tensor, gone_U: Tensor) -> None:
    (reads,) = group.reads
    staying_U = ~gone_U & ~_any(state, group.makes, group.count)
    carrier = _carrier(state, group, staying_U)
    if carrier is None:
        return
    values_U = group.act(group.bias.of(state, group.count)).flatten()
    ratios_U = values_U[constant_U] / values_U[carrier]
    kernels_OUKK = state[reads.tensor]
    kernels_OUKK[:, carrier] += torch.einsum("oukl,u->okl", kernels_OUKK[:, constant_U], ratios_U)


def _fold_width(state: State, group: Group, gone_U: Tensor) -> None:
    """A coordinate of zeros is a constant behind the last batch norm: into the pooling's biases."""
    (norm,) = group.norms
    _, shift = _affine(state, norm)
    for name in ("head.pool.hidden", "head.pool.output"):
        added = state[f"{name}.weight"][:, gone_U] @ shift[gone_U]
        state[f"{name}.bias"] = state[f"{name}.bias"] + added


def _affine(state: State, norm: str) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as scale and shift."""
    weight, bias, mean, variance = (state[f"{norm}.{what}"] for what in NORM_TENSORS)
    scale = weight * torch.rsqrt(variance + NORM_EPS)
    return scale, bias - mean * scale


# --- which units are worth least ------------------------------------------------------------------


def unit_importance(student: Student, clips: Iterable[Tensor]) -> dict[str, Tensor]:
    """How much a clip's score changes if a unit gives nothing: its square, mean over the clips.

    To first order: (sum of gradient x weight over the weights that read the unit)^2, which is its
    output times the gradient there (Molchanov et al. 2019, equation 8, for a gate). The gradient is
    the score's own, of one clip at a time, in MOS: that is the Taylor term of the squared distance
    to the score before, and needs no label. ``clips`` are waves (1, 122880). By group, float32
    (units,), MOS squared.
    """
    student = copy.deepcopy(student).eval().requires_grad_(True)
    groups = layout_of(student).groups
    sums = {group.name: torch.zeros(group.count) for group in groups}
    clip_count = 0
    for wave_1T in clips:
        student.zero_grad(set_to_none=True)
        student(wave_1T).sum().backward()
        products = {
            name: (weight.detach() * weight.grad).cpu()
            for name, weight in student.named_parameters()
            if weight.grad is not None
        }
        for group in groups:
            changes = [part.of(products, group.count).sum(dim=1) for part in group.gates]
            sums[group.name] += torch.stack(changes).sum(dim=0).square()
        clip_count += 1
    if not clip_count:
        raise UserError("no clips to measure the units' importance by")
    return {name: total / clip_count for name, total in sums.items()}


def choose_units(
    student: Student, importance: Mapping[str, Tensor], keep: float
) -> dict[str, Tensor]:
    """The units to remove so that a share ``keep`` (0 to 1) of the multiply-adds is left.

    Always those go next whose importance is least for the multiply-adds that they cost then:
    in blocks, because hardware computes blocks. ``UserError`` where so little cannot be reached.
    """
    layout = layout_of(student)
    ordered = {name: values_U.cpu().double().sort() for name, values_U in importance.items()}
    sums = {name: functional.pad(order.values.cumsum(0), (1, 0)) for name, order in ordered.items()}
    counts = layout.counts
    goal = keep * layout.macs(counts)
    while (now := layout.macs(counts)) > goal:
        costs = {}
        for group in layout.groups:
            have = counts[group.name]
            left = have - _step(group, have)
            saved = now - layout.macs({**counts, group.name: left})
            if saved > 0:
                sums_U = sums[group.name]
                worth = float(sums_U[group.count - left] - sums_U[group.count - have])
                costs[group.name, left] = worth / saved
        if not costs:
            raise UserError(
                f"cannot keep only {keep:.0%} of the multiply-adds: every group is down to a part "
                f"in {LEAST_SHARE}"
            )
        name, left = min(costs, key=costs.__getitem__)
        counts[name] = left
    gone = {group.name: torch.zeros(group.count, dtype=torch.bool) for group in layout.groups}
    for group in layout.groups:
        going = ordered[group.name].indices[: group.count - counts[group.name]]
        gone[group.name][going] = True
    return gone


def _step(group: Group, left: int) -> int:
    """How many units go next: to a whole number of blocks, then a block; none at the end."""
    step = left % group.block or group.block
    least = max(group.block, -(-group.count // LEAST_SHARE))
    return step if left - step >= least else 0


# --- removal --------------------------------------------------------------------------------------


@torch.no_grad()
def remove_units(model: Model, units: Units, layout: Layout | None = None) -> Model:
    """A smaller model without these units, on the CPU; the model itself stays as it is.

    With ``dead_units`` its scores are the same but for rounding. Of any other unit what it gave is
    missing, unless that was a constant; a coordinate of the width counts as zero in the layer
    norms. Of every group at least one unit must be left. ``layout``: of a model that ``layout_of``
    does not know.
    """
    layout = layout or layout_of(model)
    state, counts = _copy(model), layout.counts
    going = [group for group in layout.groups if group.name in units and units[group.name].any()]
    for group in going:
        _release(state, group, units[group.name])
    for group in going:
        kept = (~units[group.name]).nonzero().flatten()
        counts[group.name] = len(kept)
        for part in group.parts:
            part.keep(state, kept)
    smaller: Model = layout.build(state, counts)
    return smaller


def removed(units: Units) -> dict[str, str]:
    """What goes, for people and ``model.json``: group name to "left/all", where any unit goes."""
    return {
        name: f"{int((~gone_U).sum())}/{len(gone_U)}"
        for name, gone_U in units.items()
        if gone_U.any()
    }
