"""The layer-drop baseline: the top Transformer layers go whole, the rest is fine-tuned.

What is left is an ordinary, smaller network: a student with fewer layers, or an XLS-R encoder that
is cut further down, so that its head reads an earlier hidden state. At least one layer stays, which
bounds the sizes that can be had.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from torch import nn

from data_specs.io.errors import UserError
from train.models.student import Student
from train.pruning.subject import TeacherNetwork


def layers_of(network: Student | TeacherNetwork) -> tuple[str, nn.ModuleList]:
    """The Transformer layers of a network, after the beginning of their names.

    ``UserError`` for an encoder of which two layers are read.
    """
    if isinstance(network, Student):
        return "head.encoder.layers.", network.head.encoder.layers
    encoder = network.encoder
    if len(encoder.layers) > 1:
        raise UserError(f"the head reads layers {encoder.layers}: none of them can be dropped")
    layers: nn.ModuleList = encoder.encoder.layers
    return "encoder.encoder.layers.", layers


def weights_by_layers(network: Student | TeacherNetwork, names: Iterable[str]) -> list[int]:
    """How many weights of ``names`` are left with the first 1, 2, ... layers."""
    prefix, layers = layers_of(network)
    others, of_layers = 0, [0] * len(layers)
    for name in names:
        weights = network.get_parameter(name).numel()
        if name.startswith(prefix):
            of_layers[int(name.removeprefix(prefix).split(".")[0])] += weights
        else:
            others += weights
    return [others + left for left in accumulate(of_layers)]


def layers_within(by_layers: list[int], target: int) -> int:
    """The most layers with at most ``target`` weights; at least one."""
    return max([1, *(count for count, left in enumerate(by_layers, 1) if left <= target)])


def keep_layers(network: Student | TeacherNetwork, count: int) -> None:
    """Drop all layers but the first ``count``, in place."""
    kept = layers_of(network)[1][:count]
    if isinstance(network, TeacherNetwork):
        network.encoder.encoder.layers, network.encoder.layers = kept, (count,)
        return
    network.head.encoder.layers, network.head.encoder.num_layers = kept, count
    changes: dict[str, Any] = {"layers": count}
    for name in ("heads", "feedforward"):  # which may be given layer by layer
        given = getattr(network.config, name)
        changes[name] = given[:count] if isinstance(given, tuple) else given
    network.config = network.config.model_copy(update=changes)
