"""The layer-drop baseline: the top Transformer layers go whole, the rest is fine-tuned.

What is left is an ordinary, smaller network: a student with fewer layers, or an XLS-R encoder that
is cut further down, so that its head reads an earlier hidden state. At least one layer stays, which
bounds the sizes that can be had.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from data_specs.io.errors import UserError
from train.models.student import Student, StudentConfig
from train.pruning.masks import encoder_in


def layers_of(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """The Transformer layers of a student or teacher, after the beginning of their names.

    ``ValueError`` for another network, or an encoder of which two layers are read.
    """
    if isinstance(network, Student):
        return "head.encoder.layers.", network.head.encoder.layers
    found = encoder_in(network)
    if found is None:
        raise ValueError(f"{type(network).__name__} has no layers to drop: give a student or XLS-R")
    prefix, encoder = found
    if len(encoder.layers) > 1:
        raise UserError(f"the head reads layers {encoder.layers}: none of them can be dropped")
    layers: nn.ModuleList = encoder.encoder.layers
    return f"{prefix}encoder.layers.", layers


def weights_by_layers(network: nn.Module, names: Iterable[str]) -> list[int]:
    """How many weights of ``names`` are left with the first 1, 2, ... layers."""
    prefix, layers = layers_of(network)
    parameters, names = dict(network.named_parameters()), list(names)
    of_layers = [0] * len(layers)
    others = 0
    for name in names:
        if name.startswith(prefix):
            of_layers[int(name.removeprefix(prefix).split(".")[0])] += parameters[name].numel()
        else:
            others += parameters[name].numel()
    return [others + sum(of_layers[: count + 1]) for count in range(len(layers))]


def layers_within(by_layers: list[int], target: int) -> int:
    """The most layers with at most ``target`` weights; at least one."""
    return max([1, *(count for count, left in enumerate(by_layers, 1) if left <= target)])


def keep_layers(network: nn.Module, count: int) -> None:
    """Drop all layers but the first ``count``, in place.

    ``ValueError`` for a count that is not there.
    """
    _, layers = layers_of(network)
    if not 1 <= count <= len(layers):
        raise ValueError(f"{count} of {len(layers)} layers cannot be kept")
    kept = nn.ModuleList(list(layers)[:count])
    if isinstance(network, Student):
        network.head.encoder.layers, network.head.encoder.num_layers = kept, count
        network.config = _cut(network.config, count)
    elif found := encoder_in(network):
        found[1].encoder.layers, found[1].layers = kept, (count,)


def _cut(config: StudentConfig, layers: int) -> StudentConfig:
    """The same with fewer layers, whose dimensions may be given layer by layer."""
    changes: dict[str, Any] = {"layers": layers}
    for name in ("heads", "feedforward"):
        given = getattr(config, name)
        changes[name] = given[:layers] if isinstance(given, tuple) else given
    return config.model_copy(update=changes)
