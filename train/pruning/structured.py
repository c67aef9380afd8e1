"""Structured removal: what a pruned model no longer needs is taken out, so that it is faster.

Whole units go: a convolution's output channels, attention heads, feed-forward units, hidden units
of the pooling, coordinates of the tokens' width. Of a student all of these; of an XLS-R encoder
heads and feed-forward units (its convolutions and its width run through layer norms over
all channels and a grouped convolution).

Two ways to say which. ``dead_units``: those whose weights are gone, so that scores stay what they
are. A unit is dead if nothing reads it, or if nothing reaches it: then it gives a constant, which
goes into the bias of what reads it. A convolution pads its input with zeros along time, where a
constant is not constant: there all constant channels of a layer become one. ``choose_units``: those
that change the score least for what they cost.

A unit of the width is dead only if its position codes are zero too; weights alone never kill one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_specs.io.errors import UserError
from data_specs.sample import CROP_SAMPLES
from train.models.head import Slim
from train.models.student import LEAK, Student, StudentConfig, macs_of
from train.models.xlsr import Encoder, encoder_of, flops

Model = TypeVar("Model", Student, Encoder)
State = MutableMapping[str, Tensor]

Units = Mapping[str, Tensor]
"""Group name to bool (units,), True where a unit goes. Groups that keep all may be left out."""

LARGEST_BLOCK = 16
"""Units that are chosen together: AVX-512 convolves 16 channels at once, so that 17 cost as 32."""

LEAST_SHARE = 8
"""Of a group at least one unit in so many is left by ``choose_units``."""

NORM_EPS = 1e-5
"""Of ``nn.BatchNorm1d``."""

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")

Kind = Literal["units", "channels", "width"]
"""How a constant unit is made up for: in a bias; in another constant channel; it is zero anyway."""


@dataclass(frozen=True)
class Part:
    """Where a group's units are along one side of a tensor: runs of them, ``size`` values each."""

    tensor: str
    side: int
    size: int = 1
    starts: tuple[int, ...] = (0,)

    def places(self, units_U: Tensor) -> Tensor:
        """Indices along the side, (U, values a unit), of units by number."""
        begins_US = units_U[:, None] * self.size + torch.tensor(self.starts)
        return (begins_US[..., None] + torch.arange(self.size)).flatten(1)

    def of(self, state: Mapping[str, Tensor], count: int) -> Tensor:
        """What the tensor holds for each unit: (count, rest)."""
        places = self.places(torch.arange(count)).flatten()
        picked = state[self.tensor].index_select(self.side, places)
        return picked.movedim(self.side, 0).reshape(count, -1)

    def clear(self, state: State, units_U: Tensor) -> None:
        """Set to zero what these units have, in place."""
        state[self.tensor].index_fill_(self.side, self.places(units_U).flatten(), 0.0)

    def keep(self, state: State, units_U: Tensor) -> None:
        """Leave what these units have, in order."""
        places = self.places(units_U).flatten().sort().values
        state[self.tensor] = state[self.tensor].index_select(self.side, places)


@dataclass(frozen=True)
class Group:
    """Units of one kind in one layer.

    ``parts`` go with a unit; through ``makes`` something reaches it, through ``reads`` it is read;
    ``act(bias)`` is what it gives if nothing reaches it, which passes the batch norms ``norms`` and
    belongs in the bias ``into``. Scaling ``gates`` by t scales what the unit gives by t.
    """

    name: str
    count: int
    kind: Kind
    parts: tuple[Part, ...]
    makes: tuple[Part, ...]
    reads: tuple[Part, ...]
    gates: tuple[Part, ...]
    bias: Part
    act: Callable[[Tensor], Tensor] = functional.relu
    norms: tuple[str, ...] = ()
    into: str = ""
    block: int = 1


@dataclass(frozen=True)
class Layout:
    """A model's groups from input to output, and what it is with other numbers of units.

    ``macs`` gives multiply-adds a clip of 7.68 s, ``build`` the model of a sliced state dict; both
    of units left by group name.
    """

    groups: list[Group]
    macs: Callable[[Mapping[str, int]], float]
    build: Callable[[dict[str, Tensor], Mapping[str, int]], Any]

    @property
    def counts(self) -> dict[str, int]:
        """Units by group name, all of them."""
        return {group.name: group.count for group in self.groups}


# --- where the units are --------------------------------------------------------------------------


def layout_of(model: Student | Encoder) -> Layout:
    """Where the units of a student or an XLS-R encoder are."""
    if isinstance(model, Encoder):
        return _encoder_layout(model)
    config = model.config

    def build(state: dict[str, Tensor], counts: Mapping[str, int]) -> Student:
        student = Student(_config(config, counts))
        student.load_state_dict(state)
        return student.train(model.training)

    groups = [*_channel_groups(config), *_head_groups(config)]
    return Layout(groups, lambda counts: macs_of(_config(config, counts)), build)


def _config(config: StudentConfig, counts: Mapping[str, int]) -> StudentConfig:
    """The configuration with so many units left."""
    channels = tuple(counts[f"convolutions.{n}"] for n in range(len(config.channels)))
    before, layers = config.slim, range(config.layers)
    now = Slim(
        tuple(counts[f"layers.{n}.heads"] for n in layers),
        before.head_dim,
        tuple(counts[f"layers.{n}.feedforward"] for n in layers),
        before.norm_width,
        counts["pool"],
    )
    values = config.model_dump() | {"channels": channels}
    if (counts["width"], now) != (config.dim, before):
        values |= {"dim": counts["width"], **vars(now)}
    return StudentConfig.model_validate(values)


def _block(count: int) -> int:
    """A power of two, at most a quarter of the units."""
    block = 1
    while block < LARGEST_BLOCK and 8 * block <= count:
        block *= 2
    return block


def _leaky(values: Tensor) -> Tensor:
    return functional.leaky_relu(values, LEAK)


def _same(values: Tensor) -> Tensor:
    return values


def _channel_groups(config: StudentConfig) -> list[Group]:
    """The convolutions' output channels; the last one's bins are the features of the tokens."""
    groups = []
    last = len(config.channels) - 1
    for number, count in enumerate(config.channels):
        kernels = Part(f"convolutions.{2 * number}.weight", 0)
        bias = Part(f"convolutions.{2 * number}.bias", 0)
        norms: tuple[str, ...] = ()
        reads = Part(f"convolutions.{2 * number + 2}.weight", 1)
        if number == last:
            reads = Part("head.projection.weight", 1, config.grids()[-1][0])
            norms = ("head.norm_input", "head.norm_projection")
        parts = [Part(f"{norm}.{what}", 0, reads.size) for norm in norms for what in NORM_TENSORS]
        groups.append(
            Group(
                f"convolutions.{number}",
                count,
                "units" if number == last else "channels",
                (kernels, bias, reads, *parts),
                makes=(kernels,),
                reads=(reads,),
                gates=(reads,),
                bias=bias,
                act=_leaky,
                norms=norms,
                into="head.projection.bias" if number == last else "",
                block=_block(count),
            )
        )
    return groups


def _head_groups(config: StudentConfig) -> list[Group]:
    slim = config.slim
    groups = []
    for number in range(config.layers):
        layer, inner = f"head.encoder.layers.{number}.", slim.heads[number] * slim.head_dim
        joint = [
            Part(f"{layer}self_attn.in_proj_{what}", 0, slim.head_dim, (0, inner, 2 * inner))
            for what in ("weight", "bias")
        ]
        value, bias = (Part(p.tensor, 0, slim.head_dim, (2 * inner,)) for p in joint)
        out = f"{layer}self_attn.out_proj"
        name = f"layers.{number}."
        groups.append(_heads(name, slim.heads[number], slim.head_dim, joint, value, bias, out))
        groups.append(
            _hidden(f"{name}feedforward", slim.feedforward[number], layer, "linear1", "linear2")
        )
    groups.append(_hidden("pool", slim.pool, "head.pool.", "hidden", "weight"))
    return [*groups, _width(config)]


def _heads(
    name: str, count: int, size: int, parts: Iterable[Part], value: Part, bias: Part, out: str
) -> Group:
    """Attention heads: attention weights sum to one, so that constant values come out as such."""
    reads = Part(f"{out}.weight", 1, size)
    return Group(
        f"{name}heads", count, "units", (*parts, reads), makes=(value,), reads=(reads,),
        gates=(reads,), bias=bias, act=_same, into=f"{out}.bias",
    )  # fmt: skip


def _hidden(
    name: str,
    count: int,
    prefix: str,
    first: str,
    second: str,
    act: Callable[[Tensor], Tensor] = functional.relu,
) -> Group:
    """Hidden units between two linear layers."""
    rows, bias = Part(f"{prefix}{first}.weight", 0), Part(f"{prefix}{first}.bias", 0)
    reads = Part(f"{prefix}{second}.weight", 1)
    return Group(
        name, count, "units", (rows, bias, reads), makes=(rows,), reads=(reads,), gates=(reads,),
        bias=bias, act=act, into=f"{prefix}{second}.bias", block=_block(count),
    )  # fmt: skip


def _width(config: StudentConfig) -> Group:
    """The tokens' coordinates: the same in every layer, because of the sums around its parts."""
    layers = [f"head.encoder.layers.{number}." for number in range(config.layers)]
    gates = [Part(f"head.projection.{what}", 0) for what in ("weight", "bias")]
    reads = [Part(f"head.pool.{name}.weight", 1) for name in ("hidden", "output")]
    for layer in layers:
        for name in ("self_attn.out_proj", "linear2", "norm1", "norm2"):
            gates += [Part(f"{layer}{name}.{what}", 0) for what in ("weight", "bias")]
        names = ("self_attn.in_proj_weight", "linear1.weight")
        reads += [Part(f"{layer}{name}", 1) for name in names]
    positions = Part("head.positions", 2)
    norms = [Part(f"head.norm_output.{what}", 0) for what in NORM_TENSORS]
    return Group(
        "width", config.dim, "width", (*gates, positions, *reads, *norms),
        makes=(*gates, positions), reads=tuple(reads), gates=tuple(gates), bias=gates[1],
        norms=("head.norm_output",), block=max(2, _block(config.dim)),
    )  # fmt: skip


def _encoder_layout(encoder: Encoder) -> Layout:
    groups = []
    layers: Any = encoder.encoder.layers
    for number, layer in enumerate(layers):
        where, name = f"encoder.layers.{number}.", f"layers.{number}."
        size = layer.attention.head_dim
        projections = [f"{where}attention.{letter}_proj" for letter in "qkv"]
        parts = [Part(f"{p}.{what}", 0, size) for p in projections for what in ("weight", "bias")]
        count = layer.attention.v_proj.out_features // size
        out = f"{where}attention.out_proj"
        groups.append(_heads(name, count, size, parts, parts[-2], parts[-1], out))
        wide = layer.feed_forward
        units = wide.intermediate_dense.out_features
        names = (f"{where}feed_forward.", "intermediate_dense", "output_dense")
        act = wide.intermediate_act_fn
        groups.append(_hidden(f"{name}feedforward", units, *names, act))

    def build(state: dict[str, Tensor], _: Mapping[str, int]) -> Encoder:
        dtype = encoder.feature_projection.projection.weight.dtype
        return encoder_of(encoder.config, encoder.layers, state, dtype)

    return Layout(groups, lambda counts: _encoder_macs(encoder, counts), build)


def _encoder_macs(encoder: Encoder, counts: Mapping[str, int]) -> float:
    config, steps = encoder.config, CROP_SAMPLES
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        steps = (steps - kernel) // stride + 1
    below = flops(config, 0, CROP_SAMPLES)
    macs, width = sum(below.values()) / 2, config.hidden_size
    layers: Any = encoder.encoder.layers
    for number, layer in enumerate(layers):
        inner = counts[f"layers.{number}.heads"] * layer.attention.head_dim
        hidden = counts[f"layers.{number}.feedforward"]
        macs += steps * width * (4 * inner + 2 * hidden) + 2 * steps**2 * inner
    return macs


# --- which units are dead -------------------------------------------------------------------------


@torch.no_grad()
def dead_units(model: Student | Encoder) -> dict[str, Tensor]:
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


def _any(state: State, parts: Iterable[Part], count: int) -> Tensor:
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
    if group.kind == "units":
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
    else:
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
    added = state[reads.tensor][:, columns] @ values_UK[constant_U].flatten()
    state[group.into] = state[group.into] + added


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
    judged = 0
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
        judged += 1
    if not judged:
        raise UserError("no clips to judge the units by")
    return {name: total / judged for name, total in sums.items()}


def choose_units(
    model: Student | Encoder, importance: Mapping[str, Tensor], keep: float
) -> dict[str, Tensor]:
    """The units to remove so that a share ``keep`` (0 to 1) of the multiply-adds is left.

    Always those go next whose importance is least for the multiply-adds that they cost then:
    in blocks, because hardware computes blocks. ``ValueError`` where so little cannot be reached.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep {keep}: must be above 0 and at most 1")
    layout = layout_of(model)
    queues = {
        group.name: _Queue(group, importance[group.name].cpu().double()) for group in layout.groups
    }
    counts = layout.counts
    goal = keep * layout.macs(counts)
    while layout.macs(counts) > goal:
        name = _cheapest(layout, queues, counts)
        if name is None:
            raise UserError(
                f"cannot keep only {keep:.0%} of the multiply-adds: every group is down to a part "
                f"in {LEAST_SHARE}"
            )
        queues[name].take()
        counts[name] = queues[name].left
    return {name: queue.gone_U for name, queue in queues.items()}


class _Queue:
    """A group's units, the least important first."""

    def __init__(self, group: Group, importance_U: Tensor) -> None:
        self.block = group.block
        self.least = max(group.block, -(-group.count // LEAST_SHARE))
        self.left = group.count
        self.gone_U = torch.zeros(group.count, dtype=torch.bool)
        self._order = importance_U.argsort()
        self._sums = torch.cat([torch.zeros(1, dtype=torch.float64), importance_U.sort().values])
        self._sums = self._sums.cumsum(0)

    @property
    def step(self) -> int:
        """How many go next: to a whole number of blocks, then a block; none at the end."""
        step = self.left % self.block or self.block
        return step if self.left - step >= self.least else 0

    @property
    def worth(self) -> float:
        """Importance of those that go next, together."""
        gone = len(self._order) - self.left
        return float(self._sums[gone + self.step] - self._sums[gone])

    def take(self) -> None:
        """Let them go."""
        gone = len(self._order) - self.left
        self.gone_U[self._order[gone : gone + self.step]] = True
        self.left -= self.step


def _cheapest(
    layout: Layout, queues: Mapping[str, _Queue], counts: Mapping[str, int]
) -> str | None:
    """The group whose next block is worth least for its multiply-adds."""
    now = layout.macs(counts)
    prices = {}
    for name, queue in queues.items():
        saved = now - layout.macs({**counts, name: queue.left - queue.step})
        if queue.step and saved > 0:
            prices[name] = queue.worth / saved
    return min(prices, key=lambda name: prices[name]) if prices else None


# --- removal --------------------------------------------------------------------------------------


@torch.no_grad()
def shrink(model: Model, units: Units) -> Model:
    """A smaller model without these units, on the CPU; the model itself stays as it is.

    With ``dead_units`` its scores are the same but for rounding. Of any other unit what it gave is
    missing, unless that was a constant; a coordinate of the width counts as zero in the layer
    norms. ``ValueError`` for a group that the model has not, or of which nothing would be left.
    """
    layout = layout_of(model)
    _require_fit(layout, units)
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


def _require_fit(layout: Layout, units: Units) -> None:
    counts = layout.counts
    for name, gone_U in units.items():
        if name not in counts:
            raise ValueError(f"no units {name!r}: there are {', '.join(counts)}")
        if gone_U.shape != (counts[name],) or gone_U.all():
            raise ValueError(
                f"units {name!r}: {int(gone_U.sum())} of {counts[name]} cannot go (given for "
                f"{len(gone_U)}): at least one must stay"
            )


def removed(units: Units) -> dict[str, str]:
    """What goes, for people and ``model.json``: group name to "left/all", where any unit goes."""
    return {
        name: f"{int((~gone_U).sum())}/{len(gone_U)}"
        for name, gone_U in units.items()
        if gone_U.any()
    }
