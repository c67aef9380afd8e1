"""Where the units of a network are, which structured pruning removes whole.

Units are a convolution's output channels, attention heads, feed-forward units, hidden units of the
pooling, coordinates of the tokens' width. Of a student all of these; of one of low rank the ranks
of its convolutions instead; of an XLS-R encoder heads and feed-forward units (its convolutions and
its width run through layer norms over all channels and a grouped convolution); of a conformer these
and the channels of its layers' convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_specs.sample import CROP_SAMPLES
from train.models.encoders.conformer import Conformer, ConformerConfig, conformer_macs
from train.models.head import Slim
from train.models.student import LEAK, Student, StudentConfig, macs_with
from train.models.xlsr import Encoder, encoder_of, flops

State = MutableMapping[str, Tensor]

LARGEST_BLOCK = 16
"""Units that are chosen together: AVX-512 convolves 16 channels at once, so that 17 cost as 32."""

ATTENTION = (("q_proj", "k_proj", "v_proj", "out_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"))
FEED_FORWARD = (("fc1", "fc2"), ("intermediate_dense", "output_dense"), ("linear1", "linear2"))
ACTIVATIONS = ("activation_fn", "intermediate_act_fn", "activation")
"""Names of what a layer of ``transformers`` has."""

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")

Kind = Literal["units", "channels", "width", "rank"]
"""How a constant unit is made up for: in a bias; in another constant channel; the others are zero
anyway."""


@dataclass(frozen=True)
class Slices:
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
    belongs in the bias beside the weight ``reads``. Scaling ``gates`` by t scales its output by t.
    """

    name: str
    count: int
    kind: Kind
    parts: tuple[Slices, ...]
    makes: tuple[Slices, ...]
    reads: tuple[Slices, ...]
    gates: tuple[Slices, ...]
    bias: Slices
    act: Callable[[Tensor], Tensor] = functional.relu
    norms: tuple[str, ...] = ()
    block: int = 1


@dataclass(frozen=True)
class Layout:
    """A model's groups from input to output, and what it is with other numbers of units.

    ``macs`` gives multiply-adds a clip of 7.68 s, ``build`` the model of a sliced state dict; both
    of units left by group name. For ``macs`` these may be tensors: it is then one too.
    """

    groups: list[Group]
    macs: Callable[[Mapping[str, Any]], Any]
    build: Callable[[dict[str, Tensor], Mapping[str, int]], Any]

    @property
    def counts(self) -> dict[str, int]:
        """Units by group name, all of them."""
        return {group.name: group.count for group in self.groups}


def layout_of(model: nn.Module) -> Layout:
    """Where the units of a student, an XLS-R encoder or a conformer are."""
    if isinstance(model, Encoder):
        return _encoder_layout(model)
    if isinstance(model, Conformer):
        return _conformer_layout(model)
    if not isinstance(model, Student):
        raise TypeError(f"{type(model).__name__} has no layout of its own")
    config = model.config

    def build(state: dict[str, Tensor], counts: Mapping[str, int]) -> Student:
        student = Student(_config(config, counts))
        student.load_state_dict(state)
        return student.train(model.training)

    ranks = enumerate(config.ranks or ())
    groups = [rank_group(f"convolutions.{2 * number}", rank) for number, rank in ranks]
    if not groups:
        groups = [*_channel_groups(config), *_head_groups(config)]
    return Layout(groups, lambda counts: macs_with(config, *_sizes(config, counts)), build)


def _sizes(config: StudentConfig, counts: Mapping[str, Any]) -> tuple[Any, Any, Any, Slim]:
    """Channels, ranks, width and the head's dimensions with so many units left."""
    numbers, before = range(len(config.channels)), config.slim
    if config.ranks:
        ranks = tuple(counts[f"convolutions.{2 * n}.rank"] for n in numbers)
        return config.channels, ranks, config.dim, before
    channels = tuple(counts[f"convolutions.{n}"] for n in numbers)
    layers = range(config.layers)
    now = Slim(
        tuple(counts[f"layers.{n}.heads"] for n in layers),
        before.head_dim,
        tuple(counts[f"layers.{n}.feedforward"] for n in layers),
        before.norm_width,
        counts["pool"],
    )
    return channels, None, counts["width"], now


def _config(config: StudentConfig, counts: Mapping[str, int]) -> StudentConfig:
    """The configuration with so many units left."""
    channels, ranks, width, now = _sizes(config, counts)
    values = config.model_dump() | {"channels": channels, "ranks": ranks}
    if (width, now) != (config.dim, config.slim):
        values |= {"dim": width, **vars(now)}
    return StudentConfig.model_validate(values)


def rank_group(name: str, count: int) -> Group:
    """What is between the two layers that one of this name was split into."""
    makes, reads = (Slices(f"{name}.{side}.weight", side) for side in range(2))
    return Group(
        f"{name}.rank", count, "rank", (makes, reads), makes=(makes,), reads=(reads,),
        gates=(reads,), bias=reads, block=_block(count),
    )  # fmt: skip


def _block(count: int) -> int:
    """A power of two, at most a quarter of the units."""
    block = 1
    while block < LARGEST_BLOCK and 8 * block <= count:
        block *= 2
    return block


def _channel_groups(config: StudentConfig) -> list[Group]:
    """The convolutions' output channels; the last one's bins are the features of the tokens."""
    groups = []
    last = len(config.channels) - 1
    for number, count in enumerate(config.channels):
        kernels = Slices(f"convolutions.{2 * number}.weight", 0)
        bias = Slices(f"convolutions.{2 * number}.bias", 0)
        norms: tuple[str, ...] = ()
        reads = Slices(f"convolutions.{2 * number + 2}.weight", 1)
        if number == last:
            reads = Slices("head.projection.weight", 1, config.grids()[-1][0])
            norms = ("head.norm_input", "head.norm_projection")
        parts = [Slices(f"{norm}.{what}", 0, reads.size) for norm in norms for what in NORM_TENSORS]
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
                act=partial(functional.leaky_relu, negative_slope=LEAK),
                norms=norms,
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
            Slices(f"{layer}self_attn.in_proj_{what}", 0, slim.head_dim, (0, inner, 2 * inner))
            for what in ("weight", "bias")
        ]
        values = [Slices(part.tensor, 0, slim.head_dim, (2 * inner,)) for part in joint]
        reads = Slices(f"{layer}self_attn.out_proj.weight", 1, slim.head_dim)
        name = f"layers.{number}."
        groups.append(heads_group(f"{name}heads", slim.heads[number], joint, values, reads))
        groups.append(
            hidden_group(
                f"{name}feedforward", slim.feedforward[number], layer, "linear1", "linear2"
            )
        )
    groups.append(hidden_group("pool", slim.pool, "head.pool.", "hidden", "weight"))
    return [*groups, _width(config)]


def heads_group(
    name: str, count: int, parts: Iterable[Slices], values: Iterable[Slices], reads: Slices
) -> Group:
    """Attention heads: attention weights sum to one, so that constant values come out as such."""
    value, bias = values
    return Group(
        name, count, "units", (*parts, reads), makes=(value,), reads=(reads,), gates=(reads,),
        bias=bias, act=nn.Identity(),
    )  # fmt: skip


def hidden_group(
    name: str,
    count: int,
    prefix: str,
    first: str,
    second: str,
    act: Callable[[Tensor], Tensor] = functional.relu,
) -> Group:
    """Hidden units between two linear layers."""
    rows, bias = Slices(f"{prefix}{first}.weight", 0), Slices(f"{prefix}{first}.bias", 0)
    reads = Slices(f"{prefix}{second}.weight", 1)
    return Group(
        name, count, "units", (rows, bias, reads), makes=(rows,), reads=(reads,), gates=(reads,),
        bias=bias, act=act, block=_block(count),
    )  # fmt: skip


def attention_group(name: str, where: str, module: Any, ends: Sequence[str]) -> Group:
    """Heads of an attention of ``transformers``, its four linear layers called ``ends``."""
    size, there = module.head_dim, dict(module.named_parameters())
    names = [f"{end}.{what}" for end in ends[:3] for what in ("weight", "bias")]
    parts = [Slices(where + own, 0, size) for own in names if own in there]
    reads = Slices(f"{where}{ends[3]}.weight", 1, size)
    return heads_group(name, module.v_proj.out_features // size, parts, parts[-2:], reads)


def feed_forward_group(name: str, where: str, module: Any, ends: Sequence[str]) -> Group:
    """Hidden units of a feed-forward part of ``transformers``, its two layers called ``ends``."""
    acts = (getattr(module, name) for name in ACTIVATIONS if hasattr(module, name))
    count = module.get_submodule(ends[0]).out_features
    return hidden_group(name, count, where, ends[0], ends[1], next(acts, functional.relu))


def _width(config: StudentConfig) -> Group:
    """The tokens' coordinates: the same in every layer, because of the sums around its parts."""
    layers = [f"head.encoder.layers.{number}." for number in range(config.layers)]
    gates = [Slices(f"head.projection.{what}", 0) for what in ("weight", "bias")]
    reads = [Slices(f"head.pool.{name}.weight", 1) for name in ("hidden", "output")]
    for layer in layers:
        for name in ("self_attn.out_proj", "linear2", "norm1", "norm2"):
            gates += [Slices(f"{layer}{name}.{what}", 0) for what in ("weight", "bias")]
        names = ("self_attn.in_proj_weight", "linear1.weight")
        reads += [Slices(f"{layer}{name}", 1) for name in names]
    positions = Slices("head.positions", 2)
    norms = [Slices(f"head.norm_output.{what}", 0) for what in NORM_TENSORS]
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
        attention, wide = layer.attention, layer.feed_forward
        groups += [
            attention_group(f"{name}heads", f"{where}attention.", attention, ATTENTION[0]),
            feed_forward_group(
                f"{name}feedforward", f"{where}feed_forward.", wide, FEED_FORWARD[1]
            ),
        ]

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


def _conformer_layout(conformer: Conformer) -> Layout:
    config = conformer.config
    groups = []
    for number in range(config.layers):
        units, name = config.units(number), f"layers.{number}."
        groups += [
            _relative_heads(f"{name}heads", units["heads"], config, f"{name}self_attn."),
            _conv_channels(f"{name}channels", units["channels"], f"{name}conv."),
        ]
        for part in "12":
            prefix, ends = f"{name}feed_forward{part}.", ("linear1", "linear2")
            count = units[f"feedforward{part}"]
            groups.append(
                hidden_group(f"{name}feedforward{part}", count, prefix, *ends, functional.silu)
            )

    def smaller(counts: Mapping[str, int]) -> ConformerConfig:
        return config.model_copy(update={"kept": dict(counts)})

    def build(state: dict[str, Tensor], counts: Mapping[str, int]) -> Conformer:
        found = Conformer(smaller(counts))
        found.load_state_dict(state)
        return found.train(conformer.training)

    return Layout(groups, lambda counts: conformer_macs(smaller(counts), CROP_SAMPLES), build)


def _relative_heads(name: str, count: int, config: ConformerConfig, prefix: str) -> Group:
    """Heads with a key of relative positions and two biases each."""
    size = config.width // config.heads
    ends = [(f"{letter}_proj", what) for letter in "qkv" for what in ("weight", "bias")]
    parts = [Slices(f"{prefix}{end}.{what}", 0, size) for end, what in ends]
    own = [Slices(f"{prefix}bias_{letter}", 0) for letter in "uv"]
    own.append(Slices(f"{prefix}relative_k_proj.weight", 0, size))
    reads = Slices(f"{prefix}o_proj.weight", 1, size)
    return heads_group(name, count, [*own, *parts], parts[-2:], reads)


def _conv_channels(name: str, count: int, prefix: str) -> Group:
    """Channels between a gated linear unit and the batch norm behind the depthwise convolution.

    What the gate lets through is not constant where no weight makes it; where the norm scales it by
    zero it is.
    """
    kinds = ("weight", "bias")
    parts = [Slices(f"{prefix}pointwise_conv1.{what}", 0, 1, (0, count)) for what in kinds]
    parts += [Slices(f"{prefix}depthwise_conv.{what}", 0) for what in kinds]
    norm = [Slices(f"{prefix}norm.{what}", 0) for what in NORM_TENSORS]
    reads = Slices(f"{prefix}pointwise_conv2.weight", 1)
    return Group(
        name, count, "units", (*parts, *norm, reads), makes=(norm[0],), reads=(reads,),
        gates=(reads,), bias=norm[1], act=functional.silu, block=_block(count),
    )  # fmt: skip
