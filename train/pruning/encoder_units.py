"""Where the units of any encoder of speech are: heads, feed-forward units, or ranks.

Of a conformer as ``layout_of`` has it, of a student's encoder its channels, heads and feed-forward
units (its width is what the tasks' heads read). Of a model of ``transformers`` they are found by
the names of its linear layers; attention that has more than these four (WavLM's) keeps its heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor, nn

from data_specs.io.errors import UserError
from train.models.encoders.conformer import Conformer
from train.models.encoders.interface import SpeechEncoder
from train.models.encoders.student_encoder import StudentEncoder
from train.models.low_rank import split_layers
from train.models.student import Student
from train.pruning.joint import of_low_rank
from train.pruning.units import (
    ATTENTION,
    FEED_FORWARD,
    Group,
    Layout,
    attention_group,
    feed_forward_group,
    layout_of,
    rank_group,
)


def encoder_layout(encoder: SpeechEncoder) -> Layout:
    """Where the units of an encoder are. ``UserError`` for one that has none."""
    if isinstance(encoder, StudentEncoder):
        return _of_student(encoder)
    ranks = list(_rank_groups(encoder))
    if isinstance(encoder, Conformer) and not ranks:
        return layout_of(encoder)
    groups = ranks or _groups(encoder)
    if not groups:
        raise UserError(f"an encoder of kind {encoder.kind} has no units that could be removed")
    return _linear_layout(encoder, groups)


def counted_macs(encoder: SpeechEncoder) -> float:
    """Multiply-adds over the seconds over which an encoder's are counted."""
    return encoder.sizes()["macs_per_second"] * _counted_s(encoder)


def _counted_s(encoder: SpeechEncoder) -> float:
    return min(encoder.counted_s, encoder.longest_s)


def split_encoder(encoder: SpeechEncoder) -> None:
    """Make two of each linear layer of attention and feed-forward parts, in place.

    Of a student the convolutions. ``UserError`` for an encoder that has none.
    """
    if isinstance(encoder, StudentEncoder):
        encoder.student = of_low_rank(encoder.student)
        return
    names = [f"{where}{end}" for where, _, ends in _parts(encoder) for end in ends]
    if not split_layers(encoder, names):
        raise UserError(f"an encoder of kind {encoder.kind} has no linear layers to split")


def _parts(encoder: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Prefix, module and names of the linear layers of every attention and feed-forward part."""
    for name, module in encoder.named_modules():
        has = dict(module.named_children())
        for ends in (*ATTENTION, *FEED_FORWARD):
            plain = ends in FEED_FORWARD or has.keys() <= {*ends, "relative_k_proj"}
            if plain and all(isinstance(has.get(end), nn.Linear | nn.Sequential) for end in ends):
                yield f"{name}.", module, ends


def _groups(encoder: SpeechEncoder) -> list[Group]:
    heads = [
        attention_group(f"{where}heads", where, module, ends)
        for where, module, ends in _parts(encoder)
        if ends in ATTENTION
    ]
    return heads + [
        feed_forward_group(f"{where}units", where, module, ends)
        for where, module, ends in _parts(encoder)
        if ends in FEED_FORWARD
    ]


def _rank_groups(encoder: SpeechEncoder) -> Iterator[Group]:
    for where, module, ends in _parts(encoder):
        for end in ends:
            layer = module.get_submodule(end)
            if isinstance(layer, nn.Sequential):
                yield rank_group(f"{where}{end}", len(layer[0].weight))  # type: ignore[arg-type]


def _linear_layout(encoder: SpeechEncoder, groups: list[Group]) -> Layout:
    """Of groups between linear layers, each of which is applied to every frame."""
    frames = int(_counted_s(encoder) / encoder.frame_s)
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    names = {part.tensor for group in groups for part in group.parts}
    matrices = {name: shapes[name] for name in names if len(shapes[name]) == 2}

    def varying(counts: Mapping[str, Any]) -> Any:
        sizes: dict[str, list[Any]] = {name: list(shape) for name, shape in matrices.items()}
        attention: Any = 0
        for group in groups:
            for part in group.parts:
                if part.tensor in sizes:
                    sizes[part.tensor][part.side] = counts[group.name] * part.size
            if group.name.endswith("heads"):  # its products of queries, keys and values
                attention = attention + 2 * frames**2 * counts[group.name] * group.reads[0].size
        return frames * sum(prod(size) for size in sizes.values()) + attention

    def build(state: dict[str, Tensor], _: Mapping[str, int]) -> SpeechEncoder:
        return type(encoder).build(encoder.about(), state).train(encoder.training)

    whole = Layout(groups, varying, build)
    rest = counted_macs(encoder) - varying(whole.counts)
    return replace(whole, macs=lambda counts: rest + varying(counts))


def _of_student(encoder: StudentEncoder) -> Layout:
    """The student's own layout but for the width and the pooling, which the tasks do not share."""
    own = layout_of(encoder.student)
    kept = {"width", "pool"}
    groups = [_under("student.", group) for group in own.groups if group.name not in kept]
    fixed = {name: count for name, count in own.counts.items() if name in kept}

    def build(state: dict[str, Tensor], counts: Mapping[str, int]) -> SpeechEncoder:
        bare = {name.removeprefix("student."): tensor for name, tensor in state.items()}
        student: Student = own.build(bare, {**fixed, **counts})
        return StudentEncoder(student).train(encoder.training)

    rest = counted_macs(encoder) - own.macs(own.counts)  # the pooling is not heard
    return Layout(groups, lambda counts: rest + own.macs({**fixed, **counts}), build)


def _under(prefix: str, group: Group) -> Group:
    """The same group in a module that has the network by a name."""
    names = ("parts", "makes", "reads", "gates")
    slices: dict[str, Any] = {
        name: tuple(replace(one, tensor=prefix + one.tensor) for one in getattr(group, name))
        for name in names
    }
    bias = replace(group.bias, tensor=prefix + group.bias.tensor)
    return replace(group, bias=bias, norms=tuple(prefix + n for n in group.norms), **slices)
