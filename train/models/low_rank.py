"""Layers of low rank: a linear layer or a convolution as two, by its singular values.

W (O, I) = B (O, r) A (r, I). The first layer has A and no bias, the second B and the bias; of a
convolution the first has its kernel, stride and padding, the second is of one tap (padding is zeros
in either, so that they are the same at the edges too). At full rank the two are the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d


def pair(layer: Layer, rank: int) -> nn.Sequential:
    """Two layers with ``rank`` units between them, of a layer's shapes; their weights are fresh."""
    if isinstance(layer, nn.Linear):
        first: nn.Module = nn.Linear(layer.in_features, rank, bias=False)
        return nn.Sequential(first, nn.Linear(rank, layer.out_features, layer.bias is not None))
    kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
    first = nn.Conv2d(layer.in_channels, rank, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
    return nn.Sequential(first, nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None))


def equal_rank(layer: Layer) -> int:
    """The most units between, with which the two layers cost no more than the one."""
    outputs, inputs = layer.weight.flatten(1).shape
    return max(1, outputs * inputs // (outputs + inputs))


@torch.no_grad()
def split(layer: Layer, rank: int) -> nn.Sequential:
    """The two layers nearest to a layer at a rank; each has the root of the singular values.

    ``ValueError`` for a rank above the layer's own.
    """
    weight_OI = layer.weight.double().flatten(1)
    if not 1 <= rank <= min(weight_OI.shape):
        raise ValueError(f"rank {rank}: the layer's is 1 to {min(weight_OI.shape)}")
    left_OR, values_R, right_RI = torch.linalg.svd(weight_OI, full_matrices=False)
    root_R = values_R[:rank].sqrt()
    two = pair(layer, rank).to(layer.weight.device, layer.weight.dtype)
    first, second = two
    _fill(first.weight, root_R[:, None] * right_RI[:rank])
    _fill(second.weight, left_OR[:, :rank] * root_R)
    if layer.bias is not None:
        _fill(second.bias, layer.bias)
    return two


def _fill(parameter: object, values: Tensor) -> None:
    assert isinstance(parameter, nn.Parameter)
    parameter.copy_(values.reshape(parameter.shape))


def split_layers(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Split layers of a model in place, at ``equal_rank``; returns the ranks by name."""
    ranks = {}
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        ranks[name] = equal_rank(layer)
        model.set_submodule(name, split(layer, ranks[name]))
    return ranks


def shape_as(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Split layers of a model in place where a state dict has two for one; weights are fresh."""
    for name, layer in list(model.named_modules()):
        first = state.get(f"{name}.0.weight")
        if isinstance(layer, nn.Linear | nn.Conv2d) and first is not None:
            model.set_submodule(name, pair(layer, len(first)))


def narrow(model: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Give linear layers the shapes that ``state`` has: units may have been removed from them.

    ``prefix`` is what names in ``state`` have before those of the model.
    """
    for name, module in model.named_modules():
        for part, linear in list(module.named_children()):
            weight = state.get(f"{prefix}{name}.{part}.weight")
            if not isinstance(linear, nn.Linear) or weight is None:
                continue
            if weight.shape != linear.weight.shape:
                outputs, inputs = weight.shape
                setattr(module, part, nn.Linear(inputs, outputs, linear.bias is not None))
        queries = f"{prefix}{name}.q_proj."
        weight = state.get(f"{queries}weight", state.get(f"{queries}1.weight"))  # or split
        if weight is not None and hasattr(module, "num_heads"):
            module.num_heads = weight.shape[0] // module.head_dim
